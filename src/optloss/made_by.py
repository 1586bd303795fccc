"""What a transformation is called: by the function that made it, and its stages.

A transformation is two closures. Their qualified names tell which function made them,
and what a chain closes over tells of what it is made.
"""

from collections.abc import Callable
from typing import Any

import optax

# Wrappers that a reader need not see.
TRANSPARENT = {"with_extra_args_support", "by_signature"}


def root(function: Any) -> Any:
    """Return the function behind partial applications."""
    while hasattr(function, "func"):
        function = function.func
    return function


def name_of(transform: optax.GradientTransformation) -> str:
    """Return what ``transform`` is, as code would have it: ``optax.chain(...)``."""
    return f"{_package(root(transform.update))}{_plain_name(transform)}"


def _package(function: Callable[..., object]) -> str:
    module = getattr(function, "__module__", None) or ""
    return "optax." if module.split(".")[0] == "optax" else ""


def _plain_name(transform: optax.GradientTransformation) -> str:
    name, closure = _maker(transform.update), _closure(transform.update)
    if name in TRANSPARENT:
        inner = closure.get("tx", closure.get("transform"))
        return type(transform).__name__ if inner is None else _plain_name(inner)
    if name in ("chain", "named_chain"):
        parts = _parts(closure)
        return f"{name}({', '.join(map(_plain_name, parts))})"
    inner = getattr(getattr(transform.update, "__self__", None), "inner_opt", None)
    if name == "MultiSteps" and inner is not None:
        return f"MultiSteps({_plain_name(inner)})"
    return name or _maker(transform.init) or type(transform).__name__


def _parts(closure: dict[str, Any]) -> list[optax.GradientTransformation]:
    if "update_fns" in closure:
        functions = closure["update_fns"]
        return [optax.GradientTransformation(update, update) for update in functions]
    return [part for _, part in closure.get("transforms", ())]


def _maker(function: Callable[..., object]) -> str:
    name: str = getattr(root(function), "__qualname__", "").split(".<locals>")[0]
    outer = name.split(".")[0]
    return "" if outer == "<lambda>" else outer


def _closure(function: Callable[..., object]) -> dict[str, Any]:
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, cells, strict=True)
    }

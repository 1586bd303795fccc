"""What a transformation is called: by the function that made it, and its stages.

A transformation is two closures. Their qualified names tell which function made them,
and what a chain closes over tells of what it is made.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

# Wrappers that a reader need not see.
TRANSPARENT = {"with_extra_args_support", "by_signature"}


def root(function: Any) -> Any:
    """Return the function behind partial applications."""
    while hasattr(function, "func"):
        function = function.func
    return function


def module_of(function: object) -> str:
    """Return the module that ``function`` is of, "" where it tells none."""
    return getattr(root(function), "__module__", None) or ""


def name_of(transform: optax.GradientTransformation) -> str:
    """Return what ``transform`` is, as code would have it: ``optax.chain(...)``."""
    is_optax = module_of(transform.update).split(".")[0] == "optax"
    return f"{'optax.' if is_optax else ''}{_plain_name(transform)}"


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


def _parts(closure: Mapping[str, Any]) -> list[optax.GradientTransformation]:
    if "update_fns" in closure:
        functions = closure["update_fns"]
        return [optax.GradientTransformation(update, update) for update in functions]
    return [part for _, part in closure.get("transforms", ())]


def _maker(function: Callable[..., object]) -> str:
    name: str = getattr(root(function), "__qualname__", "").split(".<locals>")[0]
    outer = name.split(".")[0]
    return "" if outer == "<lambda>" else outer


def _closure(function: Callable[..., object]) -> Mapping[str, Any]:
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        return {}
    return inspect.getclosurevars(function).nonlocals

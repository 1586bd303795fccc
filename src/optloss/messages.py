"""Checks of arguments, and the wording of what they refuse.

Every refusal reads ``call(argument=value): what is wrong. What to do.`` and is a
``ValueError`` raised when the thing is built. A traced or device value is checked by
its shape and dtype alone: looking at its number would break tracing, or wait for the
device.
"""

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

MOST_SHOWN = 60


def short_repr(value: Any) -> str:
    """Return a short text: arrays by dtype and shape, functions by their names."""
    if isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, functools.partial):
        bound = [
            f"{name}={short_repr(entry)}" for name, entry in value.keywords.items()
        ]
        arguments = ", ".join([*map(short_repr, value.args), *bound])
        return f"{short_repr(value.func)}({arguments})"
    if _is_named(value):
        return str(value.__name__)
    text = " ".join(repr(_without_numbers(value)).split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def _is_named(value: Any) -> bool:
    return callable(value) and hasattr(value, "__name__")


class _Text(str):
    """A str that is its own ``repr``."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _without_numbers(value: Any) -> Any:
    """Return a container with its arrays in words: their numbers may be gigabytes."""
    if type(value) in (list, tuple):
        return type(value)(map(_without_numbers, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_without_numbers, value))
    if type(value) is dict:
        return {key: _without_numbers(entry) for key, entry in value.items()}
    return _Text(short_repr(value)) if is_array(value) or _is_named(value) else value


def argument_error(call: str, argument: str, value: Any, problem: str) -> ValueError:
    """Return the error that refuses ``call(argument=value)`` because of ``problem``."""
    return ValueError(f"{call}({argument}={short_repr(value)}): {problem}")


def is_array(value: Any) -> TypeGuard[jax.Array]:
    """Tell whether ``value`` is a NumPy or JAX array, traced ones included."""
    return isinstance(value, (jax.Array, np.ndarray))


def is_number(value: Any) -> bool:
    """Tell whether ``value`` is a real Python or NumPy number; a bool is none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(
        value, bool
    )


def check_number(
    call: str,
    argument: str,
    value: Any,
    accept: Callable[[float], bool],
    requirement: str,
) -> None:
    """Refuse ``value`` unless it is a 0-d array or a real number that ``accept`` takes.

    ``requirement`` completes the sentence "must be ...", with what to do behind it.
    """
    if is_array(value):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(
            value.dtype, jnp.integer
        )
        good = value.shape == () and real
    elif is_number(value):
        try:
            good = accept(float(value))
        except OverflowError:
            good = False
    else:
        good = False
    if not good:
        raise argument_error(call, argument, value, f"must be {requirement}")


def check_int(
    call: str, argument: str, value: Any, least: int, requirement: str
) -> int:
    """Return ``value`` unless it is no int of at least ``least``; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise argument_error(call, argument, value, f"must be {requirement}")
    return value


def check_bool(call: str, argument: str, value: Any) -> bool:
    """Return ``value`` unless it is neither ``True`` nor ``False``."""
    if not isinstance(value, bool):
        raise argument_error(call, argument, value, "must be True or False.")
    return value


def check_axis_name(call: str, axis_name: Any) -> None:
    """Refuse ``axis_name`` unless it is a str, a tuple of them or ``None``."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        cure = "must be a mesh axis's name or a tuple of them."
        raise argument_error(call, "axis_name", axis_name, cure)


def listing(names: Iterable[Any], most: int = 10) -> str:
    """Return the sorted ``names`` quoted and joined, cut after ``most``."""
    ordered = sorted(str(name) for name in names)
    shown = ", ".join(repr(name) for name in ordered[:most])
    return f"{shown} and {len(ordered) - most} more" if len(ordered) > most else shown


def nearest(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return those of ``names`` that look most like ``name``, sorted."""
    return sorted(difflib.get_close_matches(name, list(names), most, cutoff=0.3))

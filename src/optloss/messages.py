"""Checks of arguments, and the wording of what they refuse.

Every refusal reads ``call(argument=value): what is wrong. What to do.`` and is a
``ValueError`` raised when the thing is built. A number is judged wherever it is known:
Python's, NumPy's scalars, NumPy's 0-d arrays. A traced or device value is checked by
its shape and dtype alone: looking at its number would break tracing, or wait for the
device.

No refusal fails on the value that it shows, whatever that is: an object whose ``repr``
raises, a list that holds itself, an int of 5,000 digits, a name of 10 MB.
"""

import contextlib
import difflib
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optloss.mesh import is_deleted
from optloss.typing import Scalar

MOST_SHOWN = 60
MOST_OF_A_NAME = 120
MOST_OF_A_MESSAGE = 2000
DEEPEST_SHOWN = 6
LARGEST_SHOWN = 10**1000
MOST_COMPARED = 2000
"""Names among which a nearest one is looked for: each takes some microseconds."""

BRACKETS: dict[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    set: ("{", "}"),
}


def short_repr(value: object, most: int = MOST_SHOWN) -> str:
    """Return a short text: arrays by dtype and shape, functions by their names."""
    return _cut(" ".join(_words(value, 0).split()), most)


def short_text(text: str) -> str:
    """Return ``text`` on one line, cut where it is long."""
    return _cut(" ".join(text.split()), MOST_OF_A_NAME)


def quoted(name: object) -> str:
    """Return the ``repr`` of a name, a pattern or a tag, cut where it is very long."""
    if not isinstance(name, str):
        return short_repr(name)
    return _cut(repr(name[:MOST_OF_A_NAME]), MOST_OF_A_NAME)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _words(value: object, depth: int) -> str:
    """Return ``repr(value)`` without the numbers of arrays, which may be gigabytes."""
    if depth > DEEPEST_SHOWN:
        return "..."
    try:
        return _container(value, depth) or _single(value)
    except Exception:  # a repr, a property or a metaclass of the caller's own
        return f"<{type(value).__name__}>"


def _container(value: Any, depth: int) -> str | None:
    kind: type = type(value)
    if isinstance(value, functools.partial):
        return _words(value.func, depth + 1) + _fields(
            [*((None, entry) for entry in value.args), *value.keywords.items()], depth
        )
    names: Any = getattr(value, "_fields", None)
    if issubclass(kind, tuple) and names is not None:
        return kind.__name__ + _fields(zip(names, value, strict=True), depth)
    if kind is dict:
        pairs = (
            f"{_words(key, depth + 1)}: {_words(entry, depth + 1)}"
            for key, entry in value.items()
        )
        return f"{{{_joined(pairs)}}}"
    if kind not in BRACKETS or (kind is set and not value):
        return None
    start, end = BRACKETS[kind]
    comma = "," if kind is tuple and len(value) == 1 else ""
    inner = _joined(_words(entry, depth + 1) for entry in value)
    return f"{start}{inner}{comma}{end}"


def _fields(pairs: Iterable[tuple[str | None, object]], depth: int) -> str:
    texts = (
        f"{name}={_words(entry, depth + 1)}" if name else _words(entry, depth + 1)
        for name, entry in pairs
    )
    return f"({_joined(texts)})"


def _joined(texts: Iterable[str]) -> str:
    """Join ``texts``, and take no more of them than are shown."""
    shown: list[str] = []
    length = 0
    for text in texts:
        if length > MOST_SHOWN:
            return ", ".join([*shown, "..."])
        shown.append(text)
        length += len(text)
    return ", ".join(shown)


def _single(value: object) -> str:
    if isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if type(value) is int and abs(value) > LARGEST_SHOWN:
        return f"an int of {value.bit_length()} bits"
    if callable(value) and hasattr(value, "__name__"):
        return f"{_function_name(value)}{_place(value)}"
    if isinstance(value, (str, bytes, bytearray)):
        return repr(value[:MOST_SHOWN])
    return repr(value)


def _function_name(function: Any) -> str:
    """Return its name; of a closure of a library, a schedule say, that of its maker."""
    library = (getattr(function, "__module__", None) or "").split(".")[0]
    maker, local, _ = getattr(function, "__qualname__", "").partition(".<locals>")
    is_made = bool(local) and library in ("optax", "optloss")
    return maker if is_made else function.__name__


def is_encodable(text: str) -> bool:
    """Tell whether ``text`` is valid UTF-8: what was read off a disk may not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(function: object) -> str:
    """Return where a lambda stands in the source, which is all that names it."""
    code = getattr(function, "__code__", None)
    if getattr(function, "__name__", None) != "<lambda>" or code is None:
        return ""
    return f" at {os.path.basename(code.co_filename)}:{code.co_firstlineno}"


def refusal(call: str, problem: str) -> ValueError:
    """Return the error that refuses what ``call`` was given, in at most 2,000 letters.

    Of a longer text the middle is left out: what to do stands at its end.
    """
    text = f"{call}: {problem}"
    if len(text) > MOST_OF_A_MESSAGE:
        half = MOST_OF_A_MESSAGE // 2 - 3
        text = f"{text[:half]} ... {text[-half:]}"
    return ValueError(text)


def argument_error(call: str, argument: str, value: object, problem: str) -> ValueError:
    """Return the error that refuses ``call(argument=value)`` because of ``problem``."""
    return refusal(f"{call}({argument}={short_repr(value)})", problem)


def is_array(value: object) -> TypeGuard[jax.Array]:
    """Tell whether ``value`` is a NumPy or JAX array, traced ones included."""
    return isinstance(value, (jax.Array, np.ndarray))


def is_real(dtype: DTypeLike) -> bool:
    """Tell whether ``dtype`` is that of integers or real floating numbers."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating))


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether ``value`` is a real Python or NumPy number; a bool is none."""
    if isinstance(value, np.generic):
        return is_real(value.dtype)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_real_scalar(value: object) -> TypeGuard[Scalar]:
    """Tell whether ``value`` is a number, or a 0-d array of a real dtype."""
    return is_number(value) or (
        is_array(value)
        and value.shape == ()
        and is_real(value.dtype)
        and not is_deleted(value)
    )


def check_number(
    call: str,
    argument: str,
    value: object,
    accept: Callable[[float], bool],
    requirement: str,
) -> None:
    """Refuse ``value`` unless it is a 0-d array or a real number that ``accept`` takes.

    ``requirement`` completes the sentence "must be ...", with what to do behind it.
    """
    if is_deleted(value):
        problem = "was deleted when it was donated to an earlier call."
        raise argument_error(call, argument, value, problem)
    shown = value
    if is_real_scalar(value):
        with contextlib.suppress(OverflowError):
            if isinstance(value, jax.Array) or accept(float(value)):
                return
        shown = value if isinstance(value, (int, float)) else value[()]
    raise argument_error(call, argument, shown, f"must be {requirement}")


def check_finite(call: str, **arguments: object) -> None:
    """Refuse ``arguments`` unless each is a finite number or a 0-d array."""
    wanted = "a finite real number or a 0-d array."
    for name, value in arguments.items():
        check_number(call, name, value, math.isfinite, wanted)


def check_at_least_zero(call: str, cure: str = "", /, **arguments: object) -> None:
    """Refuse ``arguments`` unless each is a finite number >= 0 or a 0-d array."""
    wanted = f"a finite real number >= 0 or a 0-d array. {cure}".rstrip()
    for name, value in arguments.items():
        check_number(call, name, value, lambda n: 0 <= n < math.inf, wanted)


def check_bound(call: str, /, **arguments: object) -> None:
    """Refuse ``arguments`` unless each is a number >= 0, inf too, or a 0-d array."""
    wanted = "a real number >= 0 or a 0-d array. Use inf to measure the norm alone."
    for name, value in arguments.items():
        check_number(call, name, value, lambda n: n >= 0, wanted)


def check_positive(call: str, cure: str = "", /, **arguments: object) -> None:
    """Refuse ``arguments`` unless each is a finite number > 0 or a 0-d array."""
    wanted = f"a finite real number > 0 or a 0-d array. {cure}".rstrip()
    for name, value in arguments.items():
        check_number(call, name, value, lambda n: 0 < n < math.inf, wanted)


def check_below_one(call: str, cure: str = "", /, **arguments: object) -> None:
    """Refuse ``arguments`` unless each is a number in [0, 1) or a 0-d array."""
    wanted = f"a real number in [0, 1) or a 0-d array. {cure}".rstrip()
    for name, value in arguments.items():
        check_number(call, name, value, lambda n: 0 <= n < 1, wanted)


def check_whole(call: str, least: int, /, **arguments: object) -> None:
    """Refuse ``arguments`` unless each is whole (2.0 is), >= ``least``, or 0-d."""
    wanted = f"a whole number >= {least} or a 0-d array."
    for name, value in arguments.items():
        check_number(call, name, value, lambda n: n >= least and n % 1 == 0, wanted)


def check_int(
    call: str,
    argument: str,
    value: object,
    least: int,
    requirement: str,
    most: float = math.inf,
) -> int:
    """Return ``value`` as an int, unless it is none of at least ``least``."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        number = int(value)
        if least <= number <= most:
            return number
    raise argument_error(call, argument, value, f"must be {requirement}")


def check_bool(call: str, argument: str, value: object) -> None:
    """Refuse ``value`` unless it is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise argument_error(call, argument, value, "must be True or False.")


def check_choice(
    call: str, argument: str, value: object, choices: Iterable[str]
) -> None:
    """Refuse ``value`` unless it is one of the texts ``choices``."""
    known = [*choices]
    if not isinstance(value, str) or value not in known:
        first = ", ".join(map(repr, known[:-1]))
        problem = f"must be {first} or {known[-1]!r}."
        raise argument_error(call, argument, value, problem)


def check_axis_name(call: str, axis_name: object, argument: str = "axis_name") -> None:
    """Refuse ``axis_name`` unless it is a str, a tuple of them or ``None``."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        cure = "must be a mesh axis's name or a tuple of them."
        raise argument_error(call, argument, axis_name, cure)
    if len(set(names)) < len(names):
        raise argument_error(call, argument, axis_name, "names an axis twice.")


def check_key(call: str, argument: str, key: object) -> None:
    """Refuse ``key`` unless it is a seed, a typed key or a raw uint32 key."""
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        good = -(2**63) <= key < 2**64
    elif is_array(key):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
        seed = jnp.issubdtype(key.dtype, jnp.integer) and key.shape == ()
        raw = key.dtype == jnp.uint32 and key.ndim == 1
        good = (typed or seed or raw) and not is_deleted(key)
    else:
        good = False
    if not good:
        raise argument_error(call, argument, key, "must be an int or a JAX random key.")


def check_callable(
    call: str,
    argument: str,
    fn: object,
    arguments: int,
    signature: str,
    *,
    more: bool = False,
) -> None:
    """Refuse ``fn`` unless it can be called with so many positional ``arguments``.

    ``signature`` completes the sentence "must be ...": "a function step -> rate". With
    ``more``, others may be needed, which are not known yet.
    """
    if not callable(fn):
        raise argument_error(call, argument, fn, f"must be {signature}.")
    if not takes(fn, arguments, more=more):
        problem = f"must be {signature}. Its signature is {signature_of(fn)}."
        raise argument_error(call, argument, fn, problem)


def signature_of(fn: Callable[..., object]) -> str:
    """Return the signature of ``fn`` without types, "(...)" where it tells none."""
    try:
        signature = inspect.signature(fn)
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        return _cut(str(inspect.Signature(plain)), MOST_OF_A_NAME)
    except Exception:  # a default of the caller's own has a repr that fails
        return "(...)"


def takes(
    fn: Callable[..., object],
    arguments: int,
    *,
    more: bool = False,
    keywords: Sequence[str] = (),
) -> bool:
    """Tell whether ``fn`` can be called so, as far as its signature is known."""
    try:
        signature = inspect.signature(fn)
    except Exception:  # a builtin tells none, and what is the caller's may fail
        return True
    try:
        bind = signature.bind_partial if more else signature.bind
        bind(*range(arguments), **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def listing(names: Iterable[object], most: int = 10) -> str:
    """Return the sorted ``names`` quoted and joined, cut after ``most``."""
    ordered = sorted(
        name if isinstance(name, str) else short_repr(name) for name in names
    )
    shown = ", ".join(map(quoted, ordered[:most]))
    return f"{shown} and {len(ordered) - most} more" if len(ordered) > most else shown


def nearest(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return those of ``names`` that look most like ``name``, sorted.

    Case counts least: of two that differ in nothing else, the one in the case of
    ``name`` is nearer.
    """
    if len(name) > MOST_OF_A_NAME:
        return []
    known = [known for known in names if len(known) <= 2 * MOST_OF_A_NAME]
    known = known[:MOST_COMPARED]
    folded = {one: one.casefold() for one in known}
    close = difflib.get_close_matches(
        name.casefold(), {*folded.values()}, most, cutoff=0.3
    )

    def likeness(one: str) -> tuple[int, float]:
        ratio = difflib.SequenceMatcher(a=name, b=one).ratio()
        return close.index(folded[one]), -ratio

    found = [one for one in known if folded[one] in close]
    return sorted(sorted(found, key=likeness)[:most])

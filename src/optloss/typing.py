"""What the arguments and results of the library are, by name."""

import re
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import jax

PyTree: TypeAlias = Any
"""Any nesting of containers and arrays that ``jax.tree`` can take apart."""

Scalar: TypeAlias = float | jax.Array
"""A real number or a 0-d array, which may be traced."""

Pattern: TypeAlias = str | re.Pattern[str]
"""A parameter's name, a glob or a compiled regular expression."""

Variables: TypeAlias = (
    Pattern | Collection[Pattern] | Callable[[str, jax.Array], bool] | PyTree | None
)
"""Which parameters are trained: names, patterns, a predicate or a tree of bools."""

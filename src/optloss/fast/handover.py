"""Hundreds of histograms from a compiled step to the host, in a few arrays.

Every array that a compiled step returns costs the host some microseconds, and one that
a branch in it returns costs as much again. Inside of the step the histograms are packed
as the rows of one array of integers for each dtype; outside each reads its parts from
its row when it is looked at.
"""

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optloss.histograms import Histogram, histogram
from optloss.mesh import vary_over, varying
from optloss.typing import PyTree

FLOATS, INTEGERS = (0, 1, 3, 4), (2, 5)
"""Places of a histogram's parts in the order of its arguments."""
LIMITS, COUNTS = 6, 7
COLUMNS = {place: column for column, place in enumerate((*FLOATS, *INTEGERS))}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stacked:
    """A dict of summaries whose histograms lie in one array for each dtype."""

    others: dict[str, PyTree]
    stacks: list[jax.Array]
    # The tags of each stack.
    rows: tuple[tuple[str, ...], ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, summaries: dict[str, PyTree]) -> "Stacked":
        """Stack the histograms of ``summaries``, which have TensorBoard's limits."""
        kinds: dict[Hashable, dict[str, jax.Array]] = {}
        others: dict[str, PyTree] = {}
        for tag, value in summaries.items():
            if isinstance(value, Histogram):
                row = _pack(value)
                kinds.setdefault((row.dtype, varying(row)), {})[tag] = row
            else:
                others[tag] = value
        stacks = [jnp.stack([*kind.values()]) for kind in kinds.values()]
        return cls(others, stacks, tuple(map(tuple, kinds.values())))

    def summaries(self) -> dict[str, PyTree]:
        """Return the dict."""
        found = dict(self.others)
        for tags, stack in zip(self.rows, self.stacks, strict=True):
            for row, tag in enumerate(tags):
                found[tag] = Histogram.of_parts(_Row(stack, row))
        return {tag: found[tag] for tag in sorted(found)}  # as JAX has dicts


def empty_like(shapes: Stacked) -> Stacked:
    """Return histograms of nothing, in the shapes and types of ``shapes``."""

    def empty(stack: jax.ShapeDtypeStruct) -> jax.Array:
        dtype = f"float{stack.dtype.itemsize * 8}"
        row = _pack(histogram(jnp.zeros(0, dtype)))
        return vary_over(jnp.broadcast_to(row, stack.shape), varying(stack))

    return jax.tree.map(empty, shapes)


class _Row(Sequence[jax.Array | None]):
    """The eight parts of the histogram that is packed in one row of a stack."""

    def __init__(self, stack: jax.Array, row: int) -> None:
        self._stack, self._row = stack, row

    def __len__(self) -> int:
        return COUNTS + 1

    def __iter__(self) -> Iterator[jax.Array | None]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, place: Any) -> Any:
        if place == LIMITS:
            return None
        bytes_each = self._stack.dtype.itemsize
        # It may be looked at where 64 bits, with which it was made, are off again.
        with jax.enable_x64(bytes_each == 8 or jax.config.jax_enable_x64):
            if place == COUNTS:
                return self._stack[self._row, len(COLUMNS) :].astype(np.int32)
            part = self._stack[self._row, COLUMNS[place]]
            if place in INTEGERS:
                return part.astype(np.int32)
            return jax.lax.bitcast_convert_type(part, f"float{8 * bytes_each}")


def _pack(histogram: Histogram) -> jax.Array:
    parts = tuple(histogram.tree_flatten()[0])
    word = np.dtype(f"i{parts[0].dtype.itemsize}")
    floats = jnp.stack([parts[place] for place in FLOATS])
    integers = jnp.stack([parts[place].astype(word) for place in INTEGERS])
    bits = jax.lax.bitcast_convert_type(floats, word)
    return jnp.concatenate([bits, integers, parts[COUNTS].astype(word)])

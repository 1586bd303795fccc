"""Many small leaves as one vector.

Every leaf costs a step some microseconds on the host and several small kernels on the
device. A network of 400 small leaves is therefore several times slower than its number
of parameters suggests. Packed, the small leaves of one dtype lie in one vector, in rows
of :data:`ROW` elements, each leaf starting a row of its own and its last row filled up
with zeros. What belongs to a leaf, such as a multiplier, is then a column with one
entry a row.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optloss.names import leaf_names
from optloss.trees import freeze, is_inexact

ROW = 128
"""Elements of a row."""

GROUP = 16
"""Leaves concatenated at once: XLA copies a few operands, and searches among many."""


class PackedTree(NamedTuple):
    """A tree whose small leaves lie in one vector for each dtype."""

    vectors: dict[str, jax.Array]  # [rows * ROW] by dtype of the leaves
    large: Any  # the tree, with optax.MaskedNode() in place of the small leaves


class Slot(NamedTuple):
    """Where one leaf lies."""

    place: int  # among the leaves of the tree
    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements the leaf has."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """How many rows it takes."""
        return -(-self.size // ROW)


class Layout(NamedTuple):
    """Which leaves of a tree lie in which vector, in what order."""

    vectors: tuple[tuple[str, tuple[Slot, ...]], ...]

    @property
    def places(self) -> set[int]:
        """The places of all packed leaves."""
        return {slot.place for _, slots in self.vectors for slot in slots}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed tree that knows its layout, on its way through the chain."""

    tree: PackedTree
    layout: Layout = dataclasses.field(metadata={"static": True})


def layout_of(tree: Any, size: int) -> Layout:
    """Return the layout in which the inexact leaves of at most ``size`` are packed."""
    vectors: dict[str, list[Slot]] = {}
    names = leaf_names(tree)
    for place, (name, leaf) in enumerate(
        zip(names, jax.tree.leaves(tree), strict=True)
    ):
        if is_inexact(leaf) and leaf.size <= size:
            slot = Slot(place, name, tuple(leaf.shape))
            vectors.setdefault(jnp.dtype(leaf.dtype).name, []).append(slot)
    return Layout(tuple((dtype, tuple(slots)) for dtype, slots in vectors.items()))


def pack(tree: Any, layout: Layout) -> Packed:
    """Return ``tree`` packed; its leaves may have other dtypes than the layout's."""
    leaves, structure = jax.tree.flatten(tree)
    vectors = {
        dtype: _concatenate([leaves[slot.place] for slot in slots])
        for dtype, slots in layout.vectors
    }
    kept = [i not in layout.places for i in range(len(leaves))]
    large = freeze(jax.tree.unflatten(structure, leaves), kept)
    return Packed(PackedTree(vectors, large), layout)


def _concatenate(leaves: list[jax.Array]) -> jax.Array:
    pieces = [piece for leaf in leaves for piece in _padded(leaf)]
    while len(pieces) > 1:
        pieces = [
            jnp.concatenate(pieces[i : i + GROUP]) for i in range(0, len(pieces), GROUP)
        ]
    return pieces[0]


def _padded(leaf: jax.Array) -> list[jax.Array]:
    missing = -leaf.size % ROW
    zeros = [jnp.zeros(missing, leaf.dtype)] if missing else []
    return [jnp.ravel(leaf), *zeros]


def unpack(packed: PackedTree, like: Any, layout: Layout) -> Any:
    """Return the tree that was packed, in the structure of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    for dtype, slots in layout.vectors:
        vector = packed.vectors[dtype]
        for slot, start in zip(slots, _starts(vector, slots), strict=True):
            piece = jax.lax.dynamic_slice_in_dim(vector, start, slot.size)
            leaves[slot.place] = piece.reshape(slot.shape)
    large = iter(jax.tree.leaves(packed.large))
    for place in range(len(leaves)):
        if place not in layout.places:
            leaves[place] = next(large)
    return jax.tree.unflatten(structure, leaves)


def _starts(vector: jax.Array, slots: tuple[Slot, ...]) -> list[Any]:
    """Return where each leaf starts, on a CPU as numbers that XLA does not know.

    Known, each would be a constant in a kernel of its own, and 400 kernels that differ
    in nothing else take 6 s to compile. As arguments of one kernel: half a second.
    """
    ends = np.cumsum([slot.rows * ROW for slot in slots])
    starts = [0, *map(int, ends[:-1])]
    if isinstance(vector, (np.ndarray, jax.ShapeDtypeStruct)) or not vector.size:
        return starts
    unknown: list[Any] = jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(
            opaque_true(vector),
            lambda: _scalars(starts),
            lambda: _scalars([0] * len(starts)),
        ),
        default=lambda: _scalars(starts),
    )
    return unknown


def opaque_true(array: jax.Array) -> jax.Array:
    """Return ``True`` as XLA cannot know it: read off ``array``, which is not empty."""
    first = jnp.ravel(array)[0].real
    bits = jax.lax.bitcast_convert_type(first, f"uint{first.dtype.itemsize * 8}")
    always: jax.Array = jax.lax.population_count(bits) <= bits.dtype.itemsize * 8
    return always


def _scalars(numbers: list[int]) -> list[jax.Array]:
    return [jnp.int32(number) for number in numbers]


def map_rows(
    fn: Callable[[jax.Array, tuple[Slot, ...]], jax.Array], packed: Packed
) -> dict[str, jax.Array]:
    """Apply ``fn(rows [rows, ROW], slots)`` to each vector, seen as rows."""
    return {
        dtype: fn(packed.tree.vectors[dtype].reshape(-1, ROW), slots).reshape(-1)
        for dtype, slots in packed.layout.vectors
    }


def column(slots: tuple[Slot, ...], values: Any) -> np.ndarray[Any, Any]:
    """Return ``values``, one a leaf, as a column ``[rows, 1]`` with one a row."""
    repeated: np.ndarray[Any, Any] = np.repeat(
        np.asarray(values), [slot.rows for slot in slots]
    )
    return repeated[:, None]

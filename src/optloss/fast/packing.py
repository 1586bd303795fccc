"""Many small leaves as one vector, while an elementwise optimizer works on them.

Every leaf costs a step some microseconds on the host and several small kernels on the
device. A network of 400 small leaves is therefore several times slower than its number
of parameters suggests. Packed, the small leaves of one dtype lie in one vector.

The result is the same only where the optimizer treats each element alone. One that
looks at a leaf's shape or norm (adafactor, muon, lamb, lars) is refused, and so is one
that chooses leaves by their rank or name (a weight decay that spares the biases).
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optloss.fast.slices import slices
from optloss.names import leaf_names
from optloss.trees import is_inexact, select_leaves
from optloss.typing import PyTree

GROUP = 16
"""Leaves concatenated at once: XLA copies a few operands, and searches among many."""

# Adafactor looks at shapes from 128 on; a mask may go by such names.
PROBE = {"embedding": (), "kernel": (129, 130), "bias": (17,), "norm_scale": (3, 5)}


class PackedTree(NamedTuple):
    """A tree whose small leaves lie in one vector for each dtype.

    The key of a vector is its dtype and a digest of the names of what lies in it. Keys
    are structure, so that a trace can tell two selections of like shapes apart, and
    they are kept by every saver that keeps the keys of a dict. The names themselves are
    once in a state, in the table of :func:`table_of`: they are long, and as static data
    of a node of our own Orbax and msgpack would lose them.
    """

    vectors: dict[str, jax.Array]  # [elements] by dtype and names of the leaves
    large: PyTree  # the tree, with optax.MaskedNode() in place of the small leaves


def is_packed(node: object) -> bool:
    """Tell whether ``node`` is a packed tree, or the dict that a saver made of one."""
    raw = isinstance(node, Mapping) and set(node) == set(PackedTree._fields)
    return raw or isinstance(node, PackedTree)


class Slot(NamedTuple):
    """Where one leaf lies."""

    place: int  # among the leaves of the tree
    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements the leaf has."""
        return math.prod(self.shape)


Layout: TypeAlias = dict[str, list[Slot]]
"""Which leaves of a tree lie in which vector, in what order."""


def pack_small_leaves(
    inner: optax.GradientTransformation, size: int
) -> optax.GradientTransformationExtraArgs:
    """Run an elementwise ``inner`` with leaves of at most ``size`` elements packed.

    The state is that of ``inner`` over a :class:`PackedTree`. Updates are leaves
    ``[*shape]``; gradients may be packed already where the parameters are given.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        return inner.init(pack(params, layout_of(params, size)))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        # The state is laid out by the parameters; a gradient's dtype may differ.
        template = updates if params is None else params
        layout = layout_of(template, size)
        for argument in ("grad", "value_fn"):  # what needs them is never packed
            extra.pop(argument, None)
        beside = None if params is None else pack(params, layout)
        packed, state = inner.update(pack(updates, layout), state, beside, **extra)
        return unpack(packed, template, layout), state

    return optax.GradientTransformationExtraArgs(init, update)


def layout_of(tree: PyTree, size: int) -> Layout:
    """Return the layout in which the inexact leaves of at most ``size`` are packed."""
    found: dict[str, list[Slot]] = {}
    leaves = jax.tree.leaves(tree)
    for place, (name, leaf) in enumerate(zip(leaf_names(tree), leaves, strict=True)):
        if is_inexact(leaf) and leaf.size <= size:
            slot = Slot(place, name, tuple(leaf.shape))
            found.setdefault(jnp.dtype(leaf.dtype).name, []).append(slot)
    return {_key(dtype, slots): slots for dtype, slots in found.items()}


def _key(dtype: str, slots: list[Slot]) -> str:
    names = json.dumps([slot.name for slot in slots])
    return f"{dtype}-{hashlib.sha256(names.encode()).hexdigest()[:12]}"


def table_of(layout: Layout) -> jax.Array:
    """Return names and shapes of the packed leaves, as an array: uint8 [bytes]."""
    rows = {
        key: [(slot.name, slot.shape) for slot in slots]
        for key, slots in layout.items()
    }
    return jnp.asarray(np.frombuffer(json.dumps(rows).encode(), np.uint8))


def read_table(table: ArrayLike) -> Layout:
    """Return the layout whose :func:`table_of` is ``table``, places left out."""
    words = np.asarray(table)
    words = words.reshape(-1, words.shape[-1])[0]  # under vmap, one like the other
    rows = json.loads(words.astype(np.uint8).tobytes())
    return {
        key: [Slot(-1, name, tuple(shape)) for name, shape in slots]
        for key, slots in rows.items()
    }


def pack(tree: PyTree, layout: Layout) -> PyTree:
    """Return ``tree`` packed; its leaves may have other dtypes than the layout's.

    What is packed already, or holds nothing to pack, is returned as it is.
    """
    if not layout or isinstance(tree, PackedTree):
        return tree
    leaves = jax.tree.leaves(tree)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.eval_shape(lambda tree: pack(tree, layout), tree)
    vectors = {
        key: _concatenate([jnp.ravel(leaves[slot.place]) for slot in slots])
        for key, slots in layout.items()
    }
    places = {slot.place for slots in layout.values() for slot in slots}
    kept = [i not in places for i in range(len(leaves))]
    return PackedTree(vectors, select_leaves(tree, kept))


def _concatenate(pieces: list[jax.Array]) -> jax.Array:
    while len(pieces) > 1:
        pieces = [
            jnp.concatenate(pieces[i : i + GROUP]) for i in range(0, len(pieces), GROUP)
        ]
    return pieces[0]


def unpack(packed: PyTree, template: PyTree, layout: Layout) -> PyTree:
    """Return the tree that was packed, in the structure of ``template``."""
    if not layout:
        return packed
    leaves, structure = jax.tree.flatten(template)
    small: dict[int, jax.Array] = {}
    for key, slots in layout.items():
        vector = packed.vectors[key]
        sizes = [slot.size for slot in slots]
        starts = [0, *itertools.accumulate(sizes[:-1])]
        for slot, piece in zip(slots, slices(vector, starts, sizes), strict=True):
            small[slot.place] = piece.reshape(slot.shape)
    large = iter(jax.tree.leaves(packed.large))
    merged = [small[i] if i in small else next(large) for i in range(len(leaves))]
    return jax.tree.unflatten(structure, merged)


def is_elementwise(transform: optax.GradientTransformation) -> bool:
    """Tell whether ``transform`` gives the same updates on packed and on single leaves.

    It is tried out: two updates of some random leaves, one by one and packed. The
    parameters are large, so that a small weight decay shows.
    """
    size = max(math.prod(shape) for shape in PROBE.values())
    random = np.random.default_rng(0)
    trees = [
        {
            name: np.asarray(random.normal(size=shape) * scale, np.float32)
            for name, shape in PROBE.items()
        }
        for scale in (100.0, 1.0, 1.0)
    ]
    with jax.ensure_compile_time_eval():
        try:
            alone = _run(optax.with_extra_args_support(transform), *trees)
            packed = _run(pack_small_leaves(transform, size), *trees)
        except Exception:  # a transform of the user's own may fail in any way
            return False
    return all(
        np.allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(one).max())
        for one, other in zip(alone, packed, strict=True)
    )


def _run(
    transform: optax.GradientTransformationExtraArgs, params: PyTree, *gradients: PyTree
) -> list[np.ndarray]:
    update: Callable[..., tuple[PyTree, PyTree]] = jax.jit(transform.update)
    params, gradients = jax.tree.map(jnp.asarray, (params, gradients))
    state = transform.init(params)
    result: list[np.ndarray] = []
    for step, gradient in enumerate(gradients):
        updates, state = update(
            gradient, state, params, step=jnp.asarray(step), value=jnp.ones(())
        )
        params = optax.apply_updates(params, updates)
        result += map(np.asarray, jax.tree.leaves(updates))
    return result

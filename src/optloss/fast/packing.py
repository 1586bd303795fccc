"""Many small leaves as one vector, while an elementwise optimizer works on them.

Every leaf costs a step some microseconds on the host and several small kernels on the
device. A network of 400 small leaves is therefore several times slower than its number
of parameters suggests. Packed, the small leaves of one dtype lie in one vector.

The result is the same only where the optimizer treats each element alone. One that
looks at a leaf's shape or norm (adafactor, muon, lamb, lars) is refused, and so is one
that chooses leaves by their rank or name (a weight decay that spares the biases).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optloss.mesh import cond_on_mesh
from optloss.names import select
from optloss.trees import is_inexact, select_leaves
from optloss.typing import PyTree, Variables

GROUP = 16
"""Leaves concatenated at once: XLA copies a few operands, and searches among many."""

# Adafactor looks at shapes from 128 on; a mask may go by such names.
PROBE = {"embedding": (), "kernel": (129, 130), "bias": (17,), "norm_scale": (3, 5)}


class PackedTree(NamedTuple):
    """A tree whose small leaves lie in one vector for each dtype."""

    vectors: dict[str, jax.Array]  # [elements] by dtype of the leaves
    large: PyTree  # the tree, with optax.MaskedNode() in place of the small leaves


class Slot(NamedTuple):
    """Where one leaf lies."""

    place: int  # among the leaves of the tree
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements the leaf has."""
        return math.prod(self.shape)


class Layout(NamedTuple):
    """Which leaves of a tree lie in which vector, in what order."""

    vectors: dict[str, list[Slot]]

    @property
    def places(self) -> set[int]:
        """The places of all packed leaves."""
        return {slot.place for slots in self.vectors.values() for slot in slots}


def pack_small_leaves(
    inner: optax.GradientTransformation, size: int
) -> optax.GradientTransformationExtraArgs:
    """Run an elementwise ``inner`` on packed gradients and parameters.

    Args:
        inner: A transformation that treats each element alone.
        size: The largest number of elements of a leaf that is packed.

    Returns:
        A transform whose state is that of ``inner`` over a
        :class:`~optloss.fast.packing.PackedTree`. Updates are leaves ``[*shape]``.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        return inner.init(pack(params, layout_of(params, size)))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        # The state is laid out by the parameters; a gradient's dtype may differ.
        layout = layout_of(updates if params is None else params, size)
        beside = None if params is None else pack(params, layout)
        packed: PyTree
        packed, state = inner.update(pack(updates, layout), state, beside, **extra)
        return unpack(packed, updates, layout), state

    return optax.GradientTransformationExtraArgs(init, update)


def layout_of(tree: PyTree, size: int) -> Layout:
    """Return the layout in which the inexact leaves of at most ``size`` are packed."""
    vectors: dict[str, list[Slot]] = {}
    for place, leaf in enumerate(jax.tree.leaves(tree)):
        if is_inexact(leaf) and leaf.size <= size:
            slot = Slot(place, tuple(leaf.shape))
            vectors.setdefault(jnp.dtype(leaf.dtype).name, []).append(slot)
    return Layout(vectors)


def pack(tree: PyTree, layout: Layout) -> PackedTree:
    """Return ``tree`` packed; its leaves may have other dtypes than the layout's."""
    leaves = jax.tree.leaves(tree)
    vectors = {
        dtype: _concatenate([jnp.ravel(leaves[slot.place]) for slot in slots])
        for dtype, slots in layout.vectors.items()
    }
    kept = [i not in layout.places for i in range(len(leaves))]
    return PackedTree(vectors, select_leaves(tree, kept))


def _concatenate(pieces: list[jax.Array]) -> jax.Array:
    while len(pieces) > 1:
        pieces = [
            jnp.concatenate(pieces[i : i + GROUP]) for i in range(0, len(pieces), GROUP)
        ]
    return pieces[0]


def unpack(packed: PackedTree, template: PyTree, layout: Layout) -> PyTree:
    """Return the tree that was packed, in the structure of ``template``."""
    leaves, structure = jax.tree.flatten(template)
    for dtype, slots in layout.vectors.items():
        vector = packed.vectors[dtype]
        for slot, start in zip(slots, _starts(vector, slots), strict=True):
            piece = jax.lax.dynamic_slice_in_dim(vector, start, slot.size)
            leaves[slot.place] = piece.reshape(slot.shape)
    large = iter(jax.tree.leaves(packed.large))
    for place in range(len(leaves)):
        if place not in layout.places:
            leaves[place] = next(large)
    return jax.tree.unflatten(structure, leaves)


def _starts(vector: jax.Array, slots: list[Slot]) -> list[Any]:
    """Return where each leaf starts, on a CPU as numbers that XLA does not know.

    Known, each would be a constant in a kernel of its own, and 400 kernels that differ
    in nothing else take 6 s to compile. As arguments of one kernel: half a second.
    """
    ends = np.cumsum([slot.size for slot in slots])
    starts = [0, *map(int, ends[:-1])]
    if isinstance(vector, (np.ndarray, jax.ShapeDtypeStruct)) or not vector.size:
        return starts

    def known() -> list[jax.Array]:
        return [jnp.int32(start) for start in starts]

    def on_a_cpu() -> list[jax.Array]:
        nothing = [0] * len(starts)
        unknown: list[jax.Array] = cond_on_mesh(
            _opaque_true(vector), known, lambda: [jnp.int32(zero) for zero in nothing]
        )
        return unknown

    found: list[Any] = jax.lax.platform_dependent(cpu=on_a_cpu, default=known)
    return found


def _opaque_true(array: jax.Array) -> jax.Array:
    """Return ``True`` as XLA cannot know it: read off ``array``, which is not empty."""
    first = jnp.ravel(array)[0].real
    bits = jax.lax.bitcast_convert_type(first, f"uint{first.dtype.itemsize * 8}")
    always: jax.Array = jax.lax.population_count(bits) <= bits.dtype.itemsize * 8
    return always


def unpack_state(
    state: PyTree, params: PyTree, size: int, *, variables: Variables = None
) -> PyTree:
    """Return the state of a run with ``pack_small_leaves=size`` as it is without.

    Args:
        state: A ``TrainOpState`` or the state of :func:`make_optimizer`.
        params: The parameters of the run; shapes are enough.
        size: The ``pack_small_leaves`` the state was made with.
        variables: The ``variables`` it was made with.

    Returns:
        The same state with ordinary leaves in place of packed vectors.

    Example:
        >>> import jax, jax.numpy as jnp, optloss
        >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
        >>> packed = optloss.make_optimizer(0.1, "adam", pack_small_leaves=4)
        >>> plain = optloss.make_optimizer(0.1, "adam")
        >>> state = unpack_state(packed.init(params), params, 4)
        >>> jax.tree.structure(state) == jax.tree.structure(plain.init(params))
        True

    See also:
        :func:`pack_state`, the other way.
    """
    trained = select_leaves(params, select("unpack_state", variables, params))
    layout = layout_of(trained, size)
    return jax.tree.map(
        lambda node: unpack(node, trained, layout) if _is_packed(node) else node,
        state,
        is_leaf=_is_packed,
    )


def pack_state(
    state: PyTree, params: PyTree, size: int, *, variables: Variables = None
) -> PyTree:
    """Return the state of a run without packing as it is with it.

    Args:
        state: A ``TrainOpState`` or the state of :func:`make_optimizer`.
        params: The parameters of the run; shapes are enough.
        size: The ``pack_small_leaves`` of the run that is to go on from it.
        variables: The ``variables`` it was made with.

    Returns:
        The same state with every tree that mirrors the trained parameters packed. The
        ``params`` of a ``TrainOpState`` stay as they are.

    Example:
        >>> import jax, jax.numpy as jnp, optloss
        >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
        >>> packed = optloss.make_optimizer(0.1, "adam", pack_small_leaves=4)
        >>> plain = optloss.make_optimizer(0.1, "adam")
        >>> state = pack_state(plain.init(params), params, 4)
        >>> jax.tree.structure(state) == jax.tree.structure(packed.init(params))
        True

    See also:
        :func:`unpack_state`, the other way.
    """
    if hasattr(state, "opt_state"):
        opt_state = pack_state(state.opt_state, params, size, variables=variables)
        return state._replace(opt_state=opt_state)
    trained = select_leaves(params, select("pack_state", variables, params))
    layout, shapes = layout_of(trained, size), _shapes(trained)

    def mirrors(node: Any) -> bool:
        return _shapes(node) == shapes

    return jax.tree.map(
        lambda node: pack(node, layout) if mirrors(node) else node,
        state,
        is_leaf=mirrors,
    )


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedTree)


def _shapes(tree: Any) -> tuple[Any, ...]:
    """Return what the trees of moments of one tree of parameters have in common."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, *(is_inexact(leaf) and leaf.shape for leaf in leaves)


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
    transform: optax.GradientTransformationExtraArgs, params: Any, *gradients: Any
) -> list[Any]:
    update: Any = jax.jit(transform.update)
    params, gradients = jax.tree.map(jnp.asarray, (params, gradients))
    state = transform.init(params)
    result: list[Any] = []
    for step, gradient in enumerate(gradients):
        updates, state = update(
            gradient, state, params, step=jnp.asarray(step), value=jnp.ones(())
        )
        params = optax.apply_updates(params, updates)
        result += map(np.asarray, jax.tree.leaves(updates))
    return result

"""Many small leaves as one vector, for an optimizer that works element by element.

Every leaf costs a step some microseconds on the host and several small kernels on the
device. A network of 400 small leaves is therefore several times slower than its number
of parameters suggests. Packed, the small leaves of one dtype lie in one vector while
the optimizer is at work, and its state holds one vector where it held hundreds of
leaves.

The result is the same only where the optimizer treats each element alone. One that
looks at a leaf's shape or norm (adafactor, muon, lamb, lars) is refused.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optloss.names import select
from optloss.trees import freeze, is_inexact

PROBE_SHAPES = ((129, 130), (17,), (3, 5), ())


class PackedTree(NamedTuple):
    """A tree whose small leaves lie in one vector for each dtype."""

    vectors: dict[str, jax.Array]  # [sum of sizes] by dtype of the parameters
    large: Any  # the tree, with optax.MaskedNode() in place of the small leaves


def pack_small_leaves(
    inner: optax.GradientTransformation, size: int
) -> optax.GradientTransformationExtraArgs:
    """Run an elementwise ``inner`` on a :class:`PackedTree` of gradients and parameters.

    Args:
        inner: A transformation that treats each element alone.
        size: The largest number of elements of a leaf that is packed.

    Returns:
        A transform whose state is that of ``inner`` over the packed tree; updates come
        back as leaves ``[*shape]``.
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, Any]:
        packed_params = None if params is None else pack(params, size)
        packed, state = inner.update(pack(updates, size), state, packed_params, **extra)
        return unpack(packed, updates, size), state

    return optax.GradientTransformationExtraArgs(
        lambda params: inner.init(pack(params, size)), update
    )


def pack(tree: Any, size: int, like: Any = None) -> PackedTree:
    """Return ``tree`` packed, laid out by the dtypes and sizes of ``like`` (or its own)."""
    leaves, structure = jax.tree.flatten(tree)
    layout = _layout(tree if like is None else like, size)
    vectors = {
        dtype: jnp.concatenate([jnp.ravel(leaves[i]) for i in places])
        for dtype, places in layout.items()
    }
    packed = {i for places in layout.values() for i in places}
    kept = [i not in packed for i in range(len(leaves))]
    return PackedTree(vectors, freeze(jax.tree.unflatten(structure, leaves), kept))


def unpack(packed: PackedTree, like: Any, size: int) -> Any:
    """Return the tree that was packed, in the structure and shapes of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    layout = _layout(like, size)
    result: list[Any] = [None] * len(leaves)
    for dtype, places in layout.items():
        ends = np.cumsum([leaves[i].size for i in places])
        for i, end in zip(places, ends, strict=True):
            piece = packed.vectors[dtype][int(end) - leaves[i].size : int(end)]
            result[i] = piece.reshape(leaves[i].shape)
    small = {i for places in layout.values() for i in places}
    large = iter(jax.tree.leaves(packed.large))
    for i in range(len(leaves)):
        if i not in small:
            result[i] = next(large)
    return jax.tree.unflatten(structure, result)


def _layout(tree: Any, size: int) -> dict[str, list[int]]:
    layout: dict[str, list[int]] = {}
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        if is_inexact(leaf) and leaf.size <= size:
            layout.setdefault(jnp.dtype(leaf.dtype).name, []).append(i)
    return layout


def unpack_state(state: Any, params: Any, size: int, *, variables: Any = None) -> Any:
    """Return the state of a run with ``pack_small_leaves=size`` as it is without.

    Args:
        state: A ``TrainOpState`` or the state of :func:`make_optimizer`.
        params: The parameters of the run; shapes are enough.
        size: The ``pack_small_leaves`` the state was made with.
        variables: The ``variables`` it was made with.

    Returns:
        The same state with ordinary leaves in place of packed vectors.

    Example:
        >>> import jax.numpy as jnp, optloss
        >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
        >>> packed = optloss.make_optimizer(0.1, "adam", pack_small_leaves=4)
        >>> plain = optloss.make_optimizer(0.1, "adam")
        >>> state = unpack_state(packed.init(params), params, 4)
        >>> jax.tree.structure(state) == jax.tree.structure(plain.init(params))
        True

    See also:
        :func:`pack_state`, the other way.
    """
    trained = freeze(params, select("unpack_state", variables, params))
    return jax.tree.map(
        lambda node: unpack(node, trained, size) if _is_packed(node) else node,
        state,
        is_leaf=_is_packed,
    )


def pack_state(state: Any, params: Any, size: int, *, variables: Any = None) -> Any:
    """Return the state of a run without packing as it is with ``pack_small_leaves=size``.

    Args:
        state: A ``TrainOpState`` or the state of :func:`make_optimizer`.
        params: The parameters of the run; shapes are enough.
        size: The ``pack_small_leaves`` of the run that is to go on from it.
        variables: The ``variables`` it was made with.

    Returns:
        The same state with every tree that mirrors the trained parameters packed. The
        ``params`` of a ``TrainOpState`` stay as they are.

    Example:
        >>> import jax.numpy as jnp, optloss
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
    trained = freeze(params, select("pack_state", variables, params))
    structure = jax.tree.structure(trained)

    def mirrors(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(
        lambda node: pack(node, size, trained) if mirrors(node) else node,
        state,
        is_leaf=mirrors,
    )


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedTree)


def is_elementwise(transform: optax.GradientTransformation) -> bool:
    """Tell whether ``transform`` gives the same updates on packed and on single leaves.

    It is tried out: three updates of small random leaves, one by one and packed.
    """
    size = max(math.prod(shape) for shape in PROBE_SHAPES)
    random = np.random.default_rng(0)
    params, *gradients = (
        {str(i): random.normal(size=shape) for i, shape in enumerate(PROBE_SHAPES)}
        for _ in range(4)
    )
    with jax.ensure_compile_time_eval():
        try:
            alone = _run(optax.with_extra_args_support(transform), params, gradients)
            packed = _run(pack_small_leaves(transform, size), params, gradients)
        except (
            Exception
        ):  # a transform of the user's own may fail in any way on a probe
            return False
    return all(
        np.allclose(one, other, rtol=1e-4, atol=1e-7)
        for one, other in zip(alone, packed, strict=True)
    )


def _run(transform: Any, params: Any, gradients: list[Any]) -> list[np.ndarray]:
    params, gradients = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32), (params, gradients)
    )

    @jax.jit
    def updates_of(params: Any, gradients: Any) -> Any:
        state, result = transform.init(params), []
        for step, gradient in enumerate(gradients):
            updates, state = transform.update(
                gradient, state, params, step=jnp.asarray(step), value=jnp.ones(())
            )
            params = optax.apply_updates(params, updates)
            result.append(updates)
        return result

    return [np.asarray(leaf) for leaf in jax.tree.leaves(updates_of(params, gradients))]

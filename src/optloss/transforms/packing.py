"""An elementwise optimizer on packed leaves.

The result is the same only where the optimizer treats each element alone. One that
looks at a leaf's shape or norm (adafactor, muon, lamb, lars) is refused, and so is one
that chooses leaves by their rank or name (a weight decay that spares the biases).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optloss.names import select
from optloss.packed import Packed, PackedTree, layout_of, pack, unpack
from optloss.trees import freeze, is_inexact

# Adafactor looks at shapes from 128 on; a mask may go by such names.
PROBE = {"embedding": (), "kernel": (129, 130), "bias": (17,), "norm_scale": (3, 5)}


def pack_small_leaves(
    inner: optax.GradientTransformation, size: int
) -> optax.GradientTransformationExtraArgs:
    """Run an elementwise ``inner`` on packed gradients and parameters.

    Args:
        inner: A transformation that treats each element alone.
        size: The largest number of elements of a leaf that is packed.

    Returns:
        A transform whose state is that of ``inner`` over a
        :class:`~optloss.packed.PackedTree`. Updates come back packed if the gradients
        were, else as leaves ``[*shape]``.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> Any:
        return inner.init(pack(params, layout_of(params, size)).tree)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        if isinstance(updates, Packed):
            layout, gradients = updates.layout, updates.tree
        else:
            # The state is laid out by the parameters; a gradient's dtype may differ.
            layout = layout_of(updates if params is None else params, size)
            gradients = pack(updates, layout).tree
        beside = None if params is None else pack(params, layout).tree
        packed: Any
        packed, state = inner.update(gradients, state, beside, **extra)
        if isinstance(updates, Packed):
            return Packed(packed, layout), state
        return unpack(packed, updates, layout), state

    return optax.GradientTransformationExtraArgs(init, update)


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
    trained = freeze(params, select("unpack_state", variables, params))
    layout = layout_of(trained, size)
    return jax.tree.map(
        lambda node: unpack(node, trained, layout) if _is_packed(node) else node,
        state,
        is_leaf=_is_packed,
    )


def pack_state(state: Any, params: Any, size: int, *, variables: Any = None) -> Any:
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
    trained = freeze(params, select("pack_state", variables, params))
    layout, shapes = layout_of(trained, size), _shapes(trained)

    def mirrors(node: Any) -> bool:
        return _shapes(node) == shapes

    return jax.tree.map(
        lambda node: pack(node, layout).tree if mirrors(node) else node,
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

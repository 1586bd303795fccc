"""Clipping of each unit's gradient by the norm of its weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.mesh import Axes, axes_of, varying_axes
from optloss.messages import check_axis_name, check_bound, check_positive, refusal
from optloss.names import (
    as_patterns,
    check_patterns,
    first_match,
    inexact_names,
    leaf_names,
)
from optloss.norms import global_norm, shrink_factor
from optloss.summaries import clip_measurements
from optloss.trees import (
    accumulator_dtype,
    increment,
    is_masked,
    merge_inexact,
    norm_dtype,
    scale_leaves,
    with_variables,
)
from optloss.typing import AxisName, Pattern, PyTree, Scalar


class AGCState(NamedTuple):
    """What was measured at the latest update, and how often it clipped.

    The factor is that of the global norm.
    """

    step: jax.Array  # int32 [], updates so far
    clipped: jax.Array  # int32 [], those in which a unit was clipped
    observed: jax.Array  # int32 [], those whose norm was finite
    norm: jax.Array  # float [], before the clip
    factor: jax.Array  # float [], global norm after the clip by global norm before it

    @property
    def uniform(self) -> bool:
        """Whether every leaf was multiplied by the factor: units have their own."""
        return False

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return clip_measurements(self)


def agc(
    clipping: Scalar = 0.01,
    *,
    epsilon: Scalar = 1e-3,
    exclude: Pattern | Collection[Pattern] = (),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink gradients that are long beside the weights they change.

    A *unit* is what one output of a layer is made of: the weights :math:`W_i` that lead
    to it, which are all elements of a leaf with the same index in its last dimension. A
    leaf with less than two dimensions, a bias or a gain, is one unit. With
    :math:`\lambda` = ``clipping`` no unit's gradient may be longer than that share of
    its weights,

    .. math:: G_i \leftarrow G_i \cdot \min\Bigl(1, \lambda
        \frac{\max(\lVert W_i \rVert, \epsilon)}{\lVert G_i \rVert}\Bigr)

    A step of gradient descent at rate 1 then moves no unit by more than ``clipping`` of
    its length. It has no history, so there is nothing that a spike could disturb.

    This is adaptive gradient clipping as NFNets are trained with. What differs from the
    authors' code, and from ``optax.adaptive_grad_clip``, which follows it:

    * A leaf may have any number of dimensions. There, of three dimensions the last two
      number the units, which is wrong for one-dimensional convolutions, and there is a
      largest number of dimensions, 4 in the code and 5 in optax 0.2.8.
    * The rule looks at the number of dimensions alone. There, a matrix with a single
      row or column counts as a vector, so that a shard of a leaf is not clipped as the
      leaf is.
    * A gradient whose global norm is not finite is returned unchanged. There, an
      infinity becomes NaN, and the units without one are clipped.
    * The norms are float32 for half-precision leaves, and right at every magnitude.

    Args:
        clipping: Largest ratio of a unit's gradient to its weights, >= 0. ``inf``
            measures and clips nothing.
        epsilon: Least norm that weights count with, so that weights that start at zero
            can move, > 0.
        exclude: Names or patterns of parameters that are not clipped. The paper leaves
            out the last linear layer.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over.

    Returns:
        A transform with an :class:`~optloss.transforms.agc.AGCState`. It needs
        ``params``. Leaves keep shape ``[*shape]`` and dtype.

    Raises:
        ValueError: If a Python number is out of its range, or ``exclude`` is neither a
            pattern nor several; at ``init``, if a pattern matches no parameter; when
            traced, if ``params`` is missing.

    Note:
        Inside ``shard_map`` types tell over which mesh axes a leaf is sharded, and not
        along which dimension. Leaves count as sharded along other dimensions than the
        last: of a leaf that is sharded along its last one, the units with the same
        place in each shard are clipped as one unit. With Auto and Explicit axes there
        is no such limit.

    Example:
        >>> import jax.numpy as jnp
        >>> clip = agc(0.5, exclude="head/*")
        >>> params = {"body": jnp.ones((4, 2)), "head": {"bias": jnp.ones(2)}}
        >>> grads = {
        ...     "body": jnp.array([[0.25, 3.0]] * 4),
        ...     "head": {"bias": jnp.full(2, 9.0)},
        ... }
        >>> clipped, _ = clip.update(grads, clip.init(params), params)
        >>> print(clipped["body"][0], clipped["head"]["bias"])
        [0.25 0.5 ] [9. 9.]

    See also:
        :func:`adagc`, which goes by the history of each leaf's norm.

    References:
        Brock, De, Smith and Simonyan, *High-Performance Large-Scale Image Recognition
        Without Normalization*, 2021, arXiv:2102.06171, section 4, and ``agc_optax.py``
        of the authors' code.
    """
    check_bound("agc", clipping=clipping)
    check_positive("agc", epsilon=epsilon)
    check_axis_name("agc", axis_name)
    patterns = as_patterns("agc", "exclude", exclude)

    def init(params: optax.Params) -> AGCState:
        # A pattern may match frozen parameters alone.
        names = leaf_names(jax.tree.map(lambda _: 0, params, is_leaf=is_masked))
        for pattern in patterns:
            check_patterns("agc, exclude", [pattern], names)
        dtype = norm_dtype(params)
        return AGCState(
            step=jnp.zeros((), jnp.int32),
            clipped=jnp.zeros((), jnp.int32),
            observed=jnp.zeros((), jnp.int32),
            norm=jnp.zeros((), dtype),
            factor=jnp.ones((), dtype),
        )

    def factor_of(unit: jax.Array, weights: jax.Array) -> jax.Array:
        bound = jnp.maximum(weights, jnp.asarray(epsilon, weights.dtype))
        bound = jnp.maximum(jnp.asarray(clipping, unit.dtype), 0) * bound
        return shrink_factor(unit, bound).astype(unit.dtype)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        gradient_norm: jax.Array | None = None,
        **extra: PyTree,
    ) -> tuple[PyTree, PyTree]:
        del extra
        if params is None:
            raise refusal(
                "agc",
                "the gradient is compared with the parameters, so "
                "update(updates, state, params) needs params.",
            )
        pairs = with_variables(updates, params)
        axes, dtype = axes_of(axis_name), state.norm.dtype
        rules = first_match(patterns, inexact_names(updates))
        leaves = [leaf for leaf, _ in pairs]
        units = [_unit_norms(leaf, axes) for leaf in leaves]
        norm = global_norm(units) if gradient_norm is None else gradient_norm
        finite, clipped, kept = jnp.isfinite(norm), jnp.array(False), list(units)
        for i, (leaf, weights) in enumerate(pairs):
            if rules[i] is None:
                factor = factor_of(units[i], _unit_norms(weights, axes))
                factor = jnp.where(finite, factor, 1)
                leaves[i], kept[i] = scale_leaves(leaf, factor), units[i] * factor
                clipped |= jnp.any(factor < 1)
        share = (global_norm(kept) / jnp.where(clipped, norm, 1)).astype(dtype)
        return merge_inexact(leaves, updates), AGCState(
            step=increment(state.step),
            clipped=state.clipped + clipped,
            observed=state.observed + finite,
            norm=jnp.asarray(norm, dtype),
            factor=jnp.where(clipped, jnp.minimum(share, 1), 1),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _unit_norms(leaf: jax.Array, axes: Axes) -> jax.Array:
    """Return the norm of each unit, with as many dimensions as the leaf has."""
    leaf = jnp.asarray(leaf)
    within = tuple(range(leaf.ndim))[: max(leaf.ndim - 1, 1)]
    sharded = varying_axes(leaf, axes)
    sizes = jnp.abs(leaf.astype(accumulator_dtype(leaf.dtype)))
    # Divided by the largest, no square overflows, and none that counts underflows.
    largest = jnp.max(jax.lax.stop_gradient(sizes), within, keepdims=True, initial=0)
    if sharded:
        largest = jax.lax.pmax(largest, sharded)
    usable = (largest > 0) & jnp.isfinite(largest)
    scale = jnp.where(usable, largest, 1)
    # At most 1 anyway, but so XLA cannot make it (x x) / (s s), which is out of reach.
    parts = jnp.minimum(sizes / scale, 2)
    total = jnp.sum(jnp.square(parts), within, keepdims=True)
    if sharded:
        total = jax.lax.psum(total, sharded)
    # Not of zero, where the square root has no derivative.
    return jnp.where(usable, scale * jnp.sqrt(jnp.where(usable, total, 1)), largest)

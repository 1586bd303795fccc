"""Clipping by a norm that follows the norms of the run."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optloss.messages import (
    check_at_least_zero,
    check_axis_name,
    check_below_one,
    check_bool,
    check_choice,
    check_number,
    check_positive,
    is_array,
    is_real_scalar,
)
from optloss.norms import global_norm
from optloss.summaries import CLIP_THRESHOLD, clip_measurements
from optloss.trees import increment, norm_dtype, scale_leaves
from optloss.typing import AxisName, PyTree

BURN_IN = 5
"""Norms that ``statistics="previous"`` wants to have seen before it cuts one."""


class AdaptiveClippingState(NamedTuple):
    """The moving averages, and what was measured at the latest update."""

    step: jax.Array  # int32 [], updates so far
    clipped: jax.Array  # int32 [], those that were clipped
    observed: jax.Array  # int32 [], those whose norm was finite
    mean: jax.Array  # float [], moving average of the log-norm
    sq_mean: jax.Array  # float [], and of its square
    max_norm: jax.Array  # float [], latest threshold; before, the largest float
    norm: jax.Array  # float [], before the clip
    factor: jax.Array  # float [], what the gradient was multiplied by

    @property
    def uniform(self) -> bool:
        """Whether every leaf was multiplied by the factor."""
        return True

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return {
            **clip_measurements(self),
            "global_norm/adaptive_max_gradient_norm": self.max_norm,
            "adaptive/mean": self.mean,
            "adaptive/sq_mean": self.sq_mean,
            CLIP_THRESHOLD: self.max_norm,
        }


class PreviousClippingState(NamedTuple):
    """As :class:`AdaptiveClippingState`, under ``statistics="previous"``.

    There a clipped norm enters the averages as clipped, so that neither way's averages
    are of use to the other. By their own names a state is never taken for the other's.
    """

    step: jax.Array  # int32 [], updates so far
    clipped: jax.Array  # int32 [], those that were clipped
    observed: jax.Array  # int32 [], those whose norm was finite
    previous_mean: jax.Array  # float [], moving average of the log-norm, as clipped
    previous_sq_mean: jax.Array  # float [], and of its square
    max_norm: jax.Array  # float [], threshold of the latest update
    norm: jax.Array  # float [], before the clip
    factor: jax.Array  # float [], what the gradient was multiplied by

    @property
    def uniform(self) -> bool:
        """Whether every leaf was multiplied by the factor."""
        return True

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return AdaptiveClippingState(*self).measurements()

    @property
    def mean(self) -> jax.Array:
        """The moving average of the log-norm."""
        return self.previous_mean

    @property
    def sq_mean(self) -> jax.Array:
        """The moving average of its square."""
        return self.previous_sq_mean


def adaptive_clipping(
    std_factor: float | jax.Array = 2.0,
    decay: float | jax.Array = 0.95,
    static_max_norm: float | jax.Array | None = None,
    *,
    epsilon: float | jax.Array = 1e-8,
    decay_warmup: bool = True,
    statistics: str = "current",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Cut gradients whose norm is far above what the run has seen so far.

    The logarithm of the gradient's norm :math:`N` is followed by two moving averages,
    of it and of its square, and a gradient whose log-norm lies more than :math:`k` =
    ``std_factor`` standard deviations above the mean is cut down *to the mean*:

    .. math::

        \ell &= \log(N + \epsilon) \\
        m &\leftarrow d\,m + (1 - d)\,\ell, \qquad
        q \leftarrow d\,q + (1 - d)\,\ell^2 \\
        c &= \exp\bigl(m + k \sqrt{\max(\epsilon, q - m^2)}\bigr) \\
        g &\leftarrow g \cdot e^m / N \quad\text{if } N \ge c

    This is TensorFlow's ``adaptive_clipping_fn``. Two things differ:

    * A norm that is not finite does not enter the averages. There, one NaN or infinity
      made every later gradient NaN.
    * ``statistics="previous"`` compares with the averages from *before* this gradient.
      The original compares with averages that contain it, so that a spike raises the
      threshold it is held against. Here every spike is cut, and what is cut enters the
      averages as the threshold, no higher: a single spike leaves hardly a trace, while
      norms that go on being high still raise the threshold step by step.

    Args:
        std_factor: How many standard deviations of the log-norm are let through, >= 0.
        decay: Factor :math:`d` of both moving averages, in [0, 1).
        static_max_norm: If given, the norm never exceeds it either, in the units of the
            gradient.
        epsilon: Added to the norm before the logarithm, and the least variance, > 0.
        decay_warmup: Whether the decay starts at 0 and grows as n / (n + 1) up to
            ``decay``, with n the extra argument ``step=`` of ``update``, or without one
            the transform's own count. Otherwise the averages start at a bare 0, as the
            original's did without a ``global_step``.
        statistics: ``"current"``, the original, or ``"previous"``: then the first five
            norms are only watched, and averages over few norms are plain ones whatever
            ``decay_warmup``.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over.

    Returns:
        A transform with an
        :class:`~optloss.transforms.adaptive_clipping.AdaptiveClippingState`, or a
        ``PreviousClippingState`` for ``statistics="previous"``. Leaves keep shape
        ``[*shape]`` and dtype; the statistics are float32 scalars ``[]``, float64 if a
        leaf is. A gradient whose norm is not finite is returned unchanged.

    Raises:
        ValueError: If a Python number is out of its range, or ``statistics`` is neither
            of the two.

    Note:
        From a constant history ``"current"`` cuts a jump only if
        :math:`d / (1 - d) > k^2`: with ``decay=0.5`` and ``std_factor=3`` it never
        does.

    Example:
        >>> import jax.numpy as jnp
        >>> clip = adaptive_clipping(statistics="previous")
        >>> state = clip.init(jnp.zeros(1))
        >>> for norm in [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1000.0]:
        ...     clipped, state = clip.update(jnp.array([norm]), state)
        >>> print(bool(clipped[0] < 1.1), int(state.clipped))
        True 1

    See also:
        :func:`clip_by_global_norm`, whose bound is fixed; :func:`zclip`,
        :func:`autoclip` and :func:`adagc`, whose bounds follow the run otherwise;
        ``optax.adaptive_grad_clip``, an unrelated algorithm (by parameter norm).

    References:
        ``tf.contrib.layers.adaptive_clipping_fn``, TensorFlow 1.15.
    """
    call = "adaptive_clipping"
    check_at_least_zero(call, std_factor=std_factor)
    check_below_one(call, "0.95 averages over some 20 updates.", decay=decay)
    if static_max_norm is not None:
        check_number(
            call,
            "static_max_norm",
            static_max_norm,
            lambda number: number >= 0,
            "a real number >= 0 or a 0-d array, or None for no fixed bound.",
        )
    check_positive(call, epsilon=epsilon)
    # `optax.inject_hyperparams` makes an array of a flag.
    is_flag = is_array(decay_warmup) and (
        is_real_scalar(decay_warmup)
        or (decay_warmup.dtype == jnp.bool_ and decay_warmup.shape == ())
    )
    if not is_flag:
        check_bool(call, "decay_warmup", decay_warmup)
    check_choice(call, "statistics", statistics, ("current", "previous"))
    check_axis_name(call, axis_name)
    previous = statistics == "previous"
    kind = PreviousClippingState if previous else AdaptiveClippingState

    def init(params: optax.Params) -> AdaptiveClippingState | PreviousClippingState:
        dtype = norm_dtype(params)
        start = AdaptiveClippingState(
            step=jnp.zeros((), jnp.int32),
            clipped=jnp.zeros((), jnp.int32),
            observed=jnp.zeros((), jnp.int32),
            mean=jnp.zeros((), dtype),
            sq_mean=jnp.zeros((), dtype),
            max_norm=jnp.full((), jnp.finfo(dtype).max, dtype),
            norm=jnp.zeros((), dtype),
            factor=jnp.ones((), dtype),
        )
        return kind(*start)

    def log_threshold(mean: jax.Array, sq_mean: jax.Array) -> jax.Array:
        return mean + std_factor * jnp.sqrt(jnp.maximum(sq_mean - mean**2, epsilon))

    def decay_at(step: jax.Array, observed: jax.Array, dtype: DTypeLike) -> jax.Array:
        rate = jnp.asarray(decay, dtype)
        warmed = jnp.minimum(rate, step / (step + jnp.ones((), dtype)))
        rate = jnp.where(decay_warmup, warmed, rate)
        return jnp.minimum(rate, observed / (observed + 1)) if previous else rate

    def follow(
        state: AdaptiveClippingState,
        norm: jax.Array,
        highest: jax.Array,
        step: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        # In float32 a tiny epsilon is 0, and one log(0) would stay in the averages.
        least = jnp.finfo(norm.dtype).tiny
        entry = jnp.log(jnp.maximum(norm + epsilon, least))
        if previous:
            entry = jnp.minimum(entry, highest)
        d = decay_at(state.step if step is None else step, state.observed, norm.dtype)

        def moved(old: jax.Array, new: jax.Array) -> jax.Array:
            after = old - (1 - d) * (old - new)
            return jnp.where(jnp.isfinite(norm), after, old).astype(norm.dtype)

        return moved(state.mean, entry), moved(state.sq_mean, entry**2)

    def factor_for(norm: jax.Array, bound: jax.Array, target: jax.Array) -> jax.Array:
        safe = jnp.where(norm > 0, norm, 1)
        factor = jnp.where(norm < bound, 1, target / safe)
        if static_max_norm is not None:
            limit = jnp.maximum(jnp.asarray(static_max_norm, norm.dtype), 0)
            factor = jnp.where(norm > limit, jnp.minimum(factor, limit / safe), factor)
        mendable = jnp.isfinite(norm) & (norm > 0)
        return jnp.where(mendable, jnp.minimum(factor, 1), 1).astype(norm.dtype)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        step: jax.Array | None = None,
        gradient_norm: jax.Array | None = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        if gradient_norm is None:
            gradient_norm = global_norm(updates, axis_name=axis_name)
        state = AdaptiveClippingState(*state)
        norm = gradient_norm.astype(state.norm.dtype)
        highest, target = log_threshold(state.mean, state.sq_mean), state.mean
        info = jnp.finfo(norm.dtype)
        # No infinity, which `jax_debug_infs` would take for a fault.
        unbounded = math.log(float(info.max)) * (1 - 2 * float(info.eps))
        if previous:
            highest = jnp.where(state.observed < BURN_IN, unbounded, highest)
        mean, sq_mean = follow(state, norm, highest, step)
        if not previous:
            highest, target = log_threshold(mean, sq_mean), mean
        bound = jnp.exp(jnp.minimum(highest, unbounded))
        bound = jnp.where(highest < unbounded, bound, info.max)
        factor = factor_for(norm, bound, jnp.exp(target))
        after = AdaptiveClippingState(
            step=increment(state.step),
            clipped=state.clipped + (factor < 1),
            observed=state.observed + jnp.isfinite(norm),
            mean=mean,
            sq_mean=sq_mean,
            max_norm=bound.astype(norm.dtype),
            norm=norm,
            factor=factor,
        )
        return scale_leaves(updates, factor), kind(*after)

    return optax.GradientTransformationExtraArgs(init, update)

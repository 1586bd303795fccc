"""Clipping of norms that are outliers by their z-score."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.messages import (
    check_axis_name,
    check_below_one,
    check_choice,
    check_positive,
    check_whole,
)
from optloss.norms import global_norm
from optloss.summaries import CLIP_THRESHOLD, clip_measurements
from optloss.trees import increment, norm_dtype, scale_leaves
from optloss.typing import AxisName, PyTree, Scalar


class ZClipState(NamedTuple):
    """The running statistics, and what was measured at the latest update."""

    step: jax.Array  # int32 [], updates so far
    clipped: jax.Array  # int32 [], those that were clipped
    observed: jax.Array  # int32 [], those whose norm was finite
    mean: jax.Array  # float [], of the norms after the clip
    std: jax.Array  # float [], and their standard deviation
    max_norm: jax.Array  # float [], threshold of the latest update
    norm: jax.Array  # float [], before the clip
    factor: jax.Array  # float [], what the gradient was multiplied by

    @property
    def uniform(self) -> bool:
        """Whether every leaf was multiplied by the factor."""
        return True

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return {**clip_measurements(self), CLIP_THRESHOLD: self.max_norm}


def zclip(
    z_threshold: Scalar = 2.5,
    alpha: Scalar = 0.97,
    *,
    warmup: Scalar = 25,
    mode: str = "adaptive",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Cut gradients whose norm is an outlier among the norms of the run so far.

    A running mean :math:`\mu` and standard deviation :math:`\sigma` of the gradient's
    norm :math:`N` say how unusual the next norm is. With :math:`k` = ``z_threshold`` a
    norm above :math:`c = \mu + k \sigma` is cut down to

    .. math:: N^* = \mu + \frac{k^2}{z} \sigma, \qquad z = \frac{N - \mu}{\sigma}

    so the larger the spike, the nearer to the mean it ends. Then the clipped norm
    enters the statistics,

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha) N^*, \qquad
        \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (N^* - \mu)^2

    with the new :math:`\mu` in the second formula. They start as the plain mean and
    standard deviation of the first ``warmup`` norms.

    This is ZClip, as its authors' code has it. What differs:

    * A norm that is not finite does not enter the statistics and does not count towards
      the warm-up. There, one NaN stays in the mean for ever.
    * Statistics that have only seen zeros clip nothing. There, a warm-up of zero
      gradients makes every later gradient zero.
    * There is no small constant in the divisions, so that gradients of any magnitude
      are treated alike.
    * The authors' ``max_grad_norm``, a fixed bound of 1 on top, is left out: put a
      ``clip_by_global_norm`` behind it where you want one. So are their ``clip_factor``
      and ``skip_update_on_spike``, which are off by default.

    Args:
        z_threshold: How many standard deviations above the mean are let through, > 0.
        alpha: Factor of both moving averages, in [0, 1).
        warmup: How many finite norms are only watched at first, >= 1.
        mode: What an outlier is cut down to. ``"adaptive"``: the nearer to the mean the
            larger it is. ``"mean"``: the mean. ``"threshold"``: the threshold.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over.

    Returns:
        A transform with a :class:`~optloss.transforms.zclip.ZClipState`. Leaves keep
        shape ``[*shape]`` and dtype; the statistics are float32 scalars ``[]``, float64
        if a leaf is. A gradient whose norm is not finite is returned unchanged.

    Raises:
        ValueError: If a Python number is out of its range, or ``mode`` is none of the
            three.

    Note:
        In the modes ``"adaptive"`` and ``"mean"`` an outlier lowers the deviation. If
        norms rise by many deviations and stay there, all of them are clipped from then
        on, and the threshold hardly moves: so it is for norms with a deviation of 10 %
        that double. The mode ``"threshold"`` follows them in some 25 updates.

    Example:
        >>> import jax.numpy as jnp
        >>> clip = zclip(warmup=6)
        >>> state = clip.init(jnp.zeros(1))
        >>> for norm in [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1000.0]:
        ...     clipped, state = clip.update(jnp.array([norm]), state)
        >>> print(f"{clipped[0]:.3f} {state.max_norm:.3f} {state.clipped}")
        1.000 1.204 1

    See also:
        :func:`adaptive_clipping`, which does the same with logarithms;
        :func:`autoclip`, :func:`adagc`.

    References:
        Kumar, Owen, Chowdhury and Güra, *ZClip: Adaptive Spike Mitigation for LLM
        Pre-Training*, 2025, arXiv:2504.02507, and the code at
        ``github.com/bluorion-com/ZClip``. The modes are its ``"zscore"`` with
        ``"adaptive_scaling"``, its ``"zscore"`` with ``"mean"``, and its
        ``"percentile"``.
    """
    check_positive("zclip", z_threshold=z_threshold)
    check_below_one("zclip", "0.97 averages over some 33 updates.", alpha=alpha)
    check_whole("zclip", 1, warmup=warmup)
    check_choice("zclip", "mode", mode, ("adaptive", "mean", "threshold"))
    check_axis_name("zclip", axis_name)

    def init(params: optax.Params) -> ZClipState:
        dtype = norm_dtype(params)
        return ZClipState(
            step=jnp.zeros((), jnp.int32),
            clipped=jnp.zeros((), jnp.int32),
            observed=jnp.zeros((), jnp.int32),
            mean=jnp.zeros((), dtype),
            std=jnp.zeros((), dtype),
            max_norm=jnp.full((), jnp.inf, dtype),
            norm=jnp.zeros((), dtype),
            factor=jnp.ones((), dtype),
        )

    def target(mean: jax.Array, margin: jax.Array, excess: jax.Array) -> jax.Array:
        if mode == "adaptive":
            return mean + margin * (margin / excess)  # k^2 / z deviations
        return mean + margin if mode == "threshold" else mean

    def follow(
        state: ZClipState, norm: jax.Array, warm: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        count = state.observed + jnp.ones((), norm.dtype)
        w = jnp.where(warm, 1 / count, jnp.asarray(1 - alpha, norm.dtype))
        # With the new mean, N - mu is (1 - w) (N - mu); the plain deviation takes both.
        away = norm - state.mean
        y = jnp.abs(away) * jnp.where(warm, jnp.sqrt(1 - w), 1 - w)
        about = jnp.hypot(jnp.sqrt(1 - w) * state.std, jnp.sqrt(w) * y)
        # That is the new deviation already, rounded alike at each update, which adds
        # up. Nothing of the kind in its difference to the old one.
        both = jnp.where(about > 0, about / 2 + state.std / 2, 1)
        std = state.std + w * (y - state.std) * ((y / 2 + state.std / 2) / both)
        finite = jnp.isfinite(norm)
        return (
            jnp.where(finite, state.mean + w * away, state.mean),
            jnp.where(finite, std, state.std),
        )

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        gradient_norm: jax.Array | None = None,
        **extra: PyTree,
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        dtype = state.norm.dtype
        if gradient_norm is None:
            gradient_norm = global_norm(updates, axis_name=axis_name)
        norm = jnp.asarray(gradient_norm, dtype)
        warm = state.observed < warmup
        margin = jnp.asarray(z_threshold, dtype) * state.std
        max_norm = jnp.where(warm | (state.mean == 0), jnp.inf, state.mean + margin)
        outside = jnp.isfinite(norm) & (norm > max_norm)
        aim = target(state.mean, margin, jnp.where(outside, norm - state.mean, 1))
        factor = jnp.where(outside, aim / jnp.where(outside, norm, 1), 1)
        factor = jnp.clip(factor, 0, 1)
        mean, std = follow(state, jnp.where(outside, factor * norm, norm), warm)
        return scale_leaves(updates, factor), ZClipState(
            step=increment(state.step),
            clipped=state.clipped + (factor < 1),
            observed=state.observed + jnp.isfinite(norm),
            mean=mean,
            std=std,
            max_norm=max_norm,
            norm=norm,
            factor=factor,
        )

    return optax.GradientTransformationExtraArgs(init, update)

"""Clipping of each leaf by the history of its own norm."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.messages import check_axis_name, check_below_one, check_number, check_whole
from optloss.norms import global_norm, leaf_norms, shrink_factor
from optloss.summaries import clip_measurements
from optloss.trees import (
    increment,
    inexact_leaves,
    merge_inexact,
    norm_dtype,
    scale_leaves,
)
from optloss.typing import AxisName, PyTree, Scalar


class AdaGCState(NamedTuple):
    """The norm that each leaf is used to, and what was measured at the latest update.

    The factor is that of the global norm.
    """

    step: jax.Array  # int32 [], updates so far
    clipped: jax.Array  # int32 [], those in which a leaf was clipped
    observed: jax.Array  # int32 [], those whose norm was finite
    means: jax.Array  # float [leaves], of each leaf's norms; inf where none is yet
    norm: jax.Array  # float [], before the clip
    factor: jax.Array  # float [], global norm after the clip by global norm before it

    @property
    def uniform(self) -> bool:
        """Whether every leaf was multiplied by the factor: leaves have their own."""
        return False

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return clip_measurements(self)


def adagc(
    relative: Scalar = 1.04,
    beta: Scalar = 0.99,
    *,
    warmup: Scalar = 100,
    absolute: Scalar = 1.0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Cut the gradient of each leaf down to what that leaf is used to.

    One layer whose gradient explodes is cut down alone, while the others keep their
    step. For every leaf :math:`i` a running mean :math:`\gamma_i` follows the norm of
    its gradient, and a gradient that is longer than :math:`\lambda` = ``relative``
    times that is cut down to it:

    .. math::

        h_i &= \min\Bigl(1, \frac{\lambda \, \gamma_i}{\lVert g_i \rVert}\Bigr), \qquad
        g_i \leftarrow h_i \, g_i \\
        \gamma_i &\leftarrow \beta \, \gamma_i + (1 - \beta) \lVert g_i \rVert

    In the second line :math:`g_i` is clipped already. The first ``warmup`` updates are
    clipped together instead, so that their global norm is at most ``absolute``, and
    :math:`\gamma_i` is the smallest norm that the leaf had after that.

    This is AdaGC. What differs from the paper and the authors' code:

    * A norm of 0 never enters. There, a leaf whose gradient is zero once in the warm-up
      has :math:`\gamma_i = 0` and gets zeros for ever: an expert that no token was sent
      to, an embedding whose words did not occur.
    * A leaf that has no history after the warm-up, because its gradient was always
      zero, is held to ``absolute`` until it has one.
    * The paper and the code disagree on what enters in the warm-up, the norm after the
      clip or before it. Here it is the norm after the clip, as in the paper.

    Args:
        relative: How many times its running mean the norm of a leaf may be, >= 1.
        beta: Factor of the moving averages, in [0, 1).
        warmup: How many updates with a finite norm are clipped together at first, >= 0.
        absolute: Bound of the global norm in the warm-up, in the units of the gradient,
            > 0. ``inf`` clips nothing there.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over. The shards of a leaf are clipped by the norm of the whole.

    Returns:
        A transform with an :class:`~optloss.transforms.adagc.AdaGCState`. Leaves keep
        shape ``[*shape]`` and dtype; the statistics are float32, float64 if a leaf is.
        A gradient whose global norm is not finite is returned unchanged and leaves the
        statistics as they were.

    Raises:
        ValueError: If a Python number is out of its range.

    Note:
        A mean rises by at most the factor :math:`1 + (1 - \beta) (\lambda - 1)` per
        update, 0.04 % at the defaults, and falls twenty-five times as fast. A leaf
        whose norm doubles for good is clipped for some 1,600 updates.

    Example:
        >>> import jax.numpy as jnp
        >>> clip = adagc(warmup=2, absolute=10.0)
        >>> state = clip.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
        >>> for norm in [2.0, 1.0, 1000.0]:
        ...     grads = {"a": jnp.array([norm]), "b": jnp.array([3.0])}
        ...     clipped, state = clip.update(grads, state)
        >>> print(clipped["a"], clipped["b"])
        [1.04] [3.]

    See also:
        :func:`agc`, which goes by the norm of the parameter;
        :func:`zclip`, which goes by the history of the global norm.

    References:
        Wang, Li, Chen et al., *AdaGC: Improving Training Stability for Large Language
        Model Pretraining*, 2025, arXiv:2502.11034, Algorithm 1, and
        ``ClipGradByAdaptiveNorm`` of the authors' PaddlePaddle code, whose defaults
        these are.
    """
    check_number(
        "adagc",
        "relative",
        relative,
        lambda number: 1 <= number < float("inf"),
        "a finite real number >= 1 or a 0-d array. Below 1 each clip would lower the "
        "bound of the next.",
    )
    check_below_one("adagc", "0.99 averages over some 100 updates.", beta=beta)
    check_whole("adagc", 0, warmup=warmup)
    check_number(
        "adagc",
        "absolute",
        absolute,
        lambda number: number > 0,
        "a real number > 0 or a 0-d array. Use inf to clip nothing in the warm-up.",
    )
    check_axis_name("adagc", axis_name)

    def init(params: optax.Params) -> AdaGCState:
        dtype = norm_dtype(params)
        return AdaGCState(
            step=jnp.zeros((), jnp.int32),
            clipped=jnp.zeros((), jnp.int32),
            observed=jnp.zeros((), jnp.int32),
            means=jnp.full(len(inexact_leaves(params)), jnp.inf, dtype),
            norm=jnp.zeros((), dtype),
            factor=jnp.ones((), dtype),
        )

    def factors_of(
        norms: jax.Array, norm: jax.Array, means: jax.Array, warm: jax.Array
    ) -> jax.Array:
        most = jnp.asarray(absolute, norms.dtype)
        own = jnp.where(jnp.isfinite(means), relative * means, most)
        factors = jnp.where(warm, shrink_factor(norm, most), shrink_factor(norms, own))
        return jnp.where(jnp.isfinite(norm), factors, 1).astype(norms.dtype)

    def follow(means: jax.Array, norms: jax.Array, warm: jax.Array) -> jax.Array:
        moved = means - jnp.asarray(1 - beta, means.dtype) * (means - norms)
        later = jnp.where(jnp.isfinite(means), moved, norms)
        return jnp.where(warm, jnp.minimum(means, norms), later)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        gradient_norm: jax.Array | None = None,
        **extra: PyTree,
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        each = leaf_norms(updates, axis_name=axis_name)
        norms = jnp.array(each, state.means.dtype)
        norm = global_norm(norms) if gradient_norm is None else gradient_norm
        norm = jnp.asarray(norm, norms.dtype)
        finite, warm = jnp.isfinite(norm), state.observed < warmup
        factors = factors_of(norms, norm, state.means, warm)
        kept = norms * factors
        clipped = jnp.any(factors < 1)
        means = jnp.where(
            finite & (kept > 0), follow(state.means, kept, warm), state.means
        )
        share = global_norm(kept) / jnp.where(clipped, norm, 1)
        pairs = zip(inexact_leaves(updates), factors, strict=True)
        scaled = [scale_leaves(leaf, factor) for leaf, factor in pairs]
        return merge_inexact(scaled, updates), AdaGCState(
            step=increment(state.step),
            clipped=state.clipped + clipped,
            observed=state.observed + finite,
            means=means,
            norm=norm,
            factor=jnp.where(clipped, jnp.minimum(share, 1), 1),
        )

    return optax.GradientTransformationExtraArgs(init, update)

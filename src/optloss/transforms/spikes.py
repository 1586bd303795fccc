"""Skipping updates whose loss or gradient is far larger than those before."""

from __future__ import annotations

import optax

from optloss.guard import guarded
from optloss.messages import check_below_one, check_positive, check_whole
from optloss.spikes import STD_FACTOR, SpikeRule
from optloss.typing import AxisName, Scalar


def skip_spikes(
    inner: optax.GradientTransformation,
    std_factor: Scalar = STD_FACTOR,
    *,
    decay: Scalar = 0.98,
    warmup: Scalar = 100,
    patience: Scalar = 20,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skip each update whose loss or gradient norm lies far above those before it.

    A skipped update changes nothing but the counters and levels of the state, as with
    :func:`skip_nonfinite`; what is not finite is skipped, too. An update is a spike if

    .. math:: \log \lVert g \rVert_2 > m + k \max(s, 0.1) \quad\text{or}\quad
        L > m_L + k \max(s_L, 0.01\, \lvert m_L \rvert)

    with :math:`k` = ``std_factor`` and the running means :math:`m` and standard
    deviations :math:`s` of the logarithm of the norm and of the loss. At the
    :math:`n`-th observation the decay is :math:`\min(d, n / (n + 1))`, counted from 0,
    so that they are plain at first. What is skipped enters neither. A value below the
    mean is no spike.

    Args:
        inner: The transform to guard: an optimizer, or a whole chain.
        std_factor: Standard deviations above the mean from which on an update is
            skipped. It and the numbers below may be traced.
        decay: Decay :math:`d` of the running means, in [0, 1).
        warmup: Updates to observe before any is skipped as a spike.
        patience: Spikes in a row after which means and deviations start afresh: a rise
            that lasts is the new level. Updates that are not finite do not count.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over, so that all devices skip or none does.

    Returns:
        A transform with a :class:`~optloss.guard.SkipSpikesState`. The loss is judged
        where ``value=`` is passed to ``update``. A norm of zero is not observed.

    Raises:
        ValueError: If ``inner`` is not a transformation or a number is out of range.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> guarded = skip_spikes(optax.sgd(0.1), warmup=10)
        >>> state = guarded.init(jnp.zeros(2))
        >>> for size in [1.0] * 10 + [100.0]:
        ...     updates, state = guarded.update(jnp.full(2, size), state)
        >>> print(updates, state.spikes)
        [-0. -0.] 1

    See also:
        ``skip_spikes=True`` of :func:`optimize_loss`, which leaves the model's state
        alone as well; :func:`zclip`, which shrinks spikes instead.
    """
    call = "skip_spikes"
    check_positive(call, std_factor=std_factor)
    check_below_one(call, "0.98 averages over some 50 updates.", decay=decay)
    check_whole(call, 1, warmup=warmup, patience=patience)
    rule = SpikeRule(std_factor, decay, warmup, patience)
    return guarded(call, inner, axis_name, rule)

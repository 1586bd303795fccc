"""Skipping updates whose loss or gradient is not finite."""

from __future__ import annotations

import optax

from optloss.guard import guarded
from optloss.typing import AxisName


def skip_nonfinite(
    inner: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Skip each update whose gradient, or loss, holds a NaN or an infinity.

    A skipped update changes nothing but the two counters of the state: the inner state
    is bit-identical to before, and the update is made of negative zeros, the only
    number that leaves every parameter as it was (``-0.0 + 0.0`` is ``0.0``, but ``-0.0
    + -0.0`` is ``-0.0``). It never gives up, however many updates in a row are skipped;
    read ``skipped/consecutive`` from :func:`get_summaries` to stop such a run.

    Args:
        inner: The transform to guard: an optimizer, or a whole chain.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over, so that all devices skip or none does.

    Returns:
        A transform with a :class:`~optloss.guard.SkipNonfiniteState`. The loss is
        judged, too, where ``value=`` is passed to ``update``. Leaves that are not
        floating or complex are passed by ``inner``.

    Raises:
        ValueError: If ``inner`` is not a transformation.

    Note:
        Gradients count as not finite when their global norm is not: a norm above the
        largest float32 is skipped, too.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> guarded = skip_nonfinite(optax.sgd(0.1))
        >>> params = jnp.array([1.0, -0.0])
        >>> state = guarded.init(params)
        >>> updates, state = guarded.update(jnp.array([jnp.nan, 1.0]), state, params)
        >>> print(optax.apply_updates(params, updates), state.total)
        [ 1. -0.] 1

    See also:
        ``skip_nonfinite=True`` of :func:`optimize_loss`, which leaves the model's state
        alone as well; ``optax.apply_if_finite``, which accepts a non-finite update
        after some in a row.
    """
    return guarded("skip_nonfinite", inner, axis_name)

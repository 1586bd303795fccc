"""Leaving out updates whose loss or gradient is not finite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.mesh import all_devices, cond_on_mesh
from optloss.messages import refusal
from optloss.norms import global_norm
from optloss.summaries import SKIPPED_CONSECUTIVE, SKIPPED_TOTAL
from optloss.trees import (
    inexact_only,
    is_inexact,
    keep_dtypes,
    negative_zeros,
    thaw,
)


class SkipNonfiniteState(NamedTuple):
    """How many updates were skipped, and the state of what is guarded."""

    total: jax.Array  # int32 [], skipped updates so far
    consecutive: jax.Array  # int32 [], skipped since the last that was not
    inner: Any

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return {SKIPPED_TOTAL: self.total, SKIPPED_CONSECUTIVE: self.consecutive}


def skip_nonfinite(
    inner: optax.GradientTransformation,
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skip each update whose gradient, or loss, holds a NaN or an infinity.

    A skipped update changes nothing but the two counters of the state: the inner state
    is bit-identical to before, and the update is made of negative zeros, the only
    number that leaves every parameter as it was (``-0.0 + 0.0`` is ``0.0``, but ``-0.0
    + -0.0`` is ``-0.0``). It never gives in, however many updates in a row are skipped;
    read ``skipped/consecutive`` from :func:`get_summaries` to stop such a run.

    Args:
        inner: The transform to guard: an optimizer, or a whole chain.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over, so that all devices skip or none does.

    Returns:
        A transform with a :class:`~optloss.transforms.nonfinite.SkipNonfiniteState`.
        The loss is judged, too, where ``value=`` is passed to ``update``. Leaves that
        are not floating or complex are passed by ``inner``.

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
        alone as well; ``optax.apply_if_finite``, which gives in after some updates.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise refusal(
            "skip_nonfinite", "inner", inner, "must be an optax transformation."
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SkipNonfiniteState:
        return start_skipping(inner.init(inexact_only(params)))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        selected = [is_inexact(leaf) for leaf in jax.tree.leaves(updates)]
        gradients = inexact_only(updates)
        trained = None if params is None else inexact_only(params)

        def commit() -> tuple[Any, Any]:
            made, after = inner.update(gradients, state.inner, trained, **extra)
            return made, keep_dtypes(after, state.inner)

        made, new_state = skip_unless(
            is_finite(global_norm(gradients, axis_name=axis_name), extra, axis_name),
            state,
            commit,
            lambda shapes: negative_zeros(shapes, gradients),
        )
        return thaw(made, updates, selected), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def start_skipping(inner: Any) -> SkipNonfiniteState:
    """Return the state before the first update around the state ``inner``."""
    return SkipNonfiniteState(
        total=jnp.zeros((), jnp.int32),
        consecutive=jnp.zeros((), jnp.int32),
        inner=inner,
    )


def is_finite(
    norm: jax.Array, extra: dict[str, Any], axis_name: str | tuple[str, ...] | None
) -> jax.Array:
    """Tell whether an update with this norm, and ``extra["value"]``, is to be made."""
    finite = jnp.isfinite(norm)
    if extra.get("value") is not None:
        finite &= all_devices(jnp.isfinite(extra["value"]), axis_name)
    return finite


def skip_unless(
    finite: jax.Array,
    state: SkipNonfiniteState,
    commit: Callable[[], tuple[Any, Any]],
    keep: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """Return ``commit()`` if ``finite``, else ``keep(shapes of it)`` and the old state.

    A branch, not a selection: at 1e7 parameters selecting between two results took
    three times as long as the update.
    """
    shapes, _ = jax.eval_shape(commit)
    result, inner = cond_on_mesh(finite, commit, lambda: (keep(shapes), state.inner))
    skipped = jnp.logical_not(finite)
    return result, SkipNonfiniteState(
        total=state.total + skipped,
        consecutive=jnp.where(skipped, state.consecutive + 1, 0),
        inner=inner,
    )

"""Skipping updates whose loss or gradient is not finite."""

import jax
import optax

from optloss.guard import (
    SkipNonfiniteState,
    count_skipped,
    is_finite,
    start_skipping,
    update_if,
)
from optloss.mesh import AxisName
from optloss.messages import argument_error, check_axis_name
from optloss.norms import global_norm
from optloss.trees import (
    inexact_only,
    is_inexact,
    is_transformation,
    merge_leaves,
    negative_zeros,
)
from optloss.typing import PyTree


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
    if not is_transformation(inner):
        raise argument_error(
            "skip_nonfinite", "inner", inner, "must be an optax transformation."
        )
    check_axis_name("skip_nonfinite", axis_name)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SkipNonfiniteState:
        return start_skipping(inner.init(inexact_only(params)))

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        value: jax.Array | None = None,
        **extra: PyTree,
    ) -> tuple[PyTree, PyTree]:
        gradients, trained = inexact_only(updates), inexact_only(params)
        if value is not None:
            extra["value"] = value

        def updated() -> tuple[PyTree, PyTree]:
            made: tuple[PyTree, PyTree] = inner.update(
                gradients, state.inner, trained, **extra
            )
            return made

        norm = global_norm(gradients, axis_name=axis_name)
        good = is_finite(norm, value, axis_name)
        nothing = negative_zeros(jax.eval_shape(updated)[0], gradients)
        made, after = update_if(good, updated, (nothing, state.inner))
        new_state = count_skipped(state, good)._replace(inner=after)
        selected = [is_inexact(leaf) for leaf in jax.tree.leaves(updates)]
        return merge_leaves(made, updates, selected), new_state

    return optax.GradientTransformationExtraArgs(init, update)

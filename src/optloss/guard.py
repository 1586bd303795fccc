"""The guard: an update is made, or everything stays as it was, bit for bit.

Whether to update is known only on the device, so both outcomes are part of the compiled
program. On a CPU a branch runs one of them: a selection between two finished results
took three times as long as the update at 1e7 parameters. On an accelerator a branch is
the slow one: the host waits for the device to choose it, and its operands are copied.
There the update is always computed, and each leaf's own kernel writes the new value or
the old one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from optloss.mesh import all_devices, cond_on_mesh, is_traced, mean_of_devices
from optloss.messages import argument_error, check_axis_name
from optloss.norms import global_norm
from optloss.spikes import Levels, SpikeRule
from optloss.trees import (
    inexact_only,
    is_transformation,
    keep_dtypes,
    merge_inexact,
    negative_zeros,
)
from optloss.typing import AxisName, PyTree

T = TypeVar("T")


class SkipNonfiniteState(NamedTuple):
    """How many updates were skipped, and the state of what is guarded."""

    total: jax.Array  # int32 [], skipped updates so far
    consecutive: jax.Array  # int32 [], skipped since the last that was not
    inner: PyTree

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return {"skipped/total": self.total, "skipped/consecutive": self.consecutive}


class SkipSpikesState(NamedTuple):
    """How many updates were skipped, what they were like, and what is guarded."""

    total: jax.Array  # int32 [], skipped updates so far
    consecutive: jax.Array  # int32 [], skipped since the last that was not
    spikes: jax.Array  # int32 [], those of the total that were finite
    levels: Levels
    inner: PyTree

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return {
            "skipped/total": self.total,
            "skipped/consecutive": self.consecutive,
            "skipped/spikes": self.spikes,
        }


GuardState: TypeAlias = SkipNonfiniteState | SkipSpikesState


def start_skipping(inner: PyTree, rule: SpikeRule | None) -> GuardState:
    """Return the state before the first update around the state ``inner``."""
    total, consecutive, spikes = (jnp.zeros((), jnp.int32) for _ in range(3))
    if rule is None:
        return SkipNonfiniteState(total, consecutive, inner)
    return SkipSpikesState(total, consecutive, spikes, rule.start(), inner)


def judge(
    state: GuardState,
    norm: jax.Array,
    loss: jax.Array | None,
    axis_name: AxisName,
    rule: SpikeRule | None,
) -> tuple[jax.Array, jax.Array, PyTree]:
    """Return whether an update is made, whether it is finite, and the state after it.

    It is judged by the norm of its gradient and, where it is known, the loss.
    """
    finite = jnp.isfinite(norm)
    if loss is not None:
        finite &= all_devices(jnp.isfinite(loss), axis_name)
    if rule is None or isinstance(state, SkipNonfiniteState):
        return finite, finite, count_skipped(state, finite)
    if loss is not None:
        loss = mean_of_devices(loss, axis_name)
    spike = finite & rule.is_spike(state.levels, norm, loss)
    good = finite & ~spike
    counted = count_skipped(state, good)._replace(
        spikes=state.spikes + spike,
        levels=rule.after(state.levels, norm, loss, good, spike),
    )
    return good, finite, counted


def count_skipped(state: GuardState, good: jax.Array) -> PyTree:
    """Return ``state`` with its counters moved on."""
    skipped = jnp.logical_not(good)
    return state._replace(
        total=state.total + skipped,
        consecutive=jnp.where(skipped, state.consecutive + 1, 0),
    )


def update_if(good: jax.Array, update: Callable[[], T], old: T) -> T:
    """Return ``update()`` if ``good``, else ``old`` bit for bit.

    Both are trees of arrays of the same structure and shapes; what is returned has the
    dtypes of ``old``.
    """

    def new() -> T:
        return keep_dtypes(update(), old)

    if not is_traced(good):
        return new() if good else old

    return jax.lax.platform_dependent(
        cpu=lambda: cond_on_mesh(good, new, lambda: old),
        default=lambda: optax.tree.where(good, new(), old),
    )


def guarded(
    call: str,
    inner: optax.GradientTransformation,
    axis_name: AxisName,
    rule: SpikeRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return ``inner`` behind a guard, which sees the loss as ``value``."""
    if not is_transformation(inner):
        problem = "must be an optax transformation."
        raise argument_error(call, "inner", inner, problem)
    check_axis_name(call, axis_name)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> GuardState:
        return start_skipping(inner.init(inexact_only(params)), rule)

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
        updated = functools.partial(
            inner.update, gradients, state.inner, trained, **extra
        )
        norm = global_norm(gradients, axis_name=axis_name)
        good, _, counted = judge(state, norm, value, axis_name, rule)
        nothing = negative_zeros(jax.eval_shape(updated)[0], gradients)
        made, after = update_if(good, updated, (nothing, state.inner))
        return merge_inexact(made, updates), counted._replace(inner=after)

    return optax.GradientTransformationExtraArgs(init, update)

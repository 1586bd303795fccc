"""The guard: an update is made, or everything stays as it was, bit for bit.

Whether to update is known only on the device, so both outcomes are part of the compiled
program. On a CPU a branch runs one of them: a selection between two finished results
took three times as long as the update at 1e7 parameters. On an accelerator a branch is
the slow one: the host waits for the device to choose it, and its operands are copied.
There the update is always computed, and each leaf's own kernel writes the new value or
the old one.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from optloss.mesh import AxisName, all_devices, cond_on_mesh, is_traced
from optloss.summaries import SKIPPED_CONSECUTIVE, SKIPPED_TOTAL
from optloss.trees import keep_dtypes
from optloss.typing import PyTree

T = TypeVar("T")


class SkipNonfiniteState(NamedTuple):
    """How many updates were skipped, and the state of what is guarded."""

    total: jax.Array  # int32 [], skipped updates so far
    consecutive: jax.Array  # int32 [], skipped since the last that was not
    inner: PyTree

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return {SKIPPED_TOTAL: self.total, SKIPPED_CONSECUTIVE: self.consecutive}


def start_skipping(inner: PyTree) -> SkipNonfiniteState:
    """Return the state before the first update around the state ``inner``."""
    return SkipNonfiniteState(
        total=jnp.zeros((), jnp.int32),
        consecutive=jnp.zeros((), jnp.int32),
        inner=inner,
    )


def is_finite(
    norm: jax.Array, loss: jax.Array | None, axis_name: AxisName
) -> jax.Array:
    """Tell whether an update with this norm of the gradient is to be made."""
    finite = jnp.isfinite(norm)
    if loss is None:
        return finite
    return finite & all_devices(jnp.isfinite(loss), axis_name)


def count_skipped(state: SkipNonfiniteState, good: jax.Array) -> SkipNonfiniteState:
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
        made: T = keep_dtypes(update(), old)
        return made

    if not is_traced(good):
        return new() if good else old

    def branch() -> T:
        chosen: T = cond_on_mesh(good, new, lambda: old)
        return chosen

    def selection() -> T:
        chosen: T = jax.tree.map(lambda a, b: jnp.where(good, a, b), new(), old)
        return chosen

    chosen: T = jax.lax.platform_dependent(cpu=branch, default=selection)
    return chosen

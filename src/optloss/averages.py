r"""A moving average of the trained parameters, often better than the latest ones.

.. math:: a \leftarrow d\, a + (1 - d)\, p

after each update, from the first parameters on. A constant decay :math:`d` is smaller
at first, :math:`\min(d, (1 + t) / (10 + t))` at the average's own update :math:`t`, as
with ``num_updates`` in TensorFlow's ``ExponentialMovingAverage``, so that the first
parameters are soon forgotten.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from optloss.extra import fill_masked
from optloss.knobs import check_schedule, is_schedule, value_at
from optloss.messages import argument_error, is_number
from optloss.trees import (
    increment,
    map_inexact,
    norm_dtype,
    own_copy,
    real_dtype,
    to_float32,
)
from optloss.typing import PyTree, Schedule

Decay: TypeAlias = float | Schedule


class AverageState(NamedTuple):
    """The average of the trained parameters."""

    step: jax.Array  # int32 [], updates of the average so far
    params: PyTree  # as the trained parameters; half-precision ones in float32


def check_decay(call: str, decay: Any) -> Any:
    """Return ``decay`` unless it is no number in [0, 1), no function and not None."""
    check_schedule(call, "moving_average", decay)
    if is_schedule(decay) or decay is None or (is_number(decay) and 0 <= decay < 1):
        return decay
    raise argument_error(
        call,
        "moving_average",
        decay,
        "must be a number in [0, 1), a function of the step, or None for no average.",
    )


def start_average(trained: PyTree) -> AverageState:
    """Return the average before the first update: the parameters themselves."""
    return AverageState(
        step=jnp.zeros((), jnp.int32), params=map_inexact(own_copy, to_float32(trained))
    )


def update_average(
    decay: Decay, state: AverageState, trained: PyTree, step: jax.Array | None
) -> AverageState:
    """Return the average after an update to ``trained``, made at ``step``.

    Without a step, a function is given the average's own.
    """
    if callable(decay):
        at = state.step if step is None else step
        share = jnp.asarray(1 - value_at("optimize_loss", "moving_average", decay, at))
    else:
        # 1 - (1 + t) / (10 + t), without the loss of digits.
        t = state.step.astype(norm_dtype(state.params))
        share = jnp.maximum(1 - decay, 9 / (10 + t))

    def follow(average: jax.Array, parameter: jax.Array) -> jax.Array:
        # The same as d a + (1 - d) p, but exact where nothing moves.
        by = share.astype(real_dtype(average.dtype))
        return average + by * (parameter.astype(average.dtype) - average)

    return AverageState(
        step=increment(state.step), params=map_inexact(follow, state.params, trained)
    )


def averaged(state: AverageState, params: PyTree) -> PyTree:
    """Return ``params`` with averages for what is trained: arrays of their own."""
    return jax.tree.map(own_copy, fill_masked(state.params, params))

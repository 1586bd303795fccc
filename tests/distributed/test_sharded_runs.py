"""Training under ``jit``, with parameters spread over eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributed.meshes import (
    AUTO,
    EXPLICIT,
    REPLICATED,
    SHARDED,
    distance,
    entered,
    line,
    loss,
    loss_on,
    make_batches,
    make_mesh,
    make_params,
    put,
)
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import optloss

KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
EVERYTHING = dict(
    gradient_noise_scale=0.05,
    gradient_multipliers={"dense/*": 0.5},
    clip_gradients=optloss.adaptive_clipping(std_factor=0.5, decay=0.8),
    learning_rate_decay_fn=functools.partial(
        optloss.exponential_decay, decay_steps=10, decay_rate=0.5
    ),
    skip_nonfinite=True,
    summaries=["loss", "learning_rate", "global_gradient_norm"],
)


def make_op(loss, **changes):
    options = {**EVERYTHING, **changes}
    return optloss.optimize_loss(loss, 0, 0.01, "adam", **options)


def poisoned_batches(dtype):
    """Twenty batches, the ninth of which holds a NaN."""
    batches = make_batches(20, dtype)
    batches[8][0][3, 5] = np.nan
    return batches


@functools.cache
def run_on_one_device(dtype):
    op = make_op(loss)
    state = op.init(make_params(dtype))
    for x, y in poisoned_batches(dtype):
        state, output = op(state, x, y)
    return state, output


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize(
    ("kind", "specs"),
    [(AUTO, SHARDED), (EXPLICIT, SHARDED), (AUTO, REPLICATED)],
    ids=["Auto, sharded", "Explicit, sharded", "data-parallel"],
)
def test_twenty_steps_equal_those_of_one_device(kind, specs, dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        expected, last = run_on_one_device(dtype)
        mesh = line(kind)
        with entered(mesh):
            op = make_op(loss_on(mesh))
            state = op.init(put(make_params(dtype), mesh, specs))
            for batch in poisoned_batches(dtype):
                state, output = op(state, *put(batch, mesh, P("data")))
        assert int(state.opt_state.total) == 1
        assert 0 < state.opt_state.inner.clip.clipped < 19
        print(distance(state.params, expected.params), distance(state.opt_state.inner.clip, expected.opt_state.inner.clip), state.opt_state.inner.clip)
        assert distance(state.params, expected.params) < tolerance
        assert distance(state.opt_state.inner.clip, expected.opt_state.inner.clip) < (
            10 * tolerance
        )
        assert distance(output.summaries, last.summaries) < 10 * tolerance


@KINDS
def test_twenty_steps_make_no_second_compilation(kind, caplog):
    pass

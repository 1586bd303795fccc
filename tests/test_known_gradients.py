"""Gradients that XLA knows while it compiles: right norms, and nothing is skipped.

A compiler may rearrange (c s)(c s) into c^2 s^2 where it knows c, and either square may
be out of reach. A parameter that the loss does not use is enough to meet it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optloss

CONSTANTS = [0.0, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e19, 1e30, 1e38]
SIZE = 8
W = np.array([1.0, -1.0] * (SIZE // 2), np.float32)  # whose loss never overflows
CLIPS = {
    "number": lambda: 1.0,
    "inf": lambda: float("inf"),
    "adaptive": optloss.adaptive_clipping,
    "previous": lambda: optloss.adaptive_clipping(statistics="previous"),
    "zclip": optloss.zclip,
    "autoclip": optloss.autoclip,
    "adagc": optloss.adagc,
    "agc": optloss.agc,
}
NORM = "OptimizeLoss/global_norm/gradient_norm"


def make(loss, clip="number", **changed):
    arguments = {
        "global_step": 0,
        "learning_rate": 0.1,
        "optimizer": "adamw(weight_decay=0.5)",
        "clip_gradients": CLIPS[clip](),
        "skip_nonfinite": True,
        "summaries": ["loss", "gradient_norm"],
    }
    return optloss.optimize_loss(loss, **(arguments | changed))


def linear(constant, params):
    """A loss whose gradient is ``constant`` everywhere, which is closed over."""
    gradient = np.full(SIZE, constant, np.float32)
    return jnp.sum(params["w"] * gradient)


def once(op, params):
    return op(op.init(params))


def by_scan(op, params):
    state, outputs = jax.lax.scan(
        lambda state, _: op.update(state), op.init(params), None, length=1
    )
    return state, jax.tree.map(lambda leaf: leaf[0], outputs)


def on_a_mesh(kind, op, params):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x")))
        return op(op.init(spread))


WAYS = {
    "jit": once,
    "scan": by_scan,
    "auto mesh": functools.partial(on_a_mesh, AxisType.Auto),
    "explicit mesh": functools.partial(on_a_mesh, AxisType.Explicit),
}


@pytest.mark.wide
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_gradient(constant, way):
    op = make(functools.partial(linear, constant))
    state, output = WAYS[way](op, {"w": jnp.asarray(W)})
    exact = np.sqrt(SIZE) * np.float64(np.float32(constant))
    flushed = 1.2e-38  # below it a CPU has zeros
    np.testing.assert_allclose(
        output.summaries[NORM], exact, rtol=1e-6, atol=flushed * 8
    )
    assert optloss.get_summaries(state)["skipped/total"] == 0
    moved = np.asarray(state.params["w"])
    assert np.all(moved != W)
    assert np.all(np.isfinite(moved))


@pytest.mark.wide
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("constant", [0.0, 1e-30, 1e30])
def test_every_clip(constant, clip):
    op = make(functools.partial(linear, constant), clip)
    state, output = once(op, {"w": jnp.ones(SIZE)})
    exact = np.sqrt(SIZE) * constant
    np.testing.assert_allclose(output.summaries[NORM], exact, rtol=1e-6)
    assert optloss.get_summaries(state)["skipped/total"] == 0
    assert np.all(np.isfinite(state.params["w"]))


def unused(params, x):
    return jnp.sum(x)


def stopped(params, x):
    return jnp.sum(jax.lax.stop_gradient(params["w"])) * jnp.sum(x)


def of_nothing(params, x):
    return jnp.sum(params["w"] * x[:0].sum())


@pytest.mark.wide
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("loss", [unused, stopped, of_nothing])
def test_a_gradient_that_is_zero(loss, clip):
    op = make(loss, clip)
    state = op.init({"w": jnp.ones(SIZE)})
    for _ in range(3):
        state, output = op(state, jnp.ones(3))
    assert output.summaries[NORM] == 0
    assert output.summaries["OptimizeLoss/gradient_norm/w"] == 0
    assert optloss.get_summaries(state)["skipped/total"] == 0
    np.testing.assert_allclose(state.params["w"], 0.95**3, rtol=1e-6)


def test_a_multiplier_of_zero():
    op = make(lambda p: jnp.sum(p["w"] ** 2), gradient_multipliers={"w": 0.0})
    state, output = once(op, {"w": jnp.ones(SIZE)})
    assert output.summaries[NORM] == 0
    assert optloss.get_summaries(state)["skipped/total"] == 0
    np.testing.assert_allclose(state.params["w"], 0.95, rtol=1e-6)

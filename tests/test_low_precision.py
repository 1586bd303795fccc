"""bfloat16 parameters: types kept, training done, single updates as in float32.

Whole runs drift from float32's, by the rounding of the parameters alone and whatever
the optimizer; so single updates are compared, and the drift is recorded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optloss import make_optimizer, optimize_loss

RATES = {
    "SGD": 0.1,
    "Momentum": 0.02,
    "Adagrad": 0.2,
    "Adam": 0.02,
    "RMSProp": 0.01,
    "Ftrl": 0.2,
    "adam": 0.02,
    "adamw": 0.02,
    "lion": 0.005,
    "adafactor": 0.05,
}
STEPS = 200
every_optimizer = pytest.mark.parametrize("optimizer", RATES)


def loss(params, x, y):
    hidden = jnp.tanh(x.astype(params["in"].dtype) @ params["in"] + params["bias"])
    return jnp.mean(((hidden @ params["out"]).astype(jnp.float32) - y) ** 2)


def parameters(dtype=jnp.bfloat16):
    random = np.random.default_rng(0)
    shapes = {"in": (6, 16), "bias": (16,), "out": (16,)}
    return {
        name: jnp.asarray(random.normal(size=shape) / 3, jnp.bfloat16).astype(dtype)
        for name, shape in shapes.items()
    }


def batches():
    random = np.random.default_rng(1)
    xs = random.normal(size=(STEPS, 32, 6)).astype(np.float32)
    return xs, np.sin(xs.sum(-1))


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@functools.cache
def trained(optimizer, dtype):
    """Return the state before and after, and the losses between."""
    train_op = optimize_loss(
        loss,
        global_step=0,
        learning_rate=RATES[optimizer],
        optimizer=optimizer,
        clip_gradients=1.0,
    )

    def body(state, batch):
        state, output = train_op.update(state, *batch)
        return state, (output.loss, state)

    start = train_op.init(parameters(dtype))
    last, (losses, states) = jax.jit(lambda s: jax.lax.scan(body, s, batches()))(start)
    return start, last, np.asarray(losses), states


@every_optimizer
def test_it_trains_and_no_type_changes(optimizer, record_property):
    start, last, losses, _ = trained(optimizer, jnp.bfloat16)
    assert kinds(last) == kinds(start)
    assert {leaf.dtype for leaf in jax.tree.leaves(last.params)} == {jnp.bfloat16}
    assert all(np.isfinite(np.float32(leaf)).all() for leaf in jax.tree.leaves(last))
    assert losses[-20:].mean() < losses[:3].mean() / 2
    _, _, wide, _ = trained(optimizer, jnp.float32)
    deviation = np.abs(losses / wide - 1)
    record_property("largest deviation from float32", f"{deviation.max():.1%}")
    print(
        optimizer,
        f"{deviation.max():.1%} {deviation.mean():.1%}",
        losses[:3].mean(),
        losses[-20:].mean(),
    )


def ulp(values):
    """The distance from one bfloat16 number to the next, near ``values``."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 1e-30))) - 7)


@every_optimizer
def test_a_single_update_is_float32s(optimizer):
    transform = make_optimizer(RATES[optimizer], optimizer, clip_gradients=1.0)
    update = jax.jit(transform.update)
    _, _, _, states = trained(optimizer, jnp.bfloat16)
    xs, ys = batches()
    worst = 0
    for at in (0, 1, 10, 100, STEPS - 2):
        state = jax.tree.map(lambda leaf, at=at: leaf[at], states)
        params = state.params
        gradients = jax.grad(loss)(params, xs[at + 1], ys[at + 1])
        wide, wide_state, wide_gradients = jax.tree.map(
            lambda leaf: (
                leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf
            ),
            (params, state.opt_state, gradients),
        )
        narrow_update, _ = update(gradients, state.opt_state, params)
        wide_update, _ = update(wide_gradients, wide_state, wide)
        for name, expected in wide_update.items():
            error = np.abs(np.float32(narrow_update[name]) - expected) / ulp(expected)
            worst = max(worst, error.max())
    print(optimizer, "worst ulp", worst)
    assert worst <= 2

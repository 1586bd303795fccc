"""bfloat16 parameters: types kept, training done, single updates as in float32.

Whole runs drift from float32's, by the rounding of the parameters alone and whatever
the optimizer; so single updates are compared, and the drift is recorded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


@pytest.mark.wide
@every_optimizer
def test_it_trains_and_no_type_changes(optimizer, record_property):
    start, last, losses, _ = trained(optimizer, jnp.bfloat16)
    assert kinds(last) == kinds(start)
    for leaf in jax.tree.leaves(last):
        assert np.isfinite(np.float32(leaf)).all()
    for leaf in jax.tree.leaves(last.params):
        assert leaf.dtype == jnp.bfloat16
    assert losses[-20:].mean() < losses[:3].mean() / 2
    _, _, wide, _ = trained(optimizer, jnp.float32)
    deviation = np.abs(losses / wide - 1).max()
    record_property("largest deviation of the loss", f"{deviation:.1%}")
    # Lion's steps are all of one length: a sign that flips is a whole step.
    assert deviation < (0.6 if optimizer == "lion" else 0.15)


def ulp(values):
    """Return the distance to the next bfloat16 number beside each of ``values``."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 1e-30))) - 7)


def in_float32(tree):
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf,
        tree,
    )


@pytest.mark.wide
@every_optimizer
def test_a_single_update_is_that_of_float32(optimizer):
    transform = make_optimizer(RATES[optimizer], optimizer)

    @jax.jit
    def step(gradients, opt_state, params):
        updates, _ = transform.update(gradients, opt_state, params)
        return updates, optax.apply_updates(params, updates)

    states = trained(optimizer, jnp.bfloat16)[-1]
    for at in (0, 1, 10, 100, STEPS - 2):
        state = jax.tree.map(lambda leaf, at=at: leaf[at], states)
        gradients = jax.grad(loss)(state.params, *(b[at + 1] for b in batches()))
        opt_state = state.opt_state._replace(clip=optax.EmptyState())
        inputs = (gradients, opt_state, state.params)
        narrow, wide = step(*inputs), step(*in_float32(inputs))
        for found, expected in zip(narrow, wide, strict=True):
            for name, exact in expected.items():
                error = np.abs(np.float32(found[name]) - exact)
                assert (error <= 2 * ulp(exact)).all()

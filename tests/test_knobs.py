"""Knobs that follow the step, against NumPy at every one of 100 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled_programs

import optloss

STEPS = 100


def scale(step):
    return 0.5 / (1.0 + step)


def rising(step):
    return 0.1 * (1.0 + step)


def falling(step):
    return 2.0 * 0.97**step


def gradients(steps=STEPS):
    return np.random.default_rng(0).normal(size=(steps, 4)).astype(np.float32)


def oracle(counter):
    """Return the parameters at each step: multiplied, clipped, descended, weighted."""
    w, path = np.zeros(4), []
    for i, gradient in enumerate(gradients()):
        t = counter + i
        g = gradient.astype(np.float64) * np.array([rising(t), rising(t), 1, 1])
        g *= min(1.0, falling(t) / np.linalg.norm(g))
        w = w - 0.1 * g * np.array([1, 1, scale(t), scale(t)])
        path.append(w)
    return np.array(path)


ARGUMENTS = {
    "gradient_multipliers": {"a": rising},
    "clip_gradients": optloss.clip_by_global_norm(falling),
    "learning_rate_multipliers": {"b": scale},
}


def loss(params, gradient):
    return jnp.dot(jnp.concatenate([params["a"], params["b"]]), gradient)


START = {"a": jnp.zeros(2), "b": jnp.zeros(2)}


def flat(params):
    return np.concatenate([params["a"], params["b"]])


@pytest.mark.parametrize("counter", [0, 7])
def test_multipliers_and_clip_follow_the_step(counter):
    train_op = optloss.optimize_loss(
        loss, global_step=counter, learning_rate=0.1, optimizer="SGD", **ARGUMENTS
    )
    state, path = train_op.init(START), []
    for gradient in gradients():
        state, _ = train_op(state, jnp.asarray(gradient))
        path.append(flat(state.params))
    np.testing.assert_allclose(path, oracle(counter), rtol=1e-4, atol=1e-5)
    assert compiled_programs(train_op) == 1


def test_without_a_step_their_own_counts_serve():
    tx = optloss.make_optimizer(0.1, "SGD", **ARGUMENTS)
    traces = []

    @jax.jit
    def step(params, state, gradient):
        traces.append(None)
        grads = {"a": gradient[:2], "b": gradient[2:]}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state, path = START, tx.init(START), []
    for gradient in gradients():
        params, state = step(params, state, gradient)
        path.append(flat(params))
    np.testing.assert_allclose(path, oracle(0), rtol=1e-4, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("counter", [0, None])
def test_noise_follows_the_step(counter):
    """The draw is that of a constant scale of 1, times the function."""
    unit = optloss.add_gradient_noise(1.0, key=3)
    ours = optloss.make_optimizer(1.0, "SGD", gradient_noise_scale=scale, seed=3)
    zeros = {"w": jnp.zeros(5)}

    def paths(i, states):
        extra = {} if counter is None else {"step": i}
        drawn, first = unit.update(zeros, states[0])
        moved, second = ours.update(zeros, states[1], zeros, **extra)
        std = optloss.get_summaries(second)["noise_std"]
        return (first, second), (drawn["w"], -moved["w"], std)

    states = unit.init(zeros), ours.init(zeros)
    _, (drawn, moved, std) = jax.lax.scan(
        lambda states, i: paths(i, states), states, jnp.arange(STEPS)
    )
    expected = np.array([scale(t) for t in range(STEPS)])
    np.testing.assert_allclose(std, expected, rtol=1e-6)
    np.testing.assert_allclose(moved, drawn * expected[:, None], rtol=1e-5)


def test_a_state_gains_counts_only_where_a_multiplier_follows_the_step():
    def leaves(multiplier):
        tx = optloss.make_optimizer(0.1, "SGD", gradient_multipliers={"a": multiplier})
        return len(jax.tree.leaves(tx.init(START)))

    assert leaves(rising) == leaves(2.0) + 1


def test_a_skipped_update_leaves_the_counts():
    tx = optloss.make_optimizer(
        1.0, "SGD", gradient_multipliers={"a": rising}, skip_nonfinite=True
    )
    state = tx.init(START)
    bad = {"a": jnp.full(2, jnp.nan), "b": jnp.ones(2)}
    _, state = tx.update(bad, state, START)
    updates, _ = tx.update({"a": jnp.ones(2), "b": jnp.ones(2)}, state, START)
    np.testing.assert_allclose(updates["a"], -0.1, rtol=1e-6)


def vector(step):
    return jnp.full(2, step, jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"gradient_noise_scale": vector},
            "optimize_loss(gradient_noise_scale=vector): must return a real scalar, "
            "returned float32[2].",
        ),
        (
            {"gradient_multipliers": {"a": vector}},
            "optimize_loss(gradient_multipliers['a']=vector): must return a real "
            "scalar, returned float32[2].",
        ),
        (
            {"gradient_noise_scale": scale, "global_step": None},
            "optimize_loss(global_step=None): global_step is required for a function "
            "as gradient_noise_scale. Start it at 0.",
        ),
        (
            {"learning_rate_multipliers": {"a": scale}, "global_step": None},
            "optimize_loss(global_step=None): global_step is required for a function "
            "as multiplier. Start it at 0.",
        ),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=r"optimize_loss\(") as refused:
        optloss.optimize_loss(
            loss,
            **(
                {"global_step": 0, "learning_rate": 0.1, "optimizer": "sgd"} | arguments
            ),
        )
    assert str(refused.value) == message


def test_a_bound_that_is_no_scalar_is_refused_when_traced():
    clip = optloss.clip_by_global_norm(vector)
    with pytest.raises(ValueError, match=r"clip_by_global_norm\(max_norm=vector\)"):
        clip.update(START, clip.init(START))

"""The moving average of the parameters, against NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optloss.averages import averaged, check_decay, start_average, update_average

RANDOM = np.random.default_rng(0)


def walk(steps, dtype=np.float32):
    """The parameters of a run, stacked."""
    moves = {"w": RANDOM.normal(size=(steps, 3)), "b": RANDOM.normal(size=steps)}
    return {name: np.cumsum(move, 0).astype(dtype) for name, move in moves.items()}


def at(run, i):
    return {name: values[i] for name, values in run.items()}


def oracle(run, decays):
    average = jax.tree.map(np.float64, at(run, 0))
    for i, decay in enumerate(decays, start=1):
        for name, values in run.items():
            average[name] = decay * average[name] + (1 - decay) * np.float64(values[i])
    return average


def follow(run, decay, steps=None):
    """The average over a run by ``scan``, whose step is counted from 100."""
    later = {name: jnp.asarray(values[1:]) for name, values in run.items()}
    count = len(later["b"])

    def update(state, batch):
        return update_average(decay, state, *batch), None

    start = start_average(at(run, 0))
    return jax.lax.scan(update, start, (later, jnp.arange(100, 100 + count)))[0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_a_number_is_warmed_up(decay):
    run = walk(201)
    state = follow(run, decay)
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(200)]
    chex.assert_trees_all_close(state.params, oracle(run, decays), rtol=1e-6, atol=1e-6)
    assert state.step == 200


def test_a_function_is_given_the_step():
    run = walk(51)
    state = follow(run, lambda step: 1 - 1 / step)
    expected = oracle(run, [1 - 1 / step for step in range(100, 150)])
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)


def test_without_a_step_its_own_count_serves():
    state = start_average(jnp.float32(3.0))
    for _ in range(4):
        state = update_average(lambda t: t / (t + 1), state, jnp.float32(7.0), None)
    assert state.params == 7.0
    assert state.step == 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_half_precision_is_averaged_in_float32(dtype):
    params = {"w": jnp.full(3, 1.0, dtype)}
    state = start_average(params)
    for value in (1.5, 2.0, 2.5):
        moved = {"w": jnp.full(3, value, dtype)}
        state = update_average(lambda step: 0.999, state, moved, None)
    wide = "complex64" if dtype == "complex64" else "float32"
    assert state.params["w"].dtype == wide
    expected = oracle({"w": np.array([1.0, 1.5, 2.0, 2.5])}, [0.999] * 3)["w"]
    np.testing.assert_allclose(state.params["w"], np.full(3, expected), rtol=1e-6)
    found = averaged(state, moved)
    assert found["w"].dtype == dtype


def test_float64_stays_float64():
    with jax.enable_x64(True):
        run = {**walk(201, np.float64), "half": np.ones(201, np.float16)}
        state = follow(run, 0.9999)
        decays = [min(0.9999, (1 + t) / (10 + t)) for t in range(200)]
        assert state.params["w"].dtype == np.float64
        assert state.params["half"].dtype == np.float32
        chex.assert_trees_all_close(state.params, oracle(run, decays), rtol=1e-12)


def test_what_does_not_move_stays_bit_for_bit():
    params = {"w": jnp.asarray(RANDOM.normal(size=1000), jnp.float32)}
    state = start_average(params)
    for _ in range(20):
        state = update_average(0.99, state, params, None)
    chex.assert_trees_all_equal(state.params, params)


def test_frozen_parameters_are_those_of_the_run():
    trained = {"w": jnp.ones(2), "table": optax.MaskedNode()}
    params = {"w": jnp.ones(2), "table": jnp.arange(3)}
    state = update_average(
        0.5, start_average(trained), {**trained, "w": 3.0 * params["w"]}, None
    )
    found = averaged(state, params)
    chex.assert_trees_all_equal(
        found, {"w": jnp.full(2, 1 + 0.9 * 2), "table": params["table"]}
    )


def test_donation_takes_nothing_from_anybody():
    params = {"w": jnp.ones(2), "table": jnp.arange(3)}
    trained = {"w": params["w"], "table": optax.MaskedNode()}
    state = start_average(trained)
    found = averaged(state, params)
    jax.jit(lambda *args: args, donate_argnums=(0, 1))(state, params)
    chex.assert_trees_all_equal(found, {"w": np.ones(2), "table": np.arange(3)})


def test_under_vmap():
    run = walk(4)
    stacked = {name: jnp.stack([values, -values]) for name, values in run.items()}
    found = jax.vmap(lambda run: follow(run, 0.9))(stacked)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[0], found), follow(run, 0.9), rtol=1e-6
    )


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), True, "0.9", jnp.ones(())])
def test_no_decay(decay):
    with pytest.raises(ValueError, match=r"optimize_loss\(moving_average=") as caught:
        check_decay("optimize_loss", decay)
    assert str(caught.value).endswith(
        ": must be a number in [0, 1), a function of the step, or None for no average."
    )


def test_a_decay_passes_as_it_is():
    assert check_decay("optimize_loss", None) is None
    assert check_decay("optimize_loss", 0.99) == 0.99
    assert check_decay("optimize_loss", jnp.tanh) is jnp.tanh


def test_a_function_takes_the_step_and_returns_a_scalar():
    def pair(step, other):
        return step

    def vector(step):
        return jnp.full(3, 0.5)

    for function, problem in {
        pair: "must be a function of the step. Its signature is (step, other).",
        vector: "must return a real scalar, returned float32[3].",
    }.items():
        with pytest.raises(ValueError, match=r".") as caught:
            check_decay("optimize_loss", function)
        assert str(caught.value) == (
            f"optimize_loss(moving_average={function.__name__}): {problem}"
        )


def test_a_function_must_return_a_scalar():
    def vector(step):
        return jnp.full(3, 0.5)

    with pytest.raises(ValueError, match=r".") as caught:
        update_average(vector, start_average(jnp.ones(())), jnp.ones(()), None)
    assert str(caught.value) == (
        "optimize_loss(moving_average=vector): must return a real scalar, returned "
        "float32[3]."
    )

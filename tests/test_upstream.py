"""The 24 cases of the original's own test file, each that has a meaning in JAX.

They are those of ``optimizers_test.py`` in TensorFlow 1.15. A test here names the case
it stands for; :data:`WITHOUT_MEANING` says why the others, or parts of them, do not.
The model is theirs: one variable of 10, the loss ``abs(variable * x)`` at x = 5 and a
rate of 0.1, so that a plain step leads to 9.5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss

WITHOUT_MEANING = {
    "testUpdateOpFromCollection": "there is no graph that collects update ops",
    "testNoGlobalStepArg": "there is no graph to look a counter up in: None means none",
    "testInvalidGlobalStep, constant": "a counter is a start value, so any int will do",
    "testGradientNoise, 9.86912": "the bits of TensorFlow's generator are its own",
    "testGradientNoiseWithClipping, 9.86912": "likewise",
}
CASES = (
    "testSGDOptimizer",
    "testNoLrCallable",
    "testWrongOptimizer",
    "testBadSummaries",
    "testInvalidLoss",
    "testInvalidGlobalStep",
    "testInvalidLearningRate",
    "testGradientNoise",
    "testGradientNoiseWithClipping",
    "testGradientClip",
    "testAdaptiveGradientClip",
    "testGradientMultiply",
    "testGradientMultiplyInt32Tensor",
    "testGradientMultiplyInt64Tensor",
    "testIgnoreVariablesWithNoGradients",
    "testNoGlobalStep",
    "testNoGlobalStepWithDecay",
    "testNoGlobalStepArg",
    "testUpdateOp",
    "testUpdateOpNoIncrementGlobalStep",
    "testUpdateOpWithNoOpDecay",
    "testUpdateOpFromCollection",
    "AdaptiveClipping.testAverages",
    "AdaptiveClipping.testClip",
)
SHOWN = set()


def case(name):
    """Mark a test as standing for the upstream case ``name``."""
    SHOWN.add(name)
    return lambda test: test


def loss(var, x):
    return jnp.abs(var * x)


def make(loss=loss, **changed):
    arguments = {"global_step": 0, "learning_rate": 0.1, "optimizer": "SGD"}
    return optloss.optimize_loss(loss, **(arguments | changed))


def one_step(train_op, *model_state):
    state, _ = train_op(train_op.init(jnp.array(10.0), *model_state), 5.0)
    return state


class GradientDescent:
    def __init__(self, learning_rate):
        self.init, self.update = optax.sgd(learning_rate)


@case("testSGDOptimizer")
@pytest.mark.parametrize(
    "optimizer",
    [
        "SGD",
        GradientDescent,
        GradientDescent(0.1),
        lambda lr: optax.sgd(lr),
        "Momentum",
    ],
)
def test_sgd_optimizer(optimizer):
    state = one_step(make(optimizer=optimizer))
    assert state.params == 9.5
    assert state.step == 1


@case("testNoLrCallable")
def test_no_lr_callable():
    state = one_step(make(learning_rate=None, optimizer=lambda: optax.sgd(0.1)))
    assert state.params == 9.5
    assert state.step == 1


@case("testWrongOptimizer")
@pytest.mark.parametrize(
    "optimizer", ["blah", jax.ShapeDtypeStruct, object(), lambda _: None]
)
def test_wrong_optimizer(optimizer):
    with pytest.raises(ValueError, match=r"^optimize_loss.*optimizer"):
        make(optimizer=optimizer)


@case("testBadSummaries")
def test_bad_summaries():
    with pytest.raises(ValueError, match="unknown: 'bad_summary'"):
        make(summaries=["loss", "bad_summary"])


@case("testInvalidLoss")
@pytest.mark.parametrize("invalid", [None, [[1.0]]])
def test_invalid_loss(invalid):
    with pytest.raises(ValueError, match=r"^optimize_loss\(loss="):
        make(loss=invalid)
    train_op = make(loss=lambda var, x: invalid)
    with pytest.raises(ValueError, match="must be a real floating scalar"):
        train_op(train_op.init(jnp.array(10.0)), 5.0)


@case("testInvalidGlobalStep")
@pytest.mark.parametrize("invalid", [jnp.array(0.0), jnp.zeros(1, jnp.int32)])
def test_invalid_global_step(invalid):
    with pytest.raises(ValueError, match=r"^optimize_loss\(global_step="):
        make(global_step=invalid)


@case("testInvalidLearningRate")
def test_invalid_learning_rate():
    with pytest.raises(ValueError, match=r"^optimize_loss\(learning_rate=-0\.1\)"):
        make(learning_rate=-0.1)


def noisy(**changed):
    """Where 4,000 runs that differ in their seed alone are after a step."""

    @jax.jit
    @jax.vmap
    def run(key):
        train_op = make(gradient_noise_scale=10.0, seed=key, **changed)
        state = train_op.init(jnp.array(10.0))
        return train_op.update(state, 5.0)[0]

    return run(jax.random.split(jax.random.key(42), 4000))


@case("testGradientNoise")
def test_gradient_noise():
    states = noisy()
    # 9.5 less a normal number of standard deviation 0.1 * 10.
    assert abs(states.params.mean() - 9.5) < 5 / np.sqrt(4000)
    assert abs(states.params.std() - 1.0) < 5 / np.sqrt(2 * 4000)
    assert (states.step == 1).all()


@case("testGradientNoiseWithClipping")
def test_gradient_noise_with_clipping():
    free, clipped = noisy().params, noisy(clip_gradients=10.0).params
    # Clipped is what the optimizer sees, noise included: within 0.1 * 10 of the start.
    np.testing.assert_allclose(clipped, jnp.clip(free, 9.0, 11.0), rtol=1e-6)
    assert 0 < (free != clipped).mean() < 1


@case("testGradientClip")
def test_gradient_clip():
    state = one_step(make(clip_gradients=0.1))
    np.testing.assert_allclose(state.params, 9.98999, atol=1e-4)
    assert state.step == 1


@case("testAdaptiveGradientClip")
def test_adaptive_gradient_clip():
    clip = optloss.adaptive_clipping(decay_warmup=False)
    state = one_step(make(clip_gradients=clip))
    np.testing.assert_allclose(state.params, 9.8916, atol=1e-4)
    assert state.step == 1
    # Two averages are kept, from which the threshold follows.
    log_norm = np.log(5.0)
    found = optloss.get_summaries(state)
    np.testing.assert_allclose(found["adaptive/mean"], 0.05 * log_norm, rtol=1e-6)
    np.testing.assert_allclose(found["adaptive/sq_mean"], 0.05 * log_norm**2, rtol=1e-6)


@case("testGradientMultiply")
def test_gradient_multiply():
    state = one_step(make(gradient_multipliers={"": 7.0}))
    assert state.params == 6.5
    assert state.step == 1


@case("testGradientMultiplyInt32Tensor")
@case("testGradientMultiplyInt64Tensor")
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.int32, np.int64, jnp.bfloat16]
)
def test_gradient_multiply_by_a_tensor(dtype):
    for multiplier in (np.array(7, dtype), jnp.asarray(np.array(7, dtype))):
        state = one_step(make(gradient_multipliers={"": multiplier}))
        assert state.params == 6.5

    @jax.jit
    def fed(multiplier):
        train_op = make(gradient_multipliers={"": multiplier})
        return train_op.update(train_op.init(jnp.array(10.0)), 5.0)[0]

    assert fed(np.array(7, dtype)).params == 6.5


@case("testIgnoreVariablesWithNoGradients")
def test_ignore_variables_with_no_gradients():
    train_op = make(
        lambda params, x: loss(params["var"], x),
        gradient_noise_scale=10.0,
        gradient_multipliers={"unused": 1.0},
        clip_gradients=10.0,
        variables="var",
    )
    params = {"var": jnp.array(10.0), "unused": jnp.array(10.0)}
    state, _ = train_op(train_op.init(params), 5.0)
    # JAX has zeros for it, not None: `variables` is what keeps the noise off.
    assert state.params["unused"] == 10.0
    assert state.params["var"] != 10.0


def update_var(model_state, context):
    del context
    return model_state + 10.0


def with_state(var, model_state, x):
    return loss(var, x), model_state


@case("testNoGlobalStep")
def test_no_global_step():
    train_op = make(with_state, global_step=None, update_ops=[update_var])
    state = one_step(train_op, 10.0)
    assert state.params == 9.5
    assert state.model_state == 20.0
    assert state.step is None


@case("testNoGlobalStepWithDecay")
def test_no_global_step_with_decay():
    message = "global_step is required for learning_rate_decay_fn"
    with pytest.raises(ValueError, match=message):
        make(global_step=None, learning_rate_decay_fn=lambda rate, step: rate)


@case("testUpdateOp")
def test_update_op():
    state = one_step(make(with_state, update_ops=[update_var]), 10.0)
    assert state.params == 9.5
    assert state.model_state == 20.0
    assert state.step == 1


@case("testUpdateOpNoIncrementGlobalStep")
def test_update_op_no_increment_global_step():
    train_op = make(with_state, update_ops=[update_var], increment_global_step=False)
    state = one_step(train_op, 10.0)
    assert state.params == 9.5
    assert state.model_state == 20.0
    assert state.step == 0


@case("testUpdateOpWithNoOpDecay")
def test_update_op_with_no_op_decay():
    def decay(rate, step):
        assert rate is not None
        assert step is not None
        return rate

    train_op = make(with_state, update_ops=[update_var], learning_rate_decay_fn=decay)
    state = one_step(train_op, 10.0)
    assert state.params == 9.5
    assert state.model_state == 20.0
    assert state.step == 1


@case("AdaptiveClipping.testAverages")
def test_adaptive_clipping_averages():
    clip = optloss.adaptive_clipping(decay=0.5, decay_warmup=False)
    gradients = {"a": jnp.full(6, 2.0), "b": jnp.full((2, 3), 2.0)}
    log_norm = 0.5 * np.log(12 * 4.0)
    state, update = clip.init(gradients), jax.jit(clip.update)
    assert state.mean == state.sq_mean == 0.0
    for step in range(20):
        _, state = update(gradients, state)
        if step == 0:
            assert state.mean < 0.9 * log_norm
    np.testing.assert_allclose(state.mean, log_norm, rtol=1e-4)
    np.testing.assert_allclose(state.sq_mean, log_norm**2, rtol=1e-4)


@case("AdaptiveClipping.testClip")
def test_adaptive_clipping_clip():
    clip = optloss.adaptive_clipping(decay=0.9)
    ones = jnp.ones(12)
    state, update = clip.init(ones), jax.jit(clip.update)
    for step in range(20):
        scale = [1.0, -2.0][step % 2]
        clipped, state = update(scale * ones, state, step=step)
        if step > 3:
            np.testing.assert_array_equal(clipped, scale * ones)
    clipped, state = update(1000.0 * ones, state, step=20)
    assert (clipped < 25.0).all()
    for step in range(21, 31):
        clipped, state = update(1000.0 * ones, state, step=step)
    np.testing.assert_array_equal(clipped, 1000.0 * ones)


def test_every_case_is_tested_or_has_no_meaning():
    left_out = {name for name in WITHOUT_MEANING if ", " not in name}
    assert len(CASES) == len(set(CASES)) == 24
    assert SHOWN | left_out == set(CASES)
    assert not SHOWN & left_out
    assert {name.partition(", ")[0] for name in WITHOUT_MEANING} <= set(CASES)

import functools
from typing import Any, NamedTuple

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from histogram_oracle import assert_equal, oracle

import optloss
from optloss.histograms import histogram
from optloss.summaries import OPTIMIZER_SUMMARIES, get_summaries


def test_the_names_are_the_originals():
    assert OPTIMIZER_SUMMARIES == (
        "learning_rate",
        "loss",
        "gradients",
        "gradient_norm",
        "global_gradient_norm",
    )


class MeasuredState(NamedTuple):
    """Stands in for a state of ours: it publishes two scalars."""

    norm: Any
    count: Any
    inner: Any

    def measurements(self):
        return {"norm": self.norm, "share": jax.lax.div(self.norm, self.count + 1.0)}


def measure(inner=None):
    inner = optax.with_extra_args_support(inner or optax.identity())

    def init(params):
        return MeasuredState(jnp.float32(0), jnp.int32(0), inner.init(params))

    def update(updates, state, params=None, **extra):
        norm = optax.tree.norm(updates)
        updates, after = inner.update(updates, state.inner, params, **extra)
        return updates, MeasuredState(norm, state.count + 1, after)

    return optax.GradientTransformationExtraArgs(init, update)


PARAMS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
MEASURED = {"norm": 5.0, "share": 2.5}

WRAPPED = {
    "alone": lambda: measure(),
    "around adam": lambda: measure(optax.adam(1e-3)),
    "chain": lambda: optax.chain(optax.identity(), measure(), optax.adam(1e-3)),
    "named_chain": lambda: optax.named_chain(
        ("clip", measure()), ("sgd", optax.sgd(1))
    ),
    "masked": lambda: optax.masked(measure(), {"w": True, "b": True}),
    "partition": lambda: optax.partition(
        {"all": optax.chain(measure(), optax.adam(1e-3))}, {"w": "all", "b": "all"}
    ),
    "MultiSteps": lambda: optax.MultiSteps(measure(), every_k_schedule=1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(measure(), optax.sgd(rate))
    )(rate=0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(measure(), 3),
    "lookahead": lambda: optax.chain(measure(), optax.trace(0.9)),
}


def updated(tx, params=PARAMS):
    return tx.update(params, tx.init(params), params)[1]


def numbers(summaries):
    for value in summaries.values():
        assert value.dtype == jnp.float32
        assert not value.weak_type
    return {tag: float(value) for tag, value in summaries.items()}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_what_was_measured_is_found_in_any_wrapping(wrapped):
    tx = WRAPPED[wrapped]()
    assert numbers(get_summaries(updated(tx))) == MEASURED
    assert numbers(jax.jit(lambda: get_summaries(updated(tx)))()) == MEASURED


def test_a_flax_train_state():
    state = flax.training.train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=optax.chain(measure(), optax.sgd(0.1))
    )
    state = state.apply_gradients(grads=PARAMS)
    assert numbers(get_summaries(state)) == MEASURED


class Weights(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.array([3.0, 4.0]))


@pytest.mark.parametrize("tx", [measure(), measure(optax.adam(1e-3))])
def test_an_nnx_optimizer(tx):
    model = Weights()
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(0.1)), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    assert numbers(get_summaries(optimizer)) == MEASURED
    assert numbers(get_summaries(optimizer.opt_state)) == MEASURED
    assert numbers(nnx.jit(get_summaries)(optimizer)) == MEASURED


def test_the_second_of_a_kind_gets_1_and_the_third_2():
    double = optax.scale(2.0)
    chain = optax.chain(measure(), double, measure(), double, measure())
    assert numbers(get_summaries(updated(chain))) == {
        "norm": 5.0,
        "share": 2.5,
        "norm_1": 10.0,
        "share_1": 5.0,
        "norm_2": 20.0,
        "share_2": 10.0,
    }


def test_an_outer_state_comes_before_those_it_holds():
    innermost = optax.chain(optax.scale(2.0), measure(), optax.adam(1e-3))
    nested = measure(optax.chain(optax.scale(2.0), measure(innermost)))
    found = numbers(get_summaries(updated(nested)))
    assert found == {
        "norm": 5.0,
        "share": 2.5,
        "norm_1": 10.0,
        "share_1": 5.0,
        "norm_2": 20.0,
        "share_2": 10.0,
    }


def test_partitions_are_told_apart():
    tx = optax.partition({"x": measure(), "y": measure()}, {"w": "x", "b": "y"})
    found = numbers(get_summaries(updated(tx)))
    assert (found["norm"], found["norm_1"]) == (3.0, 4.0)


class PublishedState(NamedTuple):
    value: Any

    def measurements(self):
        return {"value": self.value}


@pytest.mark.parametrize("dtype", ["int32", "float64", "bfloat16", "bool"])
def test_whatever_is_measured_is_published_as_float32(dtype):
    with jax.enable_x64(True):
        state = PublishedState(jnp.ones((), dtype))
        assert numbers(get_summaries(state)) == {"value": 1.0}
    assert numbers(get_summaries(PublishedState(3))) == {"value": 3.0}


def test_under_vmap_there_is_one_value_a_run():
    scales = jnp.arange(1.0, 5.0)
    tx = optax.chain(measure(), optax.adam(1e-3))

    def run(scale):
        return get_summaries(updated(tx, jax.tree.map(lambda p: p * scale, PARAMS)))

    np.testing.assert_allclose(jax.vmap(run)(scales)["norm"], 5 * scales)
    states = jax.vmap(lambda s: updated(tx, jax.tree.map(lambda p: p * s, PARAMS)))
    np.testing.assert_allclose(get_summaries(states(scales))["norm"], 5 * scales)


class Stranger:
    """No state, but it has such a method."""

    def measurements(self):
        raise AssertionError


@pytest.mark.parametrize(
    "tree", [None, {}, jnp.ones(3), optax.adam(0.1).init(PARAMS), [Stranger()]]
)
def test_where_nothing_was_measured_there_is_nothing(tree):
    assert get_summaries(tree) == {}


EVERYTHING = {
    "learning_rate",
    "global_norm/gradient_norm",
    "global_norm/clipped_gradient_norm",
    "clip_factor",
    "clipped_share",
    "global_norm/adaptive_max_gradient_norm",
    "adaptive/mean",
    "adaptive/sq_mean",
    "clip_threshold",
    "noise_std",
    "skipped/total",
    "skipped/consecutive",
}


@pytest.mark.parametrize("pack_small_leaves", [0, 100])
def test_every_tag_of_the_whole_chain_is_found(pack_small_leaves):
    tx = optloss.make_optimizer(
        0.1,
        "adam",
        gradient_noise_scale=0.5,
        clip_gradients=optloss.adaptive_clipping(),
        skip_nonfinite=True,
        pack_small_leaves=pack_small_leaves,
    )
    found = numbers(get_summaries(jax.jit(updated, static_argnums=0)(tx)))
    assert set(found) == EVERYTHING
    assert (found["learning_rate"], found["noise_std"]) == (np.float32(0.1), 0.5)
    wrapped = jax.eval_shape(optax.MultiSteps(tx, 2).init, PARAMS)
    assert set(jax.eval_shape(get_summaries, wrapped)) == EVERYTHING


class SpiedState(NamedTuple):
    gradients: Any
    rate: Any


def spy(rate):
    """Gradient descent that keeps what it was handed."""

    def init(params):
        return SpiedState(jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))

    def update(updates, state, params=None):
        descent = jax.tree.map(lambda g: -rate * g, updates)
        return descent, SpiedState(updates, jnp.asarray(rate, jnp.float32))

    return optax.GradientTransformation(init, update)


STEPS, EVERY, BOUND = 200, 7, 0.5
CURVATURE = {"w": np.linspace(0.1, 2.0, 15).reshape(5, 3), "b": np.array([0.5, 3.0])}
CURVATURE = jax.tree.map(np.float32, CURVATURE)


def bowl(params):
    energy = jax.tree.map(
        lambda c, p: jnp.sum(c * jnp.square(p)) / 2, CURVATURE, params
    )
    return energy["w"] + energy["b"], params


def train(run, rate):
    op = optloss.optimize_loss(
        bowl,
        global_step=0,
        learning_rate=0.1,
        optimizer=spy,
        clip_gradients=BOUND,
        learning_rate_decay_fn=functools.partial(
            optloss.exponential_decay, decay_steps=50, decay_rate=0.5
        ),
        summaries=OPTIMIZER_SUMMARIES,
        histogram_every=EVERY,
        donate=False,
    )
    start = jax.tree.map(lambda c: jnp.ones_like(c), CURVATURE)
    state = optloss.set_learning_rate(op.init(start), rate)

    def step(state, _):
        state, output = op.update(state)
        spied = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, SpiedState))
        (kept,) = [node for node in spied if isinstance(node, SpiedState)]
        found = (output.summaries, get_summaries(state), kept, output.aux)
        return state, found

    if run == "scan":
        return jax.jit(lambda: jax.lax.scan(step, state, length=STEPS)[1])()
    step, found = jax.jit(step), []
    for _ in range(STEPS):
        state, here = step(state, None)
        found.append(here)
    return jax.tree.map(lambda *rows: np.stack(rows), *found)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in tree.values()))


def assert_published(found, rate):
    published, measured, spied, before = jax.device_get(found)
    for i in range(STEPS):
        here, state, kept, params = jax.tree.map(
            lambda x, i=i: x[i], (published, measured, spied, before)
        )
        raw = {name: CURVATURE[name] * params[name] for name in params}
        size = norm(raw)
        expected = {
            "loss": sum(np.sum(raw[name] * params[name] / 2) for name in params),
            "learning_rate": rate * 0.5 ** (i / 50),
            "global_norm/gradient_norm": size,
            "global_norm/clipped_gradient_norm": min(size, BOUND),
            "gradient_norm/w": norm({"w": kept.gradients["w"]}),
            "gradient_norm/b": norm({"b": kept.gradients["b"]}),
        }
        for tag, value in expected.items():
            np.testing.assert_allclose(here[f"OptimizeLoss/{tag}"], value, rtol=1e-6)
        assert here["OptimizeLoss/learning_rate"] == kept.rate == state["learning_rate"]
        np.testing.assert_allclose(
            state["clip_factor"], min(1, BOUND / size), rtol=1e-6
        )
        for name, gradient in kept.gradients.items():
            looked_at = oracle(gradient) if i % EVERY == 0 else histogram(None)
            assert_equal(here[f"OptimizeLoss/gradients/{name}"], looked_at)


@pytest.mark.wide
@pytest.mark.parametrize("run", ["jit", "scan"])
def test_published_values_equal_numpys_over_200_updates(run):
    assert_published(train(run, 0.1), 0.1)


@pytest.mark.wide
def test_published_values_equal_numpys_under_vmap_of_four_rates():
    rates = np.float32([0.02, 0.05, 0.1, 0.3])
    found = jax.vmap(functools.partial(train, "scan"))(rates)
    for i, rate in enumerate(rates):
        assert_published(jax.tree.map(lambda x, i=i: x[i], found), rate)


def decayed(step):
    return 0.5 ** (step / 4)


RATES = {
    "a number": ({"learning_rate": 0.1}, lambda step: 0.1),
    "an array": ({"learning_rate": jnp.array(0.1)}, lambda step: 0.1),
    "a decay": (
        {"learning_rate": 0.1, "learning_rate_decay_fn": lambda r, s: r * decayed(s)},
        lambda step: 0.1 * decayed(step),
    ),
    "a schedule": (
        {"learning_rate": optax.linear_schedule(0.1, 0.02, 8, transition_begin=5)},
        lambda step: np.interp(step, [5, 13], [0.1, 0.02]),
    ),
}


@pytest.mark.parametrize("case", RATES)
def test_the_rate_published_is_the_one_the_optimizer_was_handed(case):
    arguments, expected = RATES[case]
    op = optloss.optimize_loss(bowl, 3, optimizer=spy, **arguments)
    state = op.init(jax.tree.map(jnp.ones_like, CURVATURE))
    factor = 1.0
    for step in range(3, 15):
        if step == 9 and not callable(arguments["learning_rate"]):
            factor = 4.0
            state = optloss.set_learning_rate(state, 0.4)
        state, output = op(state)
        handed = state.opt_state.optimizer.inner.rate
        published = output.summaries["OptimizeLoss/learning_rate"]
        assert published == handed == get_summaries(state)["learning_rate"]
        np.testing.assert_allclose(handed, factor * expected(step), rtol=1e-6)


def test_an_optimizer_that_watches_the_loss_is_shown_it():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    op = optloss.optimize_loss(
        lambda w, level: w - jax.lax.stop_gradient(w) + level,
        global_step=0,
        learning_rate=0.25,
        optimizer=lambda rate: optax.chain(optax.sgd(rate), plateau),
        clip_gradients=1.0,
        skip_nonfinite=True,
    )
    state, moves = op.init(jnp.array(10.0)), []
    # The second level in a row that is no better than 3 halves the steps.
    for level in (5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 2.0):
        before = float(state.params)
        state, output = op(state, level)
        moves.append(before - float(state.params))
        assert output.loss == level
        assert output.summaries["OptimizeLoss/learning_rate"] == moves[-1]
    assert moves == [0.25] * 4 + [0.125] * 3

"""The training op: one compilation, a state of its own, and what the loss may be."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optloss

X = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25]])
Y = jnp.array([1.0, -2.0, 0.5])


def parameters():
    return {"w": jnp.array([0.5, -1.0]), "b": jnp.array(0.25)}


def square(params, x=X, y=Y):
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def make(loss=square, **changed):
    arguments = {"global_step": 0, "learning_rate": 0.1, "optimizer": "SGD"}
    return optloss.optimize_loss(loss, **(arguments | changed))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def kinds(tree):
    return jax.tree.structure(tree), [
        (leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)
    ]


EVERYTHING = {
    "optimizer": "Adam",
    "gradient_noise_scale": 0.01,
    "gradient_multipliers": {"b": 2.0},
    "clip_gradients": optloss.adaptive_clipping(),
    "learning_rate_decay_fn": lambda rate, step: rate * 0.99**step,
    "learning_rate_multipliers": {"w": 0.5},
    "summaries": ["loss", "learning_rate", "global_gradient_norm"],
    "skip_nonfinite": True,
}


@pytest.mark.wide
def test_ten_thousand_calls_and_a_new_rate_cost_one_compilation():
    traces = []

    def counted(params, x):
        traces.append(None)
        return square(params, x)

    train_op = make(counted, **EVERYTHING)
    state = train_op.init(parameters())
    for step in range(10_000):
        if step == 5_000:
            before = state.opt_state
            state = optloss.set_learning_rate(state, 0.0)
            assert kinds(before) == kinds(state.opt_state)
            kept = bits(state.params)
        state, output = train_op(state, X)
    assert len(traces) == 1
    assert state.step == 10_000
    assert bits(state.params) == kept
    assert output.summaries["OptimizeLoss/learning_rate"] == 0.0


def test_a_new_rate_is_the_one_before_the_decay_and_works_anywhere():
    train_op = make(learning_rate_decay_fn=lambda rate, step: rate / (1 + step))
    state = train_op.init(parameters())
    state, _ = train_op(state)
    gradients = jax.grad(square)(state.params)
    expected = state.params["w"] - 0.8 / 2 * gradients["w"]

    @jax.jit
    def at_rate(state, rate):
        return train_op.update(optloss.set_learning_rate(state, rate))

    traced, _ = at_rate(state, 0.8)
    bare = optloss.set_learning_rate(state.opt_state, np.float64(0.8))
    state, _ = train_op(state._replace(opt_state=bare))
    np.testing.assert_allclose(state.params["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(traced.params["w"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [{"optimizer": optax.sgd(0.1)}, {"learning_rate": optax.constant_schedule(0.1)}],
)
def test_there_is_no_rate_to_set_in_an_instance_or_a_schedule(arguments):
    state = make(**arguments).init(parameters())
    with pytest.raises(ValueError, match="base rate") as refused:
        optloss.set_learning_rate(state, 0.1)
    assert str(refused.value) == (
        "set_learning_rate(TrainOpState): the state holds no base rate. An optimizer "
        "given as an instance keeps its own rate, and a schedule has none: give a "
        "number as learning_rate, and the optimizer by name or as a function; a rate "
        "that decays by learning_rate_decay_fn. What a schedule gave the latest update "
        "is get_summaries(state)['learning_rate']."
    )


def plain_state(train_op):
    return train_op.init(parameters())


def message_of(call, *args, **kwargs):
    with pytest.raises(ValueError, match=r".") as refused:
        call(*args, **kwargs)
    return str(refused.value)


def test_mistake_params_instead_of_a_state():
    train_op = make()
    for call in (train_op, train_op.update):
        assert message_of(call, parameters(), X) == (
            "train_op(state={'w': float32[2], 'b': float32[]}): the first argument "
            "must be a TrainOpState. Make one with state = train_op.init(params)."
        )


def test_mistake_a_pair_instead_of_a_state():
    train_op = make()
    pair = train_op(train_op.init(parameters()))
    assert message_of(train_op, pair) == (
        "train_op(state=(TrainOpState(step=int32[], params={'b': float32[], 'w': ...): "
        "the first argument must be a TrainOpState. Take the pair apart: state, "
        "output = train_op(state, ...)."
    )


def test_mistake_an_output_instead_of_a_state():
    train_op = make()
    _, output = train_op(train_op.init(parameters()))
    assert message_of(train_op, output).endswith(
        "the first argument must be a TrainOpState. It stands first: state, output = "
        "train_op(state, ...)."
    )


def test_mistake_an_op_instead_of_its_state():
    train_op = make()
    pass_the_state = "pass the one that it returned, or op.state."
    assert "is no state. Pass the one" in message_of(optloss.get_summaries, train_op)
    assert pass_the_state in message_of(optloss.get_learning_rate, train_op)
    assert pass_the_state in message_of(optloss.set_learning_rate, train_op, 0.1)


@pytest.mark.parametrize(
    "look",
    [optloss.get_summaries, optloss.get_learning_rate, "averaged", "evaluation_params"],
)
def test_mistake_a_look_at_a_donated_state(look):
    train_op = make(moving_average=0.9, clip_gradients=1.0)
    state = train_op.init(parameters())
    train_op(state)
    look = getattr(train_op, look) if isinstance(look, str) else look
    assert "this state was given to an earlier call" in message_of(look, state)


def test_mistake_a_forgotten_model_state():
    def loss(params, model_state, x):
        return square(params, x), model_state

    train_op = make(loss)
    assert message_of(train_op, train_op.init(parameters()), X) == (
        "optimize_loss: the loss loss(params, model_state, x) cannot be called with "
        "(params) and 1 argument more: missing a required argument: 'x'. If it takes a "
        "model_state, pass it: train_op.init(params, model_state)."
    )


def test_mistake_a_model_state_too_many():
    def loss(params):
        return square(params)

    train_op = make(loss)
    assert message_of(train_op, train_op.init(parameters(), {})) == (
        "optimize_loss: the loss loss(params) cannot be called with (params, "
        "model_state) and 0 arguments more: too many positional arguments. If it takes "
        "no model_state, call train_op.init(params) without one."
    )


def test_mistake_a_state_used_again_after_it_was_donated():
    train_op = make()
    state = train_op.init(parameters())
    train_op(state)
    assert message_of(train_op, state) == (
        "train_op(state): this state was given to an earlier call, which donated its "
        "buffers. Go on from the state that call returned, or build the op with "
        "donate=False."
    )
    kept = make(donate=False)
    state = kept.init(parameters())
    first, _ = kept(state)
    second, _ = kept(state)
    assert bits(first) == bits(second)


def test_mistake_adaptive_clipping_without_parentheses():
    assert message_of(make, clip_gradients=optloss.adaptive_clipping) == (
        "optimize_loss(clip_gradients=adaptive_clipping): is a function that makes a "
        "clip. Call it: adaptive_clipping(...)."
    )


def test_mistake_a_name_of_tensorflow():
    train_op = make(gradient_multipliers={"w:0": 2.0})
    assert message_of(train_op.init, parameters()) == (
        "optimize_loss, gradient_multipliers: the pattern 'w:0' matches no parameter: "
        "names have no ':0' ending here. Write 'w'."
    )


def test_mistake_a_loss_that_returns_a_vector():
    train_op = make(lambda params: (X @ params["w"] - Y) ** 2)
    assert message_of(train_op, train_op.init(parameters())) == (
        "optimize_loss: the loss must be a real floating scalar, got float32[3]. "
        "Reduce it first, for example with loss.mean()."
    )


def test_mistake_strings_among_the_parameters():
    train_op = make()
    expected = (
        "optimize_loss: the parameter 'kind' is no array but 'dense'. Keep such leaves "
        "outside, for example with params, static = eqx.partition(model, "
        "eqx.is_inexact_array), and combine them inside the loss."
    )
    for call in (train_op.init, train_op.tx.init, train_op.describe):
        assert message_of(call, parameters() | {"kind": "dense"}) == expected


def test_an_error_of_the_losss_own_is_left_alone():
    def loss(params):
        raise RuntimeError("a deleted file")

    train_op = make(loss)
    with pytest.raises(RuntimeError, match=r"^a deleted file"):
        train_op(train_op.init(parameters()))


def test_the_callers_arrays_survive_init_and_a_donated_step():
    params, key = parameters(), jax.random.PRNGKey(3)
    model_state, rate, start = {"n": jnp.zeros(2)}, jnp.array(0.1), jnp.array(5)
    before = bits((params, key, model_state, rate, start))
    train_op = make(
        lambda params, model_state: (square(params), model_state),
        learning_rate=rate,
        global_step=start,
        gradient_noise_scale=0.1,
        seed=key,
    )
    for _ in range(2):
        state = train_op.init(params, model_state)
        state, _ = train_op(state)
        train_op(state)
    assert bits((params, key, model_state, rate, start)) == before


def test_the_state_is_the_same_kind_of_thing_after_a_step():
    def loss(params, model_state):
        return square(params), {"mean": 0.5 * model_state["mean"], "step": 3}

    train_op = make(loss, **EVERYTHING)
    # Python's numbers, and weak types, become ordinary arrays at the start.
    state = train_op.init(
        {"w": jnp.array([0.5, -1.0]), "b": 0.25}, {"mean": 2.0, "step": 1}
    )
    first = kinds(state)
    assert not any(weak for _, _, weak in first[1])
    for _ in range(2):
        state, _ = train_op(state)
        assert kinds(state) == first
    jax.lax.scan(lambda state, _: train_op.update(state), state, length=2)
    assert state.model_state["mean"] == 0.5
    assert state.params["b"] != 0.25


@pytest.mark.parametrize("guarded", [False, True])
def test_weak_types_and_scalars_from_elsewhere_do_not_change_the_result(guarded):
    train_op = make(skip_nonfinite=guarded, donate=False)
    state = train_op.init(parameters())
    weak = state._replace(params={"w": state.params["w"], "b": jnp.asarray(0.25)})
    assert weak.params["b"].weak_type
    assert bits(train_op(state)[0]) == bits(train_op(weak)[0])


def test_the_loss_is_that_before_the_update_and_aux_comes_along():
    class Aux(NamedTuple):
        prediction: jax.Array
        count: int

    def loss(params, x, *, y):
        prediction = x @ params["w"] + params["b"]
        return jnp.mean((prediction - y) ** 2), Aux(prediction, 3)

    train_op = make(loss)
    state, output = train_op(train_op.init(parameters()), X, y=Y)
    np.testing.assert_allclose(output.loss, square(parameters()), rtol=1e-6)
    prediction = X @ parameters()["w"] + parameters()["b"]
    np.testing.assert_allclose(output.aux.prediction, prediction, rtol=1e-6)
    assert output.aux.count == 3
    assert square(state.params) < output.loss


def test_only_a_tuple_counts_as_several_results():
    class Pair(NamedTuple):
        loss: jax.Array
        other: jax.Array

    train_op = make(lambda params: Pair(square(params), X))
    assert message_of(train_op, train_op.init(parameters())).startswith(
        "optimize_loss: the loss must be a real floating scalar, got "
    )


def test_a_constant_loss_moves_nothing():
    train_op = make(lambda params: 1.5)
    state, output = train_op(train_op.init(parameters()))
    assert output.loss == 1.5
    assert bits(state.params) == bits(parameters())


def counted(params, model_state):
    return square(params), {"n": model_state["n"] + 1}, "seen"


def test_the_losss_model_state_is_adopted_before_the_ops_run():
    def note(model_state, context):
        del context
        return {"n": 10 * model_state["n"]}

    train_op = make(lambda *args: counted(*args)[:2], update_ops=[note])
    state = train_op.init(parameters(), {"n": jnp.array(0)})
    found = []
    for _ in range(3):
        state, _ = train_op(state)
        found.append(int(state.model_state["n"]))
    assert found == [10, 110, 1110]


def test_a_loss_may_leave_the_model_state_to_the_ops():
    def note(model_state, context):
        return {
            "step": context.step,
            "loss": context.loss,
            "w": context.params["w"],
            "none": model_state["none"],
        }

    train_op = make(lambda params, model_state: square(params), update_ops=[note])
    start = {"step": 7, "loss": 0.0, "w": jnp.zeros(2), "none": None}
    before = train_op.init(parameters(), start)
    state, output = jax.jit(train_op.update)(before)
    assert state.model_state["step"] == 0
    assert bits(state.model_state["loss"]) == bits(output.loss)
    assert bits(state.model_state["w"]) == bits(state.params["w"])


def test_an_op_sees_the_aux_and_no_step_where_there_is_none():
    contexts = []

    def look(model_state, context):
        contexts.append(context)
        return model_state

    def loss(params, model_state):
        return square(params), model_state, {"three": 3}

    train_op = make(loss, update_ops=(look,), global_step=None)
    train_op.update(train_op.init(parameters(), jnp.zeros(())))
    (context,) = contexts
    assert context.step is None
    assert context.aux == {"three": 3}
    assert isinstance(context, optloss.UpdateContext)


def test_an_empty_model_state_counts_as_one():
    train_op = make(lambda params, model_state: (square(params), model_state))
    state, _ = train_op(train_op.init(parameters(), {}))
    assert state.model_state == {}


def test_random_keys_may_be_part_of_the_state():
    def loss(params, model_state):
        key, sub = jax.random.split(model_state["key"])
        value = square(params) + jax.random.normal(sub)
        return value, model_state | {"key": key}

    train_op = make(loss, skip_nonfinite=True)
    start = {"key": jax.random.key(0), "old": jax.random.PRNGKey(1)}
    state, first = train_op(train_op.init(parameters(), start))
    _, second = train_op(state)
    assert first.loss != second.loss
    # Those among the parameters are not trained.
    keyed = make(lambda params: jax.random.normal(params["key"]) * params["w"])
    params = {"w": jnp.array(1.0), "key": jax.random.key(4)}
    state, _ = keyed(keyed.init(params))
    assert state.params["key"] == params["key"]
    np.testing.assert_allclose(
        state.params["w"], 1 - 0.1 * jax.random.normal(params["key"]), rtol=1e-6
    )


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(2, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.dense(x)))))


def test_an_nnx_module_is_merged_in_the_loss_without_a_copy():
    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, model_state, x, y):
        model = nnx.merge(graphdef, params, model_state)
        value = jnp.mean((model(x)[:, 0] - y) ** 2)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    train_op = make(loss, optimizer="adam", learning_rate_multipliers={"head/*": 0.5})
    state = train_op.init(params, rest)
    mean = np.asarray(state.model_state["norm"]["mean"][...])
    for _ in range(3):
        state, output = train_op(state, X, Y)
    assert state.model_state["drop"]["rngs"]["count"][...] == 3
    assert not np.allclose(state.model_state["norm"]["mean"][...], mean)
    assert np.isfinite(output.loss)


def test_an_equinox_module_is_trained_by_its_names():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, y):
        found = jax.vmap(eqx.combine(params, static))(x)[:, 0]
        return jnp.mean((found - y) ** 2)

    train_op = make(loss, variables="layers/1/**")
    state = train_op.init(params)
    for _ in range(3):
        state, output = train_op(state, X, Y)
    assert bits(state.params.layers[0]) == bits(params.layers[0])
    assert not np.allclose(state.params.layers[1].weight, params.layers[1].weight)
    assert output.loss < loss(params, X, Y)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "adam"])
def test_complex_leaves_descend(optimizer):
    aim = jnp.array([1 + 2j, -1j])
    train_op = make(
        lambda z: jnp.sum(jnp.abs(z - aim) ** 2),
        optimizer=optimizer,
        clip_gradients=5.0,
    )
    state = train_op.init(jnp.array([3 + 4j, 2 - 1j]))
    for _ in range(150):
        state, _ = train_op(state)
    np.testing.assert_allclose(state.params, aim, atol=2e-2)


def test_leaves_that_are_no_floats_come_back_as_they_were():
    table = {
        "table": jnp.array([1, 0]),
        "flags": jnp.array([True, False]),
        "none": None,
        "number": 3,
    }
    train_op = make(
        lambda p: jnp.sum(p["w"][p["table"]] * p["flags"]) * p["number"],
        **EVERYTHING | {"gradient_multipliers": {}, "gradient_noise_scale": None},
    )
    state = train_op.init({"w": jnp.ones(2)} | table)
    state, _ = train_op(state)
    assert bits({name: state.params[name] for name in table}) == bits(
        jax.tree.map(jnp.asarray, table)
    )
    assert state.params["w"][0] == 1.0
    assert state.params["w"][1] != 1.0


def test_a_skipped_update_changes_nothing_but_the_step_and_the_counters():
    def loss(params, model_state, scale):
        value = jnp.sum(jnp.abs(params["w"]) * scale) + params["zero"]
        return value, {"n": model_state["n"] + 1}

    train_op = make(
        loss, **EVERYTHING | {"gradient_multipliers": {}}, update_ops=[add_hundred]
    )
    start = {"w": jnp.array([1.0, -2.0]), "zero": jnp.array(-0.0)}
    state, _ = train_op(train_op.init(start, {"n": jnp.array(0)}), 1.0)
    undisturbed, _ = train_op(jax.tree.map(jnp.copy, state), 1.0)
    before = jax.tree.map(np.asarray, state)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        state, output = train_op(state, bad)
        assert not np.isfinite(output.loss)
    assert state.step == before.step + 3
    assert state.opt_state.total == state.opt_state.consecutive == 3
    changed = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before),
            jax.tree.leaves(state),
            strict=True,
        )
        if old.tobytes() != np.asarray(new).tobytes()
    ]
    assert changed == [".step", ".opt_state.total", ".opt_state.consecutive"]
    # The noise that would have been drawn is drawn next, at the later step's rate.
    at_the_old_step = state._replace(step=jnp.asarray(before.step))
    state, _ = train_op(at_the_old_step, 1.0)
    assert bits(state.params) == bits(undisturbed.params)
    assert state.opt_state.total == 3
    assert state.opt_state.consecutive == 0


def add_hundred(model_state, context):
    del context
    return {"n": model_state["n"] + 100}


def test_a_negative_zero_survives_a_skipped_update():
    train_op = make(lambda w: jnp.sum(w) * jnp.nan, skip_nonfinite=True)
    state, _ = train_op(train_op.init(jnp.array([-0.0, 1.0])))
    assert np.signbit(state.params[0])


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped():
    train_op = make(lambda w: jnp.sum(jnp.sqrt(w)), skip_nonfinite=True)
    state, output = train_op(train_op.init(jnp.array([0.0, 4.0])))
    assert output.loss == 2.0
    assert state.opt_state.total == 1
    np.testing.assert_array_equal(state.params, [0.0, 4.0])


def test_without_the_guard_a_nan_passes():
    train_op = make(lambda w: jnp.sum(w) * jnp.nan, clip_gradients=1.0)
    state, _ = train_op(train_op.init(jnp.array([1.0])))
    assert np.isnan(state.params[0])


def test_init_may_be_traced():
    train_op = make(**EVERYTHING)
    params = parameters()
    plain = train_op.init(params)
    shapes = jax.eval_shape(train_op.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(plain)
    assert [s.shape for s in jax.tree.leaves(shapes)] == [
        leaf.shape for leaf in jax.tree.leaves(plain)
    ]
    jitted = jax.jit(train_op.init)(params)
    assert kinds(jitted) == kinds(plain)
    assert bits(jitted) == bits(plain)
    assert bits(train_op(jitted)[0]) == bits(train_op(plain)[0])


def test_many_runs_train_at_once_under_vmap():
    train_op = make()
    starts = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.zeros(3)}
    states = jax.vmap(train_op.init)(starts)
    states, outputs = jax.jit(jax.vmap(train_op.update))(states)
    alone = train_op.init(jax.tree.map(lambda leaf: leaf[1], starts))
    alone, output = train_op(alone)
    np.testing.assert_allclose(states.params["w"][1], alone.params["w"], rtol=1e-6)
    np.testing.assert_allclose(outputs.loss[1], output.loss, rtol=1e-6)
    np.testing.assert_array_equal(states.step, [1, 1, 1])


def test_a_step_can_be_differentiated():
    """The outer gradient of a training step: learning to learn."""
    train_op = make(clip_gradients=10.0)
    state = train_op.init(parameters())

    def after(rate):
        moved, _ = train_op.update(optloss.set_learning_rate(state, rate))
        return square(moved.params)

    rate, nearby = 0.05, 1e-3
    slope = (after(rate + nearby) - after(rate - nearby)) / (2 * nearby)
    np.testing.assert_allclose(jax.grad(after)(rate), slope, rtol=1e-2)


def test_repr_is_the_pipeline_in_order():
    assert repr(make(**EVERYTHING | {"learning_rate_decay_fn": None})) == (
        "OptimizeLoss: gradient -> add_gradient_noise(0.01) -> gradient_multipliers(1 "
        "rule) -> adaptive_clipping -> Adam (TensorFlow) at 0.1 -> "
        "learning_rate_multipliers(1 rule) -> step + 1 (skipped if not finite)"
    )
    decay = functools.partial(optloss.exponential_decay, decay_steps=9, decay_rate=0.5)
    assert repr(make(name="Mine", learning_rate_decay_fn=decay)) == (
        "Mine: gradient -> SGD (TensorFlow) at 0.1 decayed by "
        "exponential_decay(decay_steps=9, decay_rate=0.5) -> step + 1"
    )
    assert repr(make(name="", global_step=None, optimizer=optax.sgd)) == (
        "gradient -> sgd at 0.1"
    )
    assert repr(make(increment_global_step=False, optimizer=optax.sgd(0.1))) == (
        "OptimizeLoss: gradient -> optax.chain(identity, scale) at its own rate"
    )

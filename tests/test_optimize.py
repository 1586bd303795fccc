"""Every accepted form of every argument, called and under ``lax.scan``."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss
from optloss.histograms import Histogram

STEPS = 3
TARGET = np.float32([[1.0, -2.0], [0.5, 4.0]])


def parameters():
    return {"w": jnp.array([[0.5, -1.0], [2.0, 3.0]]), "b": jnp.array([-3.0, 0.25])}


def loss(params, x):
    return 0.5 * (jnp.sum((params["w"] - x) ** 2) + jnp.sum(params["b"] ** 2))


def descend(
    rate=lambda step: 0.1,
    shape=lambda gradients: gradients,
    multipliers=None,
    momentum=0.0,
    steps=STEPS,
):
    """The same training in NumPy: what the parameters must be at the end."""
    params = {name: np.float64(leaf) for name, leaf in parameters().items()}
    trace = dict.fromkeys(params, 0.0)
    for step in range(steps):
        gradients = shape({"w": params["w"] - TARGET, "b": params["b"]})
        for name, g in gradients.items():
            trace[name] = momentum * trace[name] + g
            move = rate(step) * trace[name] * (multipliers or {}).get(name, 1.0)
            params[name] = params[name] - move
    return params


def clipped(max_norm):
    def shape(gradients):
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        return {name: g * min(1, max_norm / norm) for name, g in gradients.items()}

    return shape


def only_w(gradients):
    return {"w": gradients["w"], "b": 0.0}


def scaled(**factors):
    return lambda gradients: {
        name: g * factors.get(name, 1.0) for name, g in gradients.items()
    }


class Descent:
    """A class whose constructor takes the learning rate."""

    def __init__(self, rate):
        self.rate = rate

    def init(self, params):
        del params
        return ()

    def update(self, updates, state, params=None):
        del params
        return jax.tree.map(lambda g: -self.rate * g, updates), state


def halve(pairs):
    return [(gradient / 2, variable) for gradient, variable in pairs]


def slower(rate, step):
    return rate / (1 + step)


class Form(NamedTuple):
    arguments: dict[str, Any]
    expected: dict[str, Any]


PLAIN = descend()
FORMS = {
    # The optimizer in each of its forms.
    "optimizer: a name": Form({"optimizer": "SGD"}, PLAIN),
    "optimizer: a name of optax": Form({"optimizer": "sgd"}, PLAIN),
    "optimizer: a name with keywords": Form(
        {"optimizer": "sgd(momentum=0.5)"}, descend(momentum=0.5)
    ),
    "optimizer: a function": Form({"optimizer": optax.sgd}, PLAIN),
    "optimizer: a lambda": Form(
        {"optimizer": lambda rate: optax.sgd(rate, momentum=0.5)},
        descend(momentum=0.5),
    ),
    "optimizer: a partial": Form(
        {"optimizer": functools.partial(optax.sgd, momentum=0.5)},
        descend(momentum=0.5),
    ),
    "optimizer: a class": Form({"optimizer": Descent}, PLAIN),
    "optimizer: an instance": Form(
        {"optimizer": optax.sgd(0.1), "learning_rate": 99.0}, PLAIN
    ),
    "optimizer: an instance of a class": Form({"optimizer": Descent(0.1)}, PLAIN),
    # The learning rate.
    "learning_rate: None with an instance": Form(
        {"optimizer": optax.sgd(0.1), "learning_rate": None}, PLAIN
    ),
    "learning_rate: None with a function of nothing": Form(
        {"optimizer": lambda: optax.sgd(0.1), "learning_rate": None}, PLAIN
    ),
    "learning_rate: None ignores the decay": Form(
        {
            "optimizer": optax.sgd(0.1),
            "learning_rate": None,
            "learning_rate_decay_fn": slower,
            "global_step": None,
        },
        PLAIN,
    ),
    "learning_rate: an int": Form({"learning_rate": 1}, descend(lambda step: 1)),
    "learning_rate: zero": Form({"learning_rate": 0.0}, descend(lambda step: 0)),
    "learning_rate: a NumPy number": Form({"learning_rate": np.float32(0.1)}, PLAIN),
    "learning_rate: a NumPy array": Form({"learning_rate": np.array(0.1)}, PLAIN),
    "learning_rate: an array": Form({"learning_rate": jnp.array(0.1)}, PLAIN),
    "learning_rate: a schedule": Form(
        {"learning_rate": optax.linear_schedule(0.1, 0.0, 10)},
        descend(lambda step: 0.1 * (1 - step / 10)),
    ),
    "learning_rate: a lambda": Form(
        {"learning_rate": lambda step: 0.1 / (1 + step), "global_step": 7},
        descend(lambda step: 0.1 / (8 + step)),
    ),
    # Its decay, and the counter.
    "decay": Form(
        {"learning_rate_decay_fn": slower}, descend(lambda step: 0.1 / (1 + step))
    ),
    "decay: TensorFlow's": Form(
        {
            "learning_rate_decay_fn": functools.partial(
                optloss.exponential_decay, decay_steps=1, decay_rate=0.5
            )
        },
        descend(lambda step: 0.1 * 0.5**step),
    ),
    "decay: not counting": Form(
        {"learning_rate_decay_fn": slower, "increment_global_step": False}, PLAIN
    ),
    "decay: from 1000": Form(
        {"learning_rate_decay_fn": slower, "global_step": 1000, "learning_rate": 50},
        descend(lambda step: 50 / (1001 + step)),
    ),
    "global_step: None": Form({"global_step": None}, PLAIN),
    "global_step: a NumPy int": Form({"global_step": np.uint8(5)}, PLAIN),
    "global_step: an array": Form(
        {"global_step": jnp.array(9), "learning_rate_decay_fn": slower},
        descend(lambda step: 0.1 / (10 + step)),
    ),
    # The clip.
    "clip_gradients: a float": Form(
        {"clip_gradients": 0.5}, descend(shape=clipped(0.5))
    ),
    "clip_gradients: an int": Form({"clip_gradients": 1}, descend(shape=clipped(1))),
    "clip_gradients: zero": Form({"clip_gradients": 0}, descend(shape=clipped(0))),
    "clip_gradients: infinity": Form({"clip_gradients": np.inf}, PLAIN),
    "clip_gradients: an array": Form(
        {"clip_gradients": jnp.array(0.5)}, descend(shape=clipped(0.5))
    ),
    "clip_gradients: adaptive": Form(
        {"clip_gradients": optloss.adaptive_clipping(static_max_norm=0.5)},
        descend(shape=clipped(0.5)),
    ),
    "clip_gradients: optax's": Form(
        {"clip_gradients": optax.clip_by_global_norm(0.5)},
        descend(shape=clipped(0.5)),
    ),
    "clip_gradients: a function": Form(
        {"clip_gradients": halve}, descend(shape=scaled(w=0.5, b=0.5))
    ),
    # Which are trained.
    "variables: a name": Form({"variables": "w"}, descend(shape=only_w)),
    "variables: names": Form({"variables": ["w"]}, descend(shape=only_w)),
    "variables: all names": Form({"variables": ("b", "w")}, PLAIN),
    "variables: overlapping globs": Form({"variables": {"*", "**"}}, PLAIN),
    "variables: a regular expression": Form(
        {"variables": re.compile("[v-x]")}, descend(shape=only_w)
    ),
    "variables: a predicate": Form(
        {"variables": lambda name, leaf: leaf.ndim == 2}, descend(shape=only_w)
    ),
    "variables: a mask": Form(
        {"variables": {"w": True, "b": False}}, descend(shape=only_w)
    ),
    # Noise and multipliers.
    "gradient_noise_scale: zero": Form({"gradient_noise_scale": 0}, PLAIN),
    "gradient_noise_scale: an array": Form(
        {"gradient_noise_scale": jnp.array(0.0)}, PLAIN
    ),
    "gradient_noise_scale: a transform": Form(
        {"gradient_noise_scale": optloss.multiply_gradients({"w": 3.0})},
        descend(shape=scaled(w=3.0)),
    ),
    "gradient_multipliers": Form(
        {"gradient_multipliers": {"w": 2, "b": jnp.array(-1.0)}},
        descend(shape=scaled(w=2.0, b=-1.0)),
    ),
    "gradient_multipliers: none": Form({"gradient_multipliers": {}}, PLAIN),
    "gradient_multipliers: before the clip": Form(
        {"gradient_multipliers": {"b": 0.0}, "clip_gradients": 0.5},
        descend(shape=lambda g: clipped(0.5)(only_w(g))),
    ),
    "learning_rate_multipliers": Form(
        {"learning_rate_multipliers": {"w": 0.5, re.compile("."): np.float32(2)}},
        descend(multipliers={"w": 0.5, "b": 2.0}),
    ),
    "learning_rate_multipliers: behind the clip": Form(
        {"learning_rate_multipliers": {"b": 0.0}, "clip_gradients": 0.5},
        descend(shape=clipped(0.5), multipliers={"b": 0.0}),
    ),
    # The rest.
    "colocate_gradients_with_ops": Form({"colocate_gradients_with_ops": True}, PLAIN),
    "skip_nonfinite": Form({"skip_nonfinite": True}, PLAIN),
    "pack_small_leaves": Form({"pack_small_leaves": 4}, PLAIN),
    "seed: a key": Form({"seed": jax.random.key(1)}, PLAIN),
    "seed: an old key": Form({"seed": jax.random.PRNGKey(1)}, PLAIN),
    "donate": Form({"donate": False}, PLAIN),
}


def make(loss=loss, **changed):
    arguments = {"global_step": 0, "learning_rate": 0.1, "optimizer": "SGD"}
    return optloss.optimize_loss(loss, **(arguments | changed))


def called(train_op, state, *args, steps=STEPS):
    for _ in range(steps):
        state, output = train_op(state, *args)
    return state, output


def scanned(train_op, state, *args, steps=STEPS):
    state, outputs = jax.lax.scan(
        lambda state, _: train_op.update(state, *args), state, None, length=steps
    )
    return state, jax.tree.map(lambda leaf: leaf[-1], outputs)


both_ways = pytest.mark.parametrize("run", [called, scanned])


# Those that are compiled as they are called, too.
CALLED = [
    *(f"optimizer: {form}" for form in ("a name", "a function", "a class")),
    "optimizer: an instance",
    *(name for name in FORMS if name.startswith("learning_rate: None")),
    *(f"clip_gradients: {form}" for form in ("a float", "adaptive", "a function")),
    *(f"variables: {form}" for form in ("names", "a predicate", "a mask")),
    "global_step: None",
    "decay: not counting",
]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "run"),
    [*((name, scanned) for name in FORMS), *((name, called) for name in CALLED)],
)
def test_a_form_trains_as_it_should(name, run):
    arguments, expected = FORMS[name]
    train_op = make(**arguments)
    state, output = run(train_op, train_op.init(parameters()), TARGET)
    for leaf in expected:
        np.testing.assert_allclose(state.params[leaf], expected[leaf], rtol=2e-6)
    start = arguments.get("global_step", 0)
    if start is None:
        assert state.step is None
    else:
        counted = STEPS if arguments.get("increment_global_step", True) else 0
        assert state.step == start + counted
    assert {tag.split("/")[0] for tag in output.summaries} == {"OptimizeLoss"}


@both_ways
def test_the_positional_order_is_the_originals(run):
    train_op = optloss.optimize_loss(
        loss,
        5,
        0.2,
        "SGD",
        0.0,
        {"w": 2.0},
        1.0,
        slower,
        [lambda state, context: state + 1],
        ["w"],
        "Name",
        ["loss"],
        True,
        False,
    )
    state = train_op.init(parameters(), jnp.zeros(()))
    with pytest.raises(ValueError, match=r"^optimize_loss: the loss loss\(params, x\)"):
        run(train_op, state, TARGET)
    stateful = optloss.optimize_loss(
        lambda params, state, x: (loss(params, x), state),
        *(5, 0.2, "SGD", 0.0, {"w": 2.0}, 1.0, slower),
        *([lambda state, context: state + 1], ["w"], "Name", ["loss"], True, False),
    )
    state, output = run(stateful, state, TARGET)
    assert state.step == 5
    assert state.model_state == STEPS
    assert list(output.summaries) == ["Name/loss"]
    expected = descend(
        lambda step: 0.2 / 6, lambda g: clipped(1.0)(scaled(w=2.0)(only_w(g)))
    )
    np.testing.assert_allclose(state.params["w"], expected["w"], rtol=2e-6)
    np.testing.assert_array_equal(state.params["b"], parameters()["b"])


def counting(params, model_state, x):
    return loss(params, x), {"seen": model_state["seen"] + 1}


def follow(model_state, context):
    """A moving average of the parameters is one line."""
    return model_state | {
        "mean": jax.tree.map(
            lambda m, p: 0.5 * m + 0.5 * p, model_state["mean"], context.params
        )
    }


def double(model_state, context):
    return model_state | {"seen": 2 * model_state["seen"]}


@both_ways
@pytest.mark.parametrize(
    ("update_ops", "seen"),
    [(None, [1, 2, 3]), ([], [1, 2, 3]), ([double, double], [4, 20, 84])],
)
def test_update_ops_run_in_order_on_what_the_loss_returned(update_ops, seen, run):
    train_op = make(counting, update_ops=update_ops)
    state = train_op.init(parameters(), {"seen": jnp.zeros((), jnp.int32)})
    for expected in seen:
        state, _ = run(train_op, state, TARGET, steps=1)
        assert state.model_state["seen"] == expected


@both_ways
def test_update_ops_see_the_parameters_after_the_update(run):
    def keep(params, model_state, x):
        return loss(params, x), model_state

    train_op = make(keep, update_ops=[follow])
    state = train_op.init(parameters(), {"mean": parameters()})
    state, _ = run(train_op, state, TARGET)
    mean = np.float64(parameters()["b"])
    for steps in range(1, STEPS + 1):
        mean = 0.5 * mean + 0.5 * descend(steps=steps)["b"]
    np.testing.assert_allclose(state.model_state["mean"]["b"], mean, rtol=2e-6)


@both_ways
@pytest.mark.parametrize(
    ("start", "increment", "end"),
    [
        (None, True, None),
        (0, True, 3),
        (1000, True, 1003),
        (1000, False, 1000),
        (2**31 - 2, True, 2**31 - 1),
    ],
)
def test_the_counter(start, increment, end, run):
    train_op = make(global_step=start, increment_global_step=increment)
    state, _ = run(train_op, train_op.init(parameters()), TARGET)
    assert state.step == end
    assert end is None or state.step.dtype == jnp.int32


# The gradient is [3, 4] and 12, so that every norm is a whole number.
WHOLE = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(12.0)}
NORMS = {"global_norm/gradient_norm": 13.0, "global_norm/clipped_gradient_norm": 1.3}
TAGS = {
    "learning_rate": {"learning_rate": 0.1},
    "loss": {"loss": 84.5},
    "global_gradient_norm": NORMS,
    "gradient_norm": NORMS | {"gradient_norm/a": 0.5, "gradient_norm/b": 1.2},
    "gradients": {"gradients/a": (0.3, 0.4, 2), "gradients/b": (1.2, 1.2, 1)},
}


def half_square(params):
    return 0.5 * (jnp.sum(params["a"] ** 2) + params["b"] ** 2)


def seen(summaries):
    return {
        tag: (entry.min, entry.max, entry.num)
        if isinstance(entry, Histogram)
        else entry
        for tag, entry in summaries.items()
    }


@pytest.mark.wide
@both_ways
@pytest.mark.parametrize("wanted", TAGS)
def test_a_summary_is_what_its_tag_says(wanted, run):
    train_op = make(half_square, summaries=[wanted], clip_gradients=1.3)
    _, output = run(train_op, train_op.init(WHOLE), steps=1)
    expected = {f"OptimizeLoss/{tag}": value for tag, value in TAGS[wanted].items()}
    found = seen(output.summaries)
    assert found.keys() == expected.keys()
    for tag, value in expected.items():
        np.testing.assert_allclose(found[tag], value, rtol=1e-6)
        if not isinstance(output.summaries[tag], Histogram):
            assert output.summaries[tag].dtype == jnp.float32
            assert output.summaries[tag].shape == ()


@pytest.mark.parametrize(
    ("name", "tag"),
    [("", "loss"), ("A/b c", "A/b c/loss"), (None, "OptimizeLoss/loss")],
)
def test_the_name_is_the_prefix_of_the_tags(name, tag):
    train_op = make(half_square, summaries=["loss"], name=name)
    _, output = train_op(train_op.init(WHOLE))
    assert output.summaries == {tag: 84.5}


@pytest.mark.parametrize(
    ("summaries", "tags"),
    [
        (None, {"loss", "learning_rate"}),
        ([], set()),
        (optloss.OPTIMIZER_SUMMARIES, set().union(*TAGS.values())),
        (("loss", "loss"), {"loss"}),
    ],
)
def test_a_list_of_summaries(summaries, tags):
    train_op = make(half_square, summaries=summaries, clip_gradients=1.3, name="")
    _, output = train_op(train_op.init(WHOLE))
    assert output.summaries.keys() == tags


def test_without_a_clip_there_is_no_clipped_norm():
    train_op = make(half_square, summaries=["gradient_norm"], name="")
    _, output = train_op(train_op.init(WHOLE))
    assert output.summaries.keys() == {
        "global_norm/gradient_norm",
        "gradient_norm/a",
        "gradient_norm/b",
    }
    assert output.summaries["global_norm/gradient_norm"] == 13.0


def test_the_norm_is_measured_behind_the_multipliers_and_a_function_clips_it():
    train_op = make(
        half_square,
        summaries=["global_gradient_norm"],
        name="",
        gradient_multipliers={"b": 0.0},
        clip_gradients=halve,
    )
    _, output = train_op(train_op.init(WHOLE))
    assert seen(output.summaries) == {
        "global_norm/gradient_norm": 5.0,
        "global_norm/clipped_gradient_norm": 2.5,
    }


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        ({"optimizer": optax.sgd(0.1)}, False),
        ({"optimizer": lambda: optax.sgd(0.1), "learning_rate": None}, False),
        ({"learning_rate_decay_fn": slower}, True),
        ({"learning_rate": optax.constant_schedule(0.1)}, True),
        ({"optimizer": Descent}, True),
    ],
)
def test_the_learning_rate_is_reported_where_the_library_knows_it(arguments, known):
    train_op = make(half_square, **arguments)
    _, output = train_op(train_op.init(WHOLE))
    assert ("OptimizeLoss/learning_rate" in output.summaries) is known


@pytest.mark.parametrize(
    ("arguments", "due"),
    [
        ({}, [1, 1, 1, 1]),
        ({"histogram_every": 3, "global_step": 1}, [0, 0, 1, 0]),
        ({"histogram_every": 3, "global_step": None}, [1, 1, 1, 1]),
        ({"histogram_every": 3, "increment_global_step": False}, [1, 1, 1, 1]),
    ],
)
def test_histograms_are_computed_when_due(arguments, due):
    train_op = make(lambda w: w**2, summaries=["gradients"], **arguments)
    _, outputs = jax.lax.scan(
        lambda state, _: train_op.update(state),
        train_op.init(jnp.array(1.0)),
        length=len(due),
    )
    np.testing.assert_array_equal(outputs.summaries["OptimizeLoss/gradients/"].num, due)


def test_what_is_looked_at_leaves_the_state_alone():
    structures = {
        jax.tree.structure(make(summaries=summaries, **more).init(parameters()))
        for summaries in (None, [], list(optloss.OPTIMIZER_SUMMARIES))
        for more in ({}, {"histogram_every": 7})
    }
    assert len(structures) == 1


SWEPT = {
    "learning_rate": lambda value: {"learning_rate": value},
    "clip_gradients": lambda value: {"clip_gradients": value},
    "gradient_multipliers": lambda value: {"gradient_multipliers": {"b": value}},
    "learning_rate_multipliers": lambda value: {
        "learning_rate_multipliers": {"w": value}
    },
    "gradient_noise_scale": lambda value: {"gradient_noise_scale": value},
    "adaptive_clipping": lambda value: {
        "clip_gradients": optloss.adaptive_clipping(static_max_norm=value)
    },
    "decay": lambda value: {"learning_rate_decay_fn": lambda rate, step: rate * value},
    "schedule": lambda value: {"learning_rate": lambda step: value},
}


@pytest.mark.wide
@pytest.mark.parametrize("argument", SWEPT)
def test_an_argument_may_be_traced(argument):
    def trained(value):
        train_op = make(**SWEPT[argument](value))
        state, output = scanned(train_op, train_op.init(parameters()), TARGET)
        return state.params, output.loss

    swept = jax.jit(jax.vmap(trained))(jnp.array([0.0, 0.05, 0.5]))
    alone = trained(0.05)
    for found, expected in zip(
        jax.tree.leaves(swept), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_allclose(found[1], expected, rtol=1e-6)
    assert not np.allclose(swept[1][0], swept[1][1])


def test_the_start_of_the_counter_and_the_seed_may_be_traced():
    @jax.jit
    @jax.vmap
    def started(step, key):
        train_op = make(
            lambda w: w**2, global_step=step, seed=key, gradient_noise_scale=1.0
        )
        return train_op.update(train_op.init(jnp.array(1.0)))[0]

    keys = jax.random.split(jax.random.key(0), 3)
    state = started(jnp.arange(3), keys)
    np.testing.assert_array_equal(state.step, [1, 2, 3])
    assert len(set(state.params.tolist())) == 3


def test_a_decay_that_has_no_effect_is_said_once_where_it_was_asked_for():
    for call in (
        functools.partial(make, optimizer=optax.sgd(0.1)),
        functools.partial(optloss.make_optimizer, 0.1, optax.sgd(0.1)),
    ):
        with pytest.warns(UserWarning, match="has no effect") as caught:
            call(learning_rate_decay_fn=slower)
        (warning,) = caught
        name = "make_optimizer" if call.args else "optimize_loss"
        assert str(warning.message) == (
            f"{name}: the optimizer is an instance, whose own learning rate governs; "
            "learning_rate_decay_fn has no effect."
        )
        assert warning.filename == __file__


def test_the_chain_alone_is_that_of_make_optimizer():
    arguments = {
        "gradient_multipliers": {"b": 2.0},
        "clip_gradients": 0.5,
        "learning_rate_decay_fn": slower,
        "learning_rate_multipliers": {"w": 0.5},
        "variables": "w",
        "skip_nonfinite": True,
    }
    params = parameters()
    gradients = jax.grad(loss)(params, TARGET)
    transforms = [
        make(**arguments).tx,
        optloss.make_optimizer(0.1, "SGD", **arguments),
    ]
    results = [
        jax.jit(tx.update)(gradients, tx.init(params), params, step=3)
        for tx in transforms
    ]
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(one, other)
    norm = np.linalg.norm(gradients["w"])
    np.testing.assert_allclose(
        results[0][0]["w"], -0.1 / 4 * 0.5 * gradients["w"] * 0.5 / norm, rtol=1e-6
    )


def test_schedules_of_losses_work_inside():
    """``value`` reaches the optimizer: a plateau of the loss lowers the rate."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    train_op = make(
        lambda w: 0.0 * w + 7.0,
        optimizer=lambda rate: optax.chain(optax.sgd(rate), plateau),
    )
    state = train_op.init(jnp.array(1.0))
    for _ in range(5):
        state, _ = train_op(state)
    (reached,) = [
        node.scale
        for node in jax.tree.leaves(
            state, is_leaf=lambda n: hasattr(n, "plateau_count")
        )
        if hasattr(node, "plateau_count")
    ]
    assert 0 < reached < 1

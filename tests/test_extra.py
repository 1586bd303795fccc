"""What an optimizer may ask for besides the gradient: step, value, grad, value_fn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled_programs
from optax import contrib
from sklearn.datasets import load_digits

import optloss
from optloss.extra import by_signature, fill_masked

EXTRA = {"step": 1, "value": 2.0, "grad": 3.0, "value_fn": abs}


def make(loss, optimizer, learning_rate=1.0, **more):
    return optloss.optimize_loss(
        loss,
        global_step=0,
        optimizer=optimizer,
        learning_rate=learning_rate,
        **more,
    )


@pytest.mark.parametrize(
    ("names", "handed"),
    [
        ("", set()),
        (", *, value", {"value"}),
        (", *, grad_fn=None", set()),
        (", *, grad, value_fn=None", {"grad", "value_fn"}),
        (", **extra", set(EXTRA)),
    ],
)
@pytest.mark.parametrize(
    "kind", [optax.GradientTransformation, optax.GradientTransformationExtraArgs]
)
def test_an_update_is_given_what_its_signature_names(names, handed, kind):
    room = {}
    exec(  # the signature is what is tested
        f"def update(updates, state, params=None{names}):\n    return locals(), state",
        room,
    )
    transform = by_signature(kind(lambda params: (), room["update"]))
    found, _ = transform.update(0.0, (), None, **EXTRA)
    found |= found.pop("extra", {})
    assert {name for name in EXTRA if name in found} == handed


@pytest.mark.parametrize(
    "search", [optax.scale_by_zoom_linesearch, optax.scale_by_backtracking_linesearch]
)
def test_a_line_search_alone_gets_no_step(search):
    transform = by_signature(search(5))
    params = jnp.array([1.0, 2.0])
    grad = jax.grad(lambda w: jnp.sum(w**2))(params)
    extra = {"value": jnp.sum(params**2), "grad": grad, "step": jnp.array(0)}
    updates, _ = transform.update(
        -grad,
        transform.init(params),
        params,
        value_fn=lambda trained: jnp.sum(trained**2),
        **extra,
    )
    assert jnp.sum((params + updates) ** 2) < jnp.sum(params**2)


def test_masked_places_are_filled_with_the_parameters():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": {"c": jnp.arange(2)}, "d": None}
    trained = {"a": jnp.zeros(2), "b": {"c": optax.MaskedNode()}, "d": None}
    filled = fill_masked(trained, params)
    assert filled["a"].dtype == jnp.bfloat16
    assert filled["b"]["c"] is params["b"]["c"]
    assert jax.tree.structure(filled) == jax.tree.structure(params)


# L-BFGS: as many steps and the same values as optax's own loop. In float64: there the
# rounding of two programs, which the search amplifies, stays far below the tolerance.


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def rosenbrock(params):
    x, y = params["x"], params["y"]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def digits():
    found = load_digits()
    return jnp.asarray(found.data[:200] / 16), found.target[:200]


def logistic(params, x, y):
    logits = x @ params["kernel"] + params["bias"]
    right = jnp.take_along_axis(logits, y[:, None], -1)[:, 0]
    penalty = 1e-3 * jnp.sum(params["kernel"] ** 2)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - right) + penalty


def flat_start():
    return {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}


def by_optax(loss, params, solver, tolerance, most):
    """Return the losses of optax's own loop until the gradient is small."""
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(params, updates), state, value, optax.tree.norm(grad)

    state, values = solver.init(params), []
    for _ in range(most):
        params, state, value, norm = step(params, state)
        values.append(float(value))
        if norm < tolerance:
            break
    return np.array(values), params


def by_us(train_op, state, args, tolerance, most):
    values = []
    for _ in range(most):
        state, output = train_op(state, *args)
        values.append(float(output.loss))
        if output.summaries["OptimizeLoss/global_norm/gradient_norm"] < tolerance:
            break
    return np.array(values), state


NORM = {"summaries": ["global_gradient_norm"]}


@pytest.mark.wide
@pytest.mark.parametrize("groups", [False, True])
def test_lbfgs_takes_the_steps_of_optax_on_rosenbrock(groups, wide):
    del wide
    start = {"x": jnp.array(-1.2), "y": jnp.array(1.0)}
    expected, _ = by_optax(rosenbrock, start, optax.lbfgs(), 1e-4, 100)
    train_op = make(rosenbrock, {"**": "lbfgs"} if groups else "lbfgs", **NORM)
    values, state = by_us(train_op, train_op.init(start), (), 1e-4, 100)
    assert len(values) == len(expected) < 60
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state.params["x"], 1.0, atol=1e-3)


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["plain", "frozen", "model_state"])
def test_lbfgs_takes_the_steps_of_optax_on_a_logistic_regression(kind, wide):
    del wide
    data = digits()
    start, more, model_state, loss = flat_start(), {}, None, logistic

    def expected_loss(params):
        return logistic(params, *data)

    if kind == "frozen":
        more = {"variables": "kernel"}
        start["bias"] = jnp.linspace(-1.0, 1.0, 10)

        def expected_loss(trained):
            return logistic(trained | {"bias": start["bias"]}, *data)

    if kind == "model_state":
        model_state = {"calls": jnp.array(0), "shift": jnp.array(0.1)}

        def loss(params, state, x, y):
            calls = state["calls"] + 1
            return logistic(params, x + state["shift"], y), state | {"calls": calls}

        def expected_loss(params):
            return logistic(params, data[0] + 0.1, data[1])

    trained = {"kernel": start["kernel"]} if kind == "frozen" else start
    expected, params = by_optax(expected_loss, trained, optax.lbfgs(), 1e-3, 60)
    train_op = make(loss, "lbfgs", **NORM, **more)
    values, state = by_us(train_op, train_op.init(start, model_state), data, 1e-3, 60)
    assert len(values) == len(expected)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state.params["kernel"], params["kernel"], atol=1e-4)
    if kind == "model_state":
        assert state.model_state["calls"] == len(values)
    if kind == "frozen":
        np.testing.assert_array_equal(state.params["bias"], start["bias"])


@pytest.mark.parametrize(
    ("optimizer", "learning_rate"),
    [
        (
            lambda rate: optax.chain(
                optax.sgd(rate), optax.scale_by_backtracking_linesearch(50)
            ),
            1.0,
        ),
        (optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(15)), None),
        ("polyak_sgd", 0.5),
        ({"x": "lbfgs", "y": "sgd"}, {"x": 1.0, "y": 1e-3}),
    ],
)
def test_what_asks_for_the_loss_descends(optimizer, learning_rate):
    train_op = make(rosenbrock, optimizer, learning_rate)
    state = train_op.init({"x": jnp.array(-1.2), "y": jnp.array(1.0)})
    for _ in range(20):
        state, output = train_op(state)
    assert output.loss < 20 < rosenbrock({"x": -1.2, "y": 1.0})
    assert compiled_programs(train_op) == 1


def test_the_chain_alone_takes_a_value_fn_of_all_parameters():
    tx = optloss.make_optimizer(1.0, "lbfgs", variables="x")
    params = {"x": jnp.array(0.5), "y": jnp.array(1.0)}
    state = tx.init(params)
    for _ in range(15):
        value, grad = jax.value_and_grad(rosenbrock)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=rosenbrock
        )
        params = optax.apply_updates(params, updates)
    assert params["y"] == 1.0
    np.testing.assert_allclose(rosenbrock(params), 0.0, atol=1e-4)


# The loss reaches what is inside of optax.MultiSteps.


def seeing(inner, seen):
    """Return ``inner`` with a look at what its update is handed."""

    def update(updates, state, params=None, **extra):
        seen.append(set(extra))
        return by_signature(inner).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


@pytest.mark.wide
@pytest.mark.parametrize("name", optloss.list_optimizers())
def test_each_optimizer_sees_the_loss_inside_multi_steps(name):
    text = "noisy_sgd(key=0)" if name == "noisy_sgd" else name
    factory = optloss.optimizers.registry.get_factory("call", text)
    seen = []

    def optimizer(rate):
        return optax.MultiSteps(seeing(factory(rate), seen), 4)

    train_op = make(lambda p: jnp.sum(p["w"] ** 2), optimizer, 0.01)
    # Traced, not compiled: what is handed over is known by then.
    state = jax.eval_shape(train_op.init, {"w": jnp.ones((2, 3))})
    jax.eval_shape(train_op.update, state)
    assert seen[0] == {"step", "value", "grad", "value_fn"}


@pytest.mark.parametrize("outside", [False, True])
def test_a_plateau_inside_and_outside_of_multi_steps(outside):
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0, atol=1e3)

    def optimizer(rate):
        if outside:
            return optax.chain(optax.MultiSteps(optax.sgd(rate), 4), plateau)
        return optax.MultiSteps(optax.chain(optax.sgd(rate), plateau), 4)

    train_op = make(lambda p: jnp.sum(p["w"]), optimizer, 1.0)
    state = train_op.init({"w": jnp.zeros(2)})
    rates = []
    for _ in range(8):
        state, output = train_op(state)
        rates.append(float(output.summaries["OptimizeLoss/learning_rate"]))
    # It counts each loss outside, one of four inside; the first is the best so far.
    assert rates[0] == (1.0 if not outside else rates[0])
    assert rates[-1] < 1.0
    assert rates == sorted(rates, reverse=True)


def test_schedule_free_is_evaluated_at_its_averages():
    train_op = make(lambda p: jnp.sum((p["w"] - 1) ** 2) + p["v"] ** 2,
                    {"w": "schedule_free_sgd", "v": "sgd"}, 0.3)  # fmt: skip
    start = {"w": jnp.array([3.0, -1.0]), "v": jnp.array(2.0)}
    state = train_op.init(start)
    for _ in range(5):
        state, _ = train_op(state)
    found = train_op.evaluation_params(state)
    [inner] = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda n: hasattr(n, "z"))
        if hasattr(node, "z")
    ]
    masked = state.params | {"v": optax.MaskedNode()}
    expected = contrib.schedule_free_eval_params(inner, masked)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)
    assert not jnp.allclose(found["w"], state.params["w"], atol=1e-3)
    assert found["v"] == state.params["v"]
    train_op(state)
    assert jnp.isfinite(found["w"]).all()


def test_schedule_free_packed():
    def loss(p):
        return jnp.sum((p["w"] - 1) ** 2) + p["v"] ** 2

    start, found = {"w": jnp.array([3.0, -1.0]), "v": jnp.array(2.0)}, []
    for size in (0, 4):
        train_op = make(loss, "schedule_free_sgd", 0.3, pack_small_leaves=size)
        state = train_op.init(start)
        for _ in range(3):
            state, _ = train_op(state)
        found.append(train_op.evaluation_params(state))
    np.testing.assert_allclose(found[0]["w"], found[1]["w"], rtol=1e-6)
    np.testing.assert_allclose(found[0]["v"], found[1]["v"], rtol=1e-6)


def test_sharpness_aware_minimisation_is_given_nothing_it_does_not_take():
    sam = contrib.sam(optax.sgd(0.1), contrib.normalize(), sync_period=2)
    train_op = make(lambda p: jnp.sum(p["w"] ** 2), sam, None)
    state = train_op.init({"w": jnp.ones(3)})
    for _ in range(10):
        state, output = train_op(state)
    assert output.loss < 3


# The rate that is reported is the rate of the update.


def constant_slope(params):
    return params["a"] + params["b"]


def plateau_sgd(rate):
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=2, atol=1e3)
    return optax.chain(optax.sgd(rate), plateau)


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ({"learning_rate": 0.1, "optimizer": "sgd"}, None),
        (
            {
                "learning_rate": 0.1,
                "optimizer": "SGD",
                "learning_rate_decay_fn": lambda rate, step: rate / (1 + step),
            },
            None,
        ),
        (
            {"learning_rate": lambda step: 0.1 * (1 + step), "optimizer": "sgd"},
            None,
        ),
        ({"learning_rate": 0.1, "optimizer": plateau_sgd}, None),
        ({"learning_rate": {"a": 0.1, "b": 0.2}, "optimizer": "sgd"}, ("a", "b")),
        (
            {
                "learning_rate": {"a": 0.1, "b": 0.2},
                "optimizer": {"a": plateau_sgd, "b": "sgd"},
            },
            ("a", "b"),
        ),
    ],
)
def test_the_reported_rate_is_that_of_the_update(arguments, keys):
    train_op = make(constant_slope, **arguments)
    state = train_op.init({"a": jnp.array(0.0), "b": jnp.array(0.0)})
    adjustable = not callable(arguments["learning_rate"])
    for i in range(12):
        before = {name: float(leaf) for name, leaf in state.params.items()}
        if adjustable and i == 6:
            state = optloss.set_learning_rate(state, 0.05)
        state, output = train_op(state)
        for name in "ab":
            tag = f"learning_rate/{name}" if keys else "learning_rate"
            rate = float(output.summaries[f"OptimizeLoss/{tag}"])
            assert rate == pytest.approx(
                before[name] - float(state.params[name]), rel=1e-4
            )
            assert optloss.get_summaries(state)[tag] == jnp.float32(rate)


def test_a_plateau_that_not_all_of_a_rate_have_is_left_out():
    train_op = make(constant_slope, {"a": plateau_sgd, "b": "sgd"}, 0.1)
    state = train_op.init({"a": jnp.array(0.0), "b": jnp.array(0.0)})
    for _ in range(5):
        state, output = train_op(state)
    assert output.summaries["OptimizeLoss/learning_rate"] == jnp.float32(0.1)


def test_inject_hyperparams_is_fine_where_it_does_not_hold_the_rate():
    clip = optax.inject_hyperparams(optax.clip)

    def optimizer(rate):
        return optax.chain(clip(0.5), optax.sgd(rate))

    train_op = make(constant_slope, optimizer, 0.1)
    state = train_op.init({"a": jnp.array(0.0), "b": jnp.array(0.0)})
    state, _ = train_op(optloss.set_learning_rate(state, 0.2))
    assert state.params["a"] == pytest.approx(-0.1)

    def frozen(rate):
        return optax.chain(clip(0.5), optax.inject_hyperparams(optax.sgd)(rate))

    with pytest.raises(ValueError, match="would keep the first learning rate"):
        make(constant_slope, frozen, 0.1).init({"a": jnp.array(0.0)})

    def scheduled(rate):
        return optax.inject_hyperparams(optax.sgd)(lambda count: rate / (1 + count))

    train_op = make(constant_slope, scheduled, 0.1)
    state = train_op.init({"a": jnp.array(0.0), "b": jnp.array(0.0)})
    state, _ = train_op(optloss.set_learning_rate(state, 0.2))
    assert state.params["a"] == pytest.approx(-0.2)

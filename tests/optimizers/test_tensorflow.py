"""TensorFlow's six optimizers against their restatement, on leaves of every kind."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy_reference import OPTIMIZERS

from optloss.optimizers import tensorflow
from optloss.optimizers.tensorflow import OPTIMIZER_CLS_NAMES

CASES = [
    ("SGD", {}),
    ("Momentum", {}),
    ("Momentum", {"momentum": 0.5, "use_nesterov": True}),
    ("Momentum", {"momentum": -0.25}),
    ("Adagrad", {}),
    ("Adagrad", {"initial_accumulator_value": 2.0}),
    ("Adam", {}),
    ("Adam", {"beta1": 0.5, "beta2": 0.75, "epsilon": 0.01}),
    ("Adam", {"beta1": 0.0, "beta2": 0.0}),
    ("RMSProp", {}),
    ("RMSProp", {"decay": 0.75, "momentum": 0.5, "epsilon": 0.01}),
    ("RMSProp", {"centered": True, "epsilon": 0.01}),
    ("RMSProp", {"centered": True, "momentum": 0.9, "decay": 0.5, "epsilon": 1.0}),
    ("Ftrl", {}),
    ("Ftrl", {"l1_regularization_strength": 0.5, "l2_regularization_strength": 0.25}),
    ("Ftrl", {"l2_shrinkage_regularization_strength": 0.25}),
    ("Ftrl", {"learning_rate_power": -0.75, "initial_accumulator_value": 1.0}),
    ("Ftrl", {"learning_rate_power": 0.0, "initial_accumulator_value": 0.0}),
]
UPDATES = 30


def label(value):
    if isinstance(value, dict):
        return ",".join(f"{key}={x}" for key, x in value.items())
    return None


every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=label)
every_name = pytest.mark.parametrize("name", OPTIMIZER_CLS_NAMES)


def factory_of(name, settings):
    return functools.partial(OPTIMIZER_CLS_NAMES[name], **settings)


def problem(size=1.0, seed=0):
    """Return a start, gradients that vary in size, and a rate for each update."""
    rng = np.random.default_rng(seed)
    sizes = size * np.exp(rng.normal(size=(UPDATES, 1)))
    grads = rng.normal(size=(UPDATES, 5)) * sizes
    grads[::7, 2] = 0.0
    return rng.normal(size=5), grads, 0.1 / (1 + np.arange(UPDATES) / 10)


def restate(name, settings, start, grads, rates):
    slots, w, rows = {}, start, []
    for g, rate in zip(grads, rates, strict=True):
        w = OPTIMIZERS[name](slots, w, g, rate, **settings)
        rows.append(w)
    return np.stack(rows)


def train(factory, start, grads, rates):
    """Return the parameters and the updates, the factory being called at each."""

    def step(carry, now):
        params, state = carry
        g, rate = now
        updates, state = factory(rate).update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, updates)

    state = factory(0.5).init(start)
    run = jax.jit(lambda carry, now: jax.lax.scan(step, carry, now))
    return run((start, state), (grads, rates))[1]


@every_case
@pytest.mark.parametrize("size", [1.0, 1e-6], ids=["ordinary", "tiny"])
def test_an_optimizer_equals_its_restatement(name, settings, size):
    start, grads, rates = (
        np.float32(problem(size)[0]),
        *map(np.float32, problem(size)[1:]),
    )
    found, _ = train(factory_of(name, settings), start, grads, rates)
    arguments = (np.float64(array) for array in (start, grads, rates))
    expected = restate(name, settings, *arguments)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.wide
@every_case
def test_a_float64_leaf_is_float64_throughout(name, settings):
    start, grads, rates = problem()
    with jax.enable_x64(True):
        found, _ = train(factory_of(name, settings), jnp.asarray(start), grads, rates)
        state = OPTIMIZER_CLS_NAMES[name](0.1, **settings).init(jnp.asarray(start))
    expected = restate(name, settings, start, grads, rates)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} <= {found.dtype}


@pytest.mark.wide
@every_case
def test_a_float32_rate_does_not_make_a_float64_leaf_less_precise(name, settings):
    start, grads, _ = problem()
    with jax.enable_x64(True):
        rates = jnp.full(UPDATES, 0.125, jnp.float32)
        found, updates = train(
            factory_of(name, settings), jnp.asarray(start), grads, rates
        )
    expected = restate(name, settings, start, grads, np.float64(rates))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    assert updates.dtype == np.float64


@pytest.mark.wide
@every_case
def test_a_float64_rate_or_gradient_widens_neither_update_nor_state(name, settings):
    params, tx = jnp.ones(3), OPTIMIZER_CLS_NAMES[name](0.125, **settings)
    expected, state = tx.update(params / 2, tx.init(params), params)
    with jax.enable_x64(True):
        wide = OPTIMIZER_CLS_NAMES[name](jnp.asarray(0.125, jnp.float64), **settings)
        found, same = wide.update(params / 2, tx.init(params), params)
        _, also = tx.update(jnp.full(3, 0.5, jnp.float64), tx.init(params), params)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert jax.tree.map(jax.typeof, (same, also)) == jax.tree.map(
        jax.typeof, (state, state)
    )


@pytest.mark.wide
@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_a_half_precision_leaf_is_updated_as_a_float32_one(name, settings, dtype):
    start, grads, rates = (jnp.asarray(array, jnp.float32) for array in problem())
    halves = start.astype(dtype), grads.astype(dtype)
    factory = factory_of(name, settings)
    half, whole = factory(0.1).init(halves[0]), factory(0.1).init(start)
    for g, rate in zip(halves[1][:5], rates, strict=False):
        step, half = factory(rate).update(g, half, halves[0])
        wide = g.astype(jnp.float32), whole, halves[0].astype(jnp.float32)
        expected, whole = factory(rate).update(*wide)
        assert step.dtype == jnp.float32
        np.testing.assert_array_equal(step, expected)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), half, whole)
    assert all(jax.tree.leaves(same))


@pytest.mark.wide
@every_case
def test_turning_a_complex_gradient_turns_the_update(name, settings):
    start, grads, rates = (jnp.asarray(array, jnp.float32) for array in problem())
    turn = jnp.exp(1j * 0.7).astype(jnp.complex64)
    factory = factory_of(name, settings)
    state = factory(0.1).init(start * turn)
    squares = {"v", "mean_square", "accumulator"}
    for field, slot in zip(state._fields, state, strict=True):
        if slot is not None and field != "step":
            real = field in squares and name != "Momentum"
            assert slot.dtype == (jnp.float32 if real else jnp.complex64)
    _, real = train(factory, start, grads, rates)
    _, turned = train(factory, start * turn, grads * turn, rates)
    assert turned.dtype == jnp.complex64
    np.testing.assert_allclose(turned, real * turn, rtol=2e-4, atol=2e-5)


@every_case
def test_the_state_never_changes_its_types(name, settings):
    params = {
        "w": jnp.asarray(1.0),
        "h": jnp.ones(3, jnp.bfloat16),
        "c": jnp.ones(2) * 1j,
    }
    tx = OPTIMIZER_CLS_NAMES[name](0.1, **settings)
    first = tx.init(params)
    grads = jax.tree.map(lambda leaf: leaf * 0.5, params)
    _, second = tx.update(grads, first, params)
    for before, after in zip(
        jax.tree.leaves(first), jax.tree.leaves(second), strict=True
    ):
        assert jax.typeof(before) == jax.typeof(after)
        assert not before.weak_type
    assert jax.tree.structure(first) == jax.tree.structure(second)


@every_case
def test_other_leaves_pass_through_and_leave_their_slots_alone(name, settings):
    float0 = np.zeros((2,), jax.dtypes.float0)
    params = {
        "array": jnp.ones(2),
        "table": jnp.arange(3),
        "flag": jnp.array(True),
        "none": None,
        "frozen": optax.MaskedNode(),
        "unused": jnp.ones(2),
        "masked": jnp.ones(2),
        "index": jnp.arange(2),
    }
    grads = params | {"unused": None, "masked": optax.MaskedNode(), "index": float0}
    tx = OPTIMIZER_CLS_NAMES[name](0.1, **settings)
    state = tx.init(params)
    updates, new_state = tx.update(grads, state, params)
    assert jnp.all(updates.pop("array") != 0)
    assert all(updates[key] is grads[key] for key in updates)
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    for slot, new_slot in zip(state, new_state, strict=True):
        if isinstance(slot, dict):
            assert slot["table"] == slot["flag"] == slot["index"] == optax.MaskedNode()
            assert (slot["array"] != new_slot["array"]).all() or name == "RMSProp"
            assert slot["unused"] is new_slot["unused"]
            assert slot["masked"] is new_slot["masked"]


@every_name
@pytest.mark.parametrize("params", [{}, (), None, optax.MaskedNode()], ids=repr)
def test_a_tree_without_leaves_is_updated_to_itself(name, params):
    tx = OPTIMIZER_CLS_NAMES[name](0.1)
    updates, _ = tx.update(params, tx.init(params), {} if params is None else params)
    assert updates == params


@every_case
def test_slots_stand_where_their_parameter_stands(name, settings):
    mesh = jax.make_mesh((4,), ("d",))
    spread = NamedSharding(mesh, PartitionSpec("d"))
    params = jax.device_put(jnp.ones(8, jnp.bfloat16), spread)
    state = OPTIMIZER_CLS_NAMES[name](0.1, **settings).init(params)
    places = {leaf.sharding for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert places <= {spread}
    assert places or name == "SGD"


@every_name
def test_slots_are_buffers_of_their_own(name):
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    leaves = [
        *jax.tree.leaves(OPTIMIZER_CLS_NAMES[name](0.1).init(params)),
        params["a"],
    ]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.wide
@every_case
def test_an_update_is_mapped_and_differentiated(name, settings):
    start, grads, _ = (jnp.asarray(array, jnp.float32) for array in problem())
    tx = OPTIMIZER_CLS_NAMES[name](0.1, **settings)

    def update(start, g):
        return tx.update(g, tx.init(start), start, value=1.0, step=3)[0]

    starts = start + grads[1:4]
    mapped = jax.vmap(update)(starts, grads[1:4])
    single = [update(*row) for row in zip(starts, grads[1:4], strict=True)]
    np.testing.assert_allclose(mapped, jnp.stack(single), rtol=1e-6)
    slopes = jax.grad(lambda g: jnp.sum(update(start, g)))(grads[1])
    assert jnp.isfinite(slopes).all()


@pytest.mark.wide
@every_case
def test_hyper_parameters_may_be_traced(name, settings):
    start, grads, rates = (jnp.asarray(array, jnp.float32) for array in problem())
    flags = {k: v for k, v in settings.items() if isinstance(v, bool)}
    numbers = {k: v for k, v in settings.items() if k not in flags}

    @jax.jit
    def updates(numbers):
        return train(factory_of(name, flags | numbers), start, grads, rates)[1]

    expected = train(factory_of(name, settings), start, grads, rates)[1]
    np.testing.assert_allclose(updates(numbers), expected, rtol=1e-4, atol=2e-6)


@every_name
def test_hyper_parameters_may_be_injected(name):
    params, g = jnp.ones(3), jnp.array([0.5, -2.0, 0.25])
    tx = optax.inject_hyperparams(OPTIMIZER_CLS_NAMES[name])(learning_rate=0.1)
    injected, _ = tx.update(g, tx.init(params), params)
    tx = OPTIMIZER_CLS_NAMES[name](0.1)
    expected, _ = tx.update(g, tx.init(params), params)
    np.testing.assert_allclose(injected, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("SGD", {}, optax.sgd),
        ("Momentum", {}, functools.partial(optax.sgd, momentum=0.9)),
        (
            "Momentum",
            {"use_nesterov": True},
            functools.partial(optax.sgd, momentum=0.9, nesterov=True),
        ),
        ("Adagrad", {}, functools.partial(optax.adagrad, eps=0.0)),
        ("RMSProp", {}, functools.partial(optax.rmsprop, eps=1e-10, initial_scale=1.0)),
        (
            "RMSProp",
            {"momentum": 0.5, "centered": True, "epsilon": 1e-3},
            functools.partial(
                optax.rmsprop, eps=1e-3, initial_scale=1.0, momentum=0.5, centered=True
            ),
        ),
        ("Adam", {"epsilon": 0.0}, functools.partial(optax.adam, eps=0.0)),
    ],
    ids=label,
)
def test_optax_has_the_same_optimizer_with_the_right_settings(name, settings, theirs):
    start, grads, _ = (jnp.asarray(array, jnp.float32) for array in problem())
    rates = jnp.full(UPDATES, 0.05)
    grads = jnp.where(grads == 0, 1, grads)
    found, _ = train(factory_of(name, settings), start, grads, rates)
    # Momentum's rate stands inside optax's RMSProp too: only a constant one compares.
    expected, _ = train(theirs, start, grads, rates)
    np.testing.assert_allclose(found, expected, rtol=5e-5, atol=5e-6)


def first_update(tx, g):
    return float(tx.update(jnp.float32(g), tx.init(jnp.float32(0)))[0])


def test_adams_epsilon_is_not_corrected():
    ours = first_update(tensorflow.adam(1.0), 1e-6)
    theirs = first_update(optax.adam(1.0), 1e-6)
    np.testing.assert_allclose(ours, -1 / (1 + 1e-2 / np.sqrt(1e-3)), rtol=2e-5)
    np.testing.assert_allclose(theirs / ours, 4 / 3, rtol=0.03)


@pytest.mark.parametrize("steps", [0, 1, 9, 99, 9_999, 999_999, 2**31 - 2, 2**31 - 1])
def test_adams_correction_is_exact_at_every_step(steps):
    state = tensorflow.AdamState(jnp.int32(steps), jnp.float32(0.5), jnp.float32(0.25))
    update, state = tensorflow.adam(1.0).update(jnp.float32(0.5), state)
    b1, b2 = np.float64(np.float32([0.9, 0.999]))
    t = min(steps + 1, 2**31 - 1)
    np.testing.assert_allclose(
        update, -np.sqrt(-np.expm1(t * np.log(b2))) / -np.expm1(t * np.log(b1)), 3e-7
    )
    assert state.step == t


def test_ftrl_zeroes_exactly_what_l1_holds_down():
    tx = tensorflow.ftrl(0.1, l1_regularization_strength=1.0)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jnp.asarray([0.3, -1e-8, 3e5, 1e-30], dtype)
        updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
        assert (optax.apply_updates(params, updates) == 0).all()


def test_ftrl_forgets_the_start_at_a_first_gradient_of_zero():
    params, tx = jnp.array([0.3, 2.0]), tensorflow.ftrl(0.1)
    updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
    assert (optax.apply_updates(params, updates) == 0).all()


@pytest.mark.parametrize("jitted", [False, True])
def test_ftrl_rests_at_a_rate_of_zero(jitted):
    params, g = jnp.array([0.3, 2.0]), jnp.array([1.0, 0.0])

    def update(rate, state):
        return tensorflow.ftrl(rate).update(g, state, params)

    update = jax.jit(update) if jitted else update
    _, before = update(0.1, tensorflow.ftrl(0.1).init(params))
    updates, after = update(0.0, before)
    assert (updates == 0).all()
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_ftrl_starts_from_an_accumulator_of_zero():
    tx = tensorflow.ftrl(0.1, initial_accumulator_value=0.0)
    params = jnp.ones(2)
    updates, _ = tx.update(jnp.array([0.0, 1.0]), tx.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates), [0, 0.9], 1e-6)


def test_ftrl_needs_the_parameters():
    tx = tensorflow.ftrl(0.1)
    message = (
        "ftrl.update(params=None): must be given, to be solved for anew. "
        "Call update(g, state, params)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_centered_rmsprop_survives_a_gradient_that_does_not_change():
    tx = tensorflow.rmsprop(0.001, centered=True, epsilon=1e-30, decay=0.5)
    g = jnp.linspace(0.1, 3.0, 1000)

    def step(state, _):
        updates, state = tx.update(g, state)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(g), length=200)
    rounded = state.mean_square - state.mean_gradient**2
    assert (rounded < 0).any()
    assert jnp.isfinite(updates).all()


def test_rmsprop_keeps_no_slot_that_it_does_not_need():
    params = jnp.ones(3)
    state = tensorflow.rmsprop(0.1).init(params)
    assert state.mean_gradient is None
    assert state.momentum is None
    state = tensorflow.rmsprop(0.1, momentum=jnp.float32(0), centered=True).init(params)
    assert state.mean_gradient.shape == state.momentum.shape == (3,)


def test_the_originals_names_map_to_the_factories():
    assert dict(OPTIMIZER_CLS_NAMES) == {
        "Adagrad": tensorflow.adagrad,
        "Adam": tensorflow.adam,
        "Ftrl": tensorflow.ftrl,
        "Momentum": tensorflow.momentum,
        "RMSProp": tensorflow.rmsprop,
        "SGD": tensorflow.sgd,
    }
    with pytest.raises(TypeError, match="does not support item assignment"):
        OPTIMIZER_CLS_NAMES["Adam"] = tensorflow.sgd


OF_ANY_SIZE = "must be a finite real number or a 0-d array."
AT_LEAST_ZERO = "must be a finite real number >= 0 or a 0-d array."
REFUSED = [
    *(
        (name, {"learning_rate": rate}, f"learning_rate={shown}): {AT_LEAST_ZERO}")
        for name in ("adagrad", "adam", "ftrl", "momentum", "rmsprop", "sgd")
        for rate, shown in [
            (-0.1, "-0.1"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            (None, "None"),
            (True, "True"),
            ("0.1", "'0.1'"),
            (np.ones(2), "float64[2]"),
            (optax.constant_schedule, "constant_schedule"),
        ]
    ),
    *(
        (name, {argument: -1.0}, f"{argument}=-1.0): {AT_LEAST_ZERO}")
        for name, argument in [
            ("adam", "epsilon"),
            ("rmsprop", "epsilon"),
            ("ftrl", "initial_accumulator_value"),
            ("ftrl", "l1_regularization_strength"),
            ("ftrl", "l2_regularization_strength"),
            ("ftrl", "l2_shrinkage_regularization_strength"),
        ]
    ),
    (
        "adagrad",
        {"initial_accumulator_value": 0.0},
        "initial_accumulator_value=0.0): must be a finite real number > 0 or a 0-d "
        "array.",
    ),
    (
        "adam",
        {"beta1": 1.0},
        "beta1=1.0): must be a real number in [0, 1) or a 0-d array.",
    ),
    (
        "adam",
        {"beta2": -1},
        "beta2=-1): must be a real number in [0, 1) or a 0-d array.",
    ),
    (
        "rmsprop",
        {"decay": 2},
        "decay=2): must be a real number in [0, 1] or a 0-d array.",
    ),
    (
        "ftrl",
        {"learning_rate_power": 0.5},
        "learning_rate_power=0.5): must be a finite real number <= 0 or a 0-d array.",
    ),
    ("momentum", {"momentum": float("nan")}, f"momentum=nan): {OF_ANY_SIZE}"),
    ("rmsprop", {"momentum": float("inf")}, f"momentum=inf): {OF_ANY_SIZE}"),
    ("momentum", {"use_nesterov": 1}, "use_nesterov=1): must be True or False."),
    ("rmsprop", {"centered": None}, "centered=None): must be True or False."),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_a_bad_argument_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}({message}')}$"):
        getattr(tensorflow, name)(**({"learning_rate": 0.1} | arguments))


@every_name
def test_a_traced_rate_is_not_judged(name):
    params = jnp.ones(2)

    def update(rate):
        tx = OPTIMIZER_CLS_NAMES[name](rate)
        return tx.update(params, tx.init(params), params)[0]

    assert jax.jit(update)(-0.1).shape == (2,)

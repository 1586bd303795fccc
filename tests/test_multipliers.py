"""Multipliers by name: on the gradient, on the update, and layer by layer."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss

NAN, INF = float("nan"), float("inf")


def multiplied(multipliers, updates):
    transform = optloss.multiply_gradients(multipliers)
    result, state = transform.update(updates, transform.init(updates))
    assert state == optax.EmptyState()
    return result


@pytest.mark.parametrize(
    "half",
    [
        0.5,
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        jnp.array(0.5),
        jnp.array(0.5, jnp.bfloat16),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_a_leaf_is_multiplied_and_keeps_its_dtype(half, dtype):
    tree = {"a": jnp.array([1, -6], dtype), "b": jnp.array([3], dtype)}
    found = multiplied({"a": half}, tree)
    np.testing.assert_array_equal(found["a"], jnp.array([0.5, -3], dtype))
    np.testing.assert_array_equal(found["b"], tree["b"])
    assert found["a"].dtype == found["b"].dtype == dtype


@pytest.mark.parametrize("zero", [0, 0.0, -0.0, np.array(0), jnp.array(0.0)], ids=repr)
@pytest.mark.parametrize("jit", [False, True])
def test_an_exact_zero_gives_exact_zeros_whatever_the_gradient_holds(zero, jit):
    tree = {"a": jnp.array([NAN, INF, -INF, -1.0]), "b": jnp.array([NAN])}
    apply = functools.partial(multiplied, {"a": zero})
    found = jax.jit(apply)(tree) if jit else apply(tree)
    assert np.asarray(found["a"]).tobytes() == np.zeros(4, np.float32).tobytes()
    assert np.isnan(found["b"]).all()


def test_a_multiplier_may_be_traced():
    def by(multiplier):
        return multiplied({"a": multiplier}, {"a": jnp.array([2.0, NAN])})["a"]

    found = jax.jit(jax.vmap(by))(jnp.array([0.0, 1.0, -3.0]))
    np.testing.assert_array_equal(found, [[0, 0], [2, NAN], [-6, NAN]])
    slope = jax.grad(lambda m: multiplied({"a": m}, {"a": jnp.array(2.0)})["a"])(3.0)
    assert slope == 2.0


def test_what_is_no_float_is_passed_through():
    nothing = np.zeros(2, jax.dtypes.float0)
    tree = {"i": jnp.arange(2), "n": None, "f": nothing, "m": optax.MaskedNode()}
    found = multiplied({"**": 3.0}, tree)
    np.testing.assert_array_equal(found["i"], [0, 1])
    assert found["f"] is nothing
    assert found["n"] is None
    assert found["m"] == optax.MaskedNode()


def test_rules_of_every_kind_and_the_first_that_matches():
    tree = {"body": {"w": 1.0, "b": 1.0}, "head": {"w": 1.0, "b": 1.0}, "out": 1.0}
    rules = {"body/w": 2.0, "**/b": 3.0, re.compile("b.*|head/w"): 5.0}
    with pytest.raises(ValueError, match="left nothing"):
        multiplied({"**": 2.0} | rules, jax.tree.map(jnp.asarray, tree))
    assert multiplied(rules, jax.tree.map(jnp.asarray, tree)) == {
        "body": {"w": 2.0, "b": 3.0},
        "head": {"w": 5.0, "b": 3.0},
        "out": 1.0,
    }
    assert multiplied({}, tree) == tree


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            functools.partial(optloss.multiply_gradients, [("w", 1.0)]),
            "multiply_gradients(multipliers=[('w', 1.0)]): must map parameter names to "
            "numbers.",
        ),
        (
            functools.partial(optloss.multiply_gradients, {1: 1.0}),
            "multiply_gradients(multipliers={1: 1.0}): the key 1 is neither a name nor "
            "a compiled pattern.",
        ),
        (
            functools.partial(optloss.multiply_gradients, {"w": NAN}),
            "multiply_gradients(multipliers['w']=nan): must be a finite real number or "
            "a 0-d array.",
        ),
        (
            functools.partial(multiplied, {"kernal": 1.0}, {"kernel": 1.0}),
            "multiply_gradients: the pattern 'kernal' matches no parameter. Nearest: "
            "'kernel'.",
        ),
        (
            functools.partial(optloss.layerwise_decay, 0, "layer_{}/**", 3),
            "layerwise_decay(rate=0): must be a real number > 0.",
        ),
        (
            functools.partial(optloss.layerwise_decay, 0.5, "layer_0/**", 3),
            "layerwise_decay(pattern='layer_0/**'): must be a str with {} where the "
            "layer's number goes.",
        ),
        (
            functools.partial(optloss.layerwise_decay, 0.5, "layer_{}/**", 0),
            "layerwise_decay(num_layers=0): must be an int in [1, 100000].",
        ),
        (
            functools.partial(optloss.layerwise_decay, 0.5, "layer_{}", 10**400),
            f"layerwise_decay(num_layers=1{'0' * 56}...): must be an int in [1, "
            "100000].",
        ),
        (
            functools.partial(optloss.layerwise_decay, 2.0, "layer_{}", 1000),
            "layerwise_decay(rate=2.0): to the power of 1000 is no finite number. Is "
            "it below 1?",
        ),
        (
            functools.partial(optloss.layerwise_decay, 0.5, "layer_{}/**", True),
            "layerwise_decay(num_layers=True): must be an int in [1, 100000].",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=r".") as refused:
        call()
    assert str(refused.value) == message


def test_layerwise_decay_is_geometric_from_the_last_layer_to_the_first():
    rules = optloss.layerwise_decay(0.75, "encoder/layers_{}/**", 12)
    assert list(rules) == [f"encoder/layers_{i}/**" for i in range(12)]
    np.testing.assert_allclose(list(rules.values()), 0.75 ** np.arange(12, 0, -1))


def test_layerwise_decay_scales_the_updates_of_a_network():
    params = {f"layers_{i}": {"w": jnp.ones(3) * (i + 1)} for i in range(4)}
    params |= {"head": {"w": jnp.ones(3)}}
    rules = optloss.layerwise_decay(0.5, "layers_{}/*", 4)
    plain, scaled = (
        first_update("adam", params, learning_rate_multipliers=chosen)
        for chosen in (None, rules)
    )
    ratios = jax.tree.map(lambda s, p: s / p, scaled, plain)
    for i in range(4):
        np.testing.assert_allclose(
            ratios[f"layers_{i}"]["w"], 0.5 ** (4 - i), rtol=1e-6
        )
    np.testing.assert_array_equal(ratios["head"]["w"], 1.0)


def loss(params):
    return sum(jnp.sum(jnp.cos(leaf) ** 2) for leaf in jax.tree.leaves(params))


def first_update(optimizer, params, **arguments):
    tx = optloss.make_optimizer(0.01, optimizer, **arguments)

    @jax.jit
    def start(params):
        return tx.update(jax.grad(loss)(params), tx.init(params), params)[0]

    return start(params)


NETWORK = {
    "body": {"kernel": jnp.linspace(0.2, 1.2, 6).reshape(2, 3), "bias": jnp.ones(3)},
    "head": {"kernel": jnp.linspace(-1.0, 0.4, 6).reshape(3, 2)},
}


@pytest.mark.wide
@pytest.mark.parametrize("optimizer", ["Adam", "adam", "Adagrad", "RMSProp", "lion"])
def test_a_rate_multiplier_is_felt_under_every_optimizer(optimizer):
    plain = first_update(optimizer, NETWORK)
    scaled = first_update(
        optimizer, NETWORK, learning_rate_multipliers={"head/**": 0.1}
    )
    np.testing.assert_allclose(
        scaled["head"]["kernel"], 0.1 * plain["head"]["kernel"], rtol=1e-6
    )
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(scaled["body"][name], plain["body"][name])


# How long the path of a parameter is over its first 100 and its first 1,000 updates
# with its gradient multiplied by 0.1, against without; the documentation of
# `gradient_multipliers` quotes these.
SHARE_OF_THE_PATH = {
    "SGD": (0.1, 0.1),
    "Momentum": (0.1, 0.1),
    "Adam": (1.0, 1.0),
    "Adagrad": (0.77, 0.92),
    "RMSProp": (0.68, 0.97),
}


def linear(params, gradient):
    """A loss whose gradients are given, the same for every parameter."""
    return sum(jnp.sum(leaf * gradient) for leaf in params.values())


@pytest.mark.wide
@pytest.mark.parametrize("optimizer", SHARE_OF_THE_PATH)
def test_a_gradient_multiplier_is_nearly_undone_by_adam_and_its_like(optimizer):
    train_op = optloss.optimize_loss(
        linear,
        *(0, 0.01, optimizer),
        gradient_multipliers={"gradient": 0.1},
        learning_rate_multipliers={"rate": 0.1},
    )

    def step(state, gradient):
        moved, _ = train_op.update(state, gradient)
        return moved, jax.tree.map(jnp.subtract, moved.params, state.params)

    start = {name: jnp.zeros(64) for name in ("plain", "gradient", "rate")}
    gradients = jax.random.normal(jax.random.key(0), (1000, 64))
    _, moves = jax.lax.scan(step, train_op.init(start), gradients)
    path = {
        name: np.array([np.abs(moved[:steps]).sum() for steps in (100, 1000)])
        for name, moved in moves.items()
    }
    expected = SHARE_OF_THE_PATH[optimizer]
    np.testing.assert_allclose(path["gradient"] / path["plain"], expected, atol=0.006)
    np.testing.assert_allclose(path["rate"] / path["plain"], 0.1, rtol=1e-3)

"""What is not selected costs nothing, and comes back as it was, bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optloss

LAYERS = 4
WIDTH = 64


def network():
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(keys[i], (WIDTH, WIDTH)) / WIDTH**0.5,
            "bias": jnp.zeros(WIDTH),
        }
        for i in range(LAYERS)
    }


def loss(params, x):
    for i in range(LAYERS):
        layer = params[f"layer_{i}"]
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - 0.5) ** 2)


X = jax.random.normal(jax.random.key(1), (32, WIDTH))
# The last quarter is trained; what is frozen lies at the input's end.
TRAINED = ["layer_3/*"]
FROZEN = ("layer_0", "layer_1", "layer_2")


def make(loss=loss, **changed):
    arguments = {"global_step": 0, "learning_rate": 0.01, "optimizer": "Adam"}
    return optloss.optimize_loss(loss, **(arguments | changed))


def flops(train_op, *args):
    state = train_op.init(network())
    return (
        jax.jit(train_op.update).lower(state, *args).compile().cost_analysis()["flops"]
    )


def test_frozen_weights_at_the_input_cost_no_backward_pass():
    share = flops(make(variables=TRAINED), X) / flops(make(), X)
    # Forward 4 layers, backward 2 products for each, of which the lowest spares one.
    assert share <= 0.75
    assert share == pytest.approx((4 + 1) / (4 + 7), abs=0.03)


def test_frozen_leaves_have_no_optimizer_state():
    params = network()
    alone = {"layer_3": params["layer_3"]}

    def size(tree, **arguments):
        state = make(**arguments).init(tree).opt_state
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    arguments = {"gradient_noise_scale": 0.1, "clip_gradients": 1.0}
    assert size(params, variables=TRAINED, **arguments) == size(alone, **arguments)
    state = make(variables=TRAINED, **arguments).init(params).opt_state
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    assert any("layer_3" in path for path in paths)
    assert not any(re.search("layer_[0-2]", path) for path in paths)


def test_frozen_leaves_are_bit_identical_after_a_hundred_noisy_updates():
    params = network()
    # A negative zero, and numbers so small that arithmetic would flush them.
    odd = jnp.zeros(WIDTH).at[:3].set(jnp.array([-0.0, 1e-40, -1e-42]))
    params["layer_0"]["bias"] = odd
    train_op = make(
        variables=TRAINED,
        gradient_noise_scale=1.0,
        clip_gradients=1.0,
        gradient_multipliers={"**/kernel": 3.0},
        learning_rate_multipliers={"**": 0.5},
        skip_nonfinite=True,
    )
    state, _ = jax.lax.scan(
        lambda state, _: train_op.update(state, X), train_op.init(params), length=100
    )
    for name, layer in params.items():
        for part, before in layer.items():
            after = np.asarray(state.params[name][part])
            same = after.tobytes() == np.asarray(before).tobytes()
            assert same is (name in FROZEN)


def test_frozen_leaves_are_in_no_norm_and_the_trained_train_as_alone():
    params = network()
    frozen = {name: params[name] for name in FROZEN}
    alone = {"layer_3": params["layer_3"]}
    arguments = {
        "gradient_noise_scale": 0.1,
        "clip_gradients": 0.05,
        "summaries": ["global_gradient_norm"],
    }
    whole = make(variables=TRAINED, **arguments)
    part = make(lambda trained, x: loss(frozen | trained, x), **arguments)
    one, other = whole.init(params), part.init(alone)
    for _ in range(3):
        one, seen = whole(one, X)
        other, expected = part(other, X)
    assert seen.summaries == expected.summaries
    for name in alone:
        for leaf in ("kernel", "bias"):
            # The same noise too: it goes by the leaf's name.
            np.testing.assert_array_equal(
                one.params[name][leaf], other.params[name][leaf]
            )


def test_summaries_are_of_what_is_trained():
    train_op = make(
        variables=re.compile("layer_3/.*"), summaries=["gradient_norm", "gradients"]
    )
    _, output = train_op(train_op.init(network()), X)
    names = {tag.partition("/")[2] for tag in output.summaries}
    assert names == {
        "global_norm/gradient_norm",
        *(
            f"{kind}/layer_3/{leaf}"
            for kind in ("gradients", "gradient_norm")
            for leaf in ("kernel", "bias")
        ),
    }


@pytest.mark.wide
def test_the_chain_alone_saves_state_and_gives_negative_zeros():
    params = network()
    tx = optloss.make_optimizer(
        0.01, "adam", variables=TRAINED, gradient_noise_scale=1.0, clip_gradients=1.0
    )
    gradients = jax.grad(loss)(params, X)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    for name in params:
        update = updates[name]["kernel"]
        zeros = bool(((update == 0) & jnp.signbit(update)).all())
        assert zeros is (name in FROZEN)


def test_a_frozen_leaf_that_is_nan_harms_nothing():
    params = {"w": jnp.array([1.0, 2.0]), "unused": jnp.array([jnp.nan, jnp.inf])}
    train_op = make(
        lambda params: jnp.sum(params["w"] ** 2), variables="w", skip_nonfinite=True
    )
    state, _ = train_op(train_op.init(params))
    assert state.opt_state.total == 0
    assert (state.params["w"] != params["w"]).all()
    np.testing.assert_array_equal(state.params["unused"], params["unused"])


def test_the_loss_sees_the_frozen_leaves_and_may_not_move_them():
    def both(params):
        return jnp.sum((params["a"] * params["b"]) ** 2)

    train_op = make(both, variables="a", optimizer="SGD", learning_rate=0.1)
    state, output = train_op(train_op.init({"a": jnp.array(2.0), "b": jnp.array(3.0)}))
    assert output.loss == 36.0
    np.testing.assert_allclose(state.params["a"], 2.0 - 0.1 * 2 * 2 * 9, rtol=1e-6)
    assert state.params["b"] == 3.0


def test_the_selection_holds_for_the_state_it_began_with():
    """A run that goes on under another selection says so, and does not mix states."""
    state = make(variables=TRAINED).init(network())
    with pytest.raises((ValueError, TypeError)):
        make(variables="layer_0/**")(state, X)

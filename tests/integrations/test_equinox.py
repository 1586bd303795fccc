"""Equinox needs no integration: its modules are trees, its states are trees."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss


class Net(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    second: eqx.nn.Linear
    activation: object

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 8, use_bias=False, key=first)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch", momentum=0.9)
        self.second = eqx.nn.Linear(8, 1, key=second)
        self.activation = jax.nn.relu

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.second(self.activation(x))[0], state


X = jax.random.normal(jax.random.key(0), (32, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])


def start():
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(1))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, static, state


def make_loss(static):
    def loss(params, state, x, y):
        model = eqx.combine(params, static)
        batched = jax.vmap(
            model, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )
        out, state = batched(x, state)
        return jnp.mean((out - y) ** 2), state

    return loss


@pytest.mark.wide
def test_a_loop_with_batch_norm_equals_one_of_optax_alone():
    params, static, state = start()
    loss = make_loss(static)
    op = optloss.optimize_loss(loss, 0, 0.05, "adam", clip_gradients=1.0)
    run = op.init(params, state)

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
    opt_state = tx.init(params)
    grad = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    for _ in range(5):
        (value, state), grads = grad(params, state, X, Y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = eqx.apply_updates(params, updates)
        run, output = op(run, X, Y)
        np.testing.assert_allclose(output.loss, value, rtol=1e-5)
    found = jax.tree.leaves((run.params, run.model_state))
    expected = jax.tree.leaves((params, state))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_parameters_have_the_names_of_the_fields():
    params, static, state = start()
    op = optloss.optimize_loss(
        make_loss(static),
        global_step=0,
        learning_rate=0.05,
        optimizer="adam",
        learning_rate_multipliers={"second/*": 0.0},
    )
    kept = np.array(params.second.weight)
    run, _ = op(op.init(params, state), X, Y)
    np.testing.assert_array_equal(run.params.second.weight, kept)
    assert not np.array_equal(run.params.first.weight, params.first.weight)


def test_a_model_that_was_not_partitioned_is_told_how():
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(1))
    op = optloss.optimize_loss(make_loss(None), 0, 0.05, "adam")
    message = (
        "optimize_loss: the parameter 'norm/axis_name' is no array but 'batch'. Keep "
        "such leaves outside, for example with params, static = eqx.partition(model, "
        "eqx.is_inexact_array), and combine them inside the loss."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        op.init(model, state)


@pytest.mark.wide
def test_a_run_is_saved_by_equinox(tmp_path):
    params, static, state = start()
    op = optloss.optimize_loss(
        make_loss(static), 0, 0.05, "adam", gradient_noise_scale=0.1
    )
    run, _ = op(op.init(params, state), X, Y)
    eqx.tree_serialise_leaves(tmp_path / "run.eqx", run)
    again = eqx.tree_deserialise_leaves(tmp_path / "run.eqx", op.init(params, state))
    for _ in range(2):
        run, _ = op(run, X, Y)
        again, _ = op(again, X, Y)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), run, again)
    assert all(jax.tree.leaves(same))

import functools
import importlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale

import optloss
from optloss.integrations.linen import TrainState


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(8, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(1)(nn.relu(x))[..., 0]


NET = Net()
X = jax.random.normal(jax.random.key(0), (32, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])


def create(tx, cls=TrainState, **fields):
    variables = NET.init(jax.random.key(1), X)
    return cls.create(
        apply_fn=NET.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=tx,
        **fields,
    )


def loss_and_stats(params, batch_stats, x, y):
    variables = {"params": params, "batch_stats": batch_stats}
    out, moved = NET.apply(variables, x, mutable=["batch_stats"])
    return jnp.mean((out - y) ** 2), moved["batch_stats"]


def step(state, x, y):
    grad = jax.value_and_grad(loss_and_stats, has_aux=True)
    (loss, batch_stats), grads = grad(state.params, state.batch_stats, x, y)
    extra = {"value": loss}
    return state.apply_gradients(grads=grads, batch_stats=batch_stats, extra=extra)


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def recorder():
    """Keep what ``update`` was given by name."""

    def update(updates, state, params=None, *, value=-1.0, step=-1.0, **extra):
        assert not extra
        return updates, {"value": jnp.float32(value), "step": jnp.float32(step)}

    start = {"value": jnp.float32(0), "step": jnp.float32(0)}
    return optax.GradientTransformationExtraArgs(lambda params: start, update)


def test_extra_arguments_reach_the_optimizer_and_nothing_else_does():
    state = create(recorder())
    grads = jax.tree.map(jnp.ones_like, state.params)
    state = state.apply_gradients(grads=grads, extra={"value": 2.5})
    assert state.opt_state == {"value": 2.5, "step": -1.0}
    state = state.apply_gradients(grads=grads, extra={"value": 1.5, "step": state.step})
    assert state.opt_state == {"value": 1.5, "step": 1.0}
    state = state.apply_gradients(grads=grads)
    assert state.opt_state == {"value": -1.0, "step": -1.0}


@pytest.mark.wide
def test_it_is_flax_s_own_otherwise():
    class Own(train_state.TrainState):
        batch_stats: dict

    ours, own = create(optax.adam(0.1)), create(optax.adam(0.1), Own)
    for seed in range(3):
        grads = jax.tree.map(
            lambda leaf, seed=seed: jax.random.normal(jax.random.key(seed), leaf.shape),
            ours.params,
        )
        fields = {"batch_stats": {"moved": jnp.float32(seed)}}
        ours = ours.apply_gradients(grads=grads, extra={"value": 1.0}, **fields)
        own = own.apply_gradients(grads=grads, **fields)
    same((ours.params, ours.opt_state), (own.params, own.opt_state))
    assert ours.batch_stats == own.batch_stats == {"moved": 2.0}
    assert ours.step == own.step == 3


def test_a_subclass_may_require_fields():
    class Keyed(TrainState):
        key: jax.Array

    made = create(optax.sgd(0.1), Keyed, key=jnp.ones(2))
    moved = made.apply_gradients(grads=made.params, key=jnp.zeros(2))
    assert moved.key.tolist() == [0.0, 0.0]
    same(moved.batch_stats, made.batch_stats)
    plain = Keyed(0, NET.apply, made.params, made.tx, made.opt_state, jnp.ones(2))
    assert plain.batch_stats is None
    with pytest.raises(TypeError, match=r"missing 1 required .*: 'key'"):
        create(optax.sgd(0.1), Keyed)


def test_it_takes_the_place_of_flax_s_class_in_a_loop_with_a_dynamic_scale():
    """As in Flax's ImageNet example: both fields declared, without a default."""

    class Scaled(TrainState):
        batch_stats: Any
        dynamic_scale: DynamicScale

    @jax.jit
    def train_step(state, x, y):
        loss = functools.partial(loss_and_stats, batch_stats=state.batch_stats)
        scaled = state.dynamic_scale.value_and_grad(
            lambda params: loss(params, x=x, y=y), has_aux=True
        )
        scale, finite, (_, batch_stats), grads = scaled(state.params)
        moved = state.apply_gradients(grads=grads, batch_stats=batch_stats)

        def kept(new, old):
            return jax.tree.map(functools.partial(jnp.where, finite), new, old)

        return moved.replace(
            params=kept(moved.params, state.params),
            opt_state=kept(moved.opt_state, state.opt_state),
            dynamic_scale=scale,
        )

    tx = optax.sgd(0.1, momentum=0.9)
    start = DynamicScale(growth_interval=1, scale=jnp.float32(2.0**127))
    state = create(tx, Scaled, dynamic_scale=start)
    first = state.params
    state = train_step(state, X, 1e6 * Y)
    same(state.params, first)
    assert state.dynamic_scale.scale == 2.0**126
    state = train_step(state.replace(dynamic_scale=DynamicScale()), X, Y)
    assert not np.array_equal(state.params["Dense_1"]["bias"], jnp.zeros(1))
    assert state.step == 2
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    same(restored, state)
    with pytest.raises(TypeError, match=r"missing 1 required .*: 'batch_stats'"):
        Scaled.create(apply_fn=None, params=first, tx=tx, dynamic_scale=start)


@pytest.mark.wide
def test_a_jitted_loop_compiles_once_and_keeps_its_transformation():
    traces = []

    @jax.jit
    def counted(state, x, y):
        traces.append(1)
        return step(state, x, y)

    tx = optloss.make_optimizer(0.05, "adam", clip_gradients=1.0)
    state = counted(create(tx).replace(step=jnp.zeros((), jnp.int32)), X, Y)
    for _ in range(4):
        state = counted(state, X, Y)
    assert len(traces) == 1
    assert state.tx is tx
    replaced = state.apply_gradients(grads=state.params, tx=optax.sgd(0.1))
    assert replaced.tx is not tx


def test_the_loop_equals_one_of_optax_alone():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
    own = create(tx)
    params, batch_stats, opt_state = own.params, own.batch_stats, own.opt_state
    ours = create(optloss.make_optimizer(0.05, "adam", clip_gradients=1.0))
    grad = jax.jit(jax.grad(loss_and_stats, has_aux=True))
    for _ in range(5):
        grads, batch_stats = grad(params, batch_stats, X, Y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ours = jax.jit(step)(ours, X, Y)
    for found, expected in [(ours.params, params), (ours.batch_stats, batch_stats)]:
        close = jax.tree.map(
            lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
        )
        assert all(jax.tree.leaves(close))


def test_the_guard_sees_the_loss():
    state = create(optloss.make_optimizer(0.1, "adam", skip_nonfinite=True))
    grads = jax.tree.map(jnp.ones_like, state.params)
    skipped = state.apply_gradients(grads=grads, extra={"value": jnp.nan})
    same(skipped.params, state.params)
    assert skipped.step == 1
    assert optloss.get_summaries(skipped)["skipped/total"] == 1
    made = skipped.apply_gradients(grads=grads, extra={"value": jnp.float32(1)})
    assert optloss.get_summaries(made)["skipped/total"] == 1
    assert not np.array_equal(made.params["Dense_1"]["bias"], jnp.zeros(1))


def test_decay_reads_the_step_it_is_given():
    tx = optloss.make_optimizer(
        1.0, "SGD", learning_rate_decay_fn=lambda rate, step: rate * 0.5**step
    )
    state = create(tx).replace(step=3)
    grads = jax.tree.map(jnp.ones_like, state.params)
    counting = state.apply_gradients(grads=grads)
    assert optloss.get_summaries(counting)["learning_rate"] == 1.0
    given = state.apply_gradients(grads=grads, extra={"step": state.step})
    assert optloss.get_summaries(given)["learning_rate"] == 0.125


def test_a_run_restored_from_bytes_goes_on_bit_for_bit():
    tx = optloss.make_optimizer(0.05, "adam", gradient_noise_scale=0.1)
    advance = jax.jit(step)
    half = create(tx)
    for _ in range(3):
        half = advance(half, X, Y)
    whole = half
    half = serialization.from_bytes(create(tx), serialization.to_bytes(half))
    for _ in range(3):
        whole, half = advance(whole, X, Y), advance(half, X, Y)
    same((whole.params, whole.batch_stats), (half.params, half.batch_stats))


def test_a_field_that_is_none_is_refused():
    state = create(optax.sgd(0.1))
    message = (
        "TrainState.apply_gradients(value=0.5): the state has no such field. If it is "
        "meant for the optimizer, pass extra={'value': ...}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        state.apply_gradients(grads=state.params, value=0.5)


def test_extra_arguments_have_names():
    state = create(optax.sgd(0.1))
    message = (
        "TrainState.apply_gradients(extra=0.5): must map names to values, such as "
        "{'value': loss}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        state.apply_gradients(grads=state.params, extra=0.5)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_without_flax_the_import_says_what_to_install(monkeypatch, name):
    module = f"optloss.integrations.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    for package in [m for m in sys.modules if m.split(".")[0] == "flax"]:
        monkeypatch.delitem(sys.modules, package)
    monkeypatch.setitem(sys.modules, "flax", None)
    message = f"{module} needs flax. Install it: pip install 'optloss[flax]'"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        importlib.import_module(module)


def test_a_module_is_no_tree_of_parameters():
    op = optloss.optimize_loss(lambda params: 0.0, 0, 0.1, "adam")
    with pytest.raises(ValueError, match=r"that it makes: module\.init\(key, x\)\.$"):
        op.init(nn.Dense(3))

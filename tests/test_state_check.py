"""A state of another op is refused when it is first traced, and no other is."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from state_pairs import PAIRS, PARAMS, loss, op_of

import optloss

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def taken(run, state):
    """Return what ``run`` made of ``state``; it has to be finite."""
    state, output = run(state, X)
    assert np.isfinite(output.loss).all()
    return state


@pytest.mark.parametrize("pair", PAIRS)
def test_a_state_of_another_op(pair):
    old, new, part = PAIRS[pair]
    state = op_of(**old).init(PARAMS)
    if part is None:
        taken(op_of(**new), state)
        return
    for run in (op_of(**new), jax.jit(op_of(**new).update), op_of(**new).update):
        with pytest.raises(ValueError, match=r"state of another op\. Its ") as raised:
            run(state, X)
        message = str(raised.value)
        assert f"Its {part}" in message
        assert "train_op.adopt(state)" in message


def test_the_words():
    state = op_of(clip_gradients=1.0).init(PARAMS)
    with pytest.raises(ValueError, match="another op") as raised:
        op_of()(state, X)
    assert str(raised.value) == (
        "train_op(state): this is the state of another op. Its clip: ClipState; here: "
        "none. train_op.adopt(state) makes one of it, with all that fits."
    )


def test_moments_of_another_shape():
    op = op_of()
    state = op.init(PARAMS)
    other = PARAMS | {"body": PARAMS["body"] | {"bias": jnp.ones(1)}}
    with pytest.raises(ValueError, match="another op") as raised:
        op(state._replace(params=other), X)
    assert str(raised.value) == (
        "train_op(state): this is the state of another op. Its optimizer, "
        "'inner/0/mu/body/bias': float32[2]; here: float32[1]. train_op.adopt(state) "
        "makes one of it, with all that fits."
    )


def test_a_missing_model_state():
    def with_model_state(params, model_state, x):
        return loss(params, x)

    op = optloss.optimize_loss(
        with_model_state,
        0,
        0.1,
        "adam",
        update_ops=[lambda model_state, _: model_state],
    )
    state = op.init(PARAMS, {})
    taken(op, state)
    state = op.init(PARAMS, {})._replace(model_state=None)
    with pytest.raises(ValueError, match="Its model_state: none"):
        op(state, X)


@pytest.mark.wide
@pytest.mark.parametrize("pair", PAIRS)
def test_a_state_of_another_chain(pair):
    old, new, part = PAIRS[pair]
    if part == "step counter":
        return
    state = op_of(**old).tx.init(PARAMS)
    tx = op_of(**new).tx
    for params in (PARAMS, None):
        extra = {"params": params, "step": 0, "value": jnp.float32(1)}
        update = functools.partial(tx.update, **extra)
        if part is None:
            jax.jit(update)(PARAMS, state)
            continue
        with pytest.raises(ValueError, match=f"Its {part}.*carry_over"):
            jax.jit(update)(PARAMS, state)


# What a check of dtypes, or outside of the trace, would break.


def everything():
    return op_of(
        optimizer="adamw",
        clip_gradients=optloss.adaptive_clipping(),
        gradient_noise_scale=0.1,
        skip_nonfinite=True,
        pack_small_leaves=4,
    )


OPS = {"plain": op_of, "everything": everything}
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.mark.wide
@ops
def test_states_of_a_jitted_init_and_a_jit_of_the_users(op):
    state = taken(op(), jax.jit(op().init)(PARAMS))
    taken(jax.jit(op().update), state)


@pytest.mark.wide
@ops
def test_states_under_vmap(op):
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    states = jax.vmap(op().init)(many)
    states = taken(jax.vmap(op().update, in_axes=(0, None)), states)
    assert states.step.shape == (2,)


@ops
def test_states_in_a_scan(op):
    train_op = op()
    state, _ = jax.lax.scan(
        lambda state, _: (train_op.update(state, X)[0], None),
        train_op.init(PARAMS),
        length=3,
    )
    assert state.step == 3


def test_states_in_a_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), PARAMS["head"])
    op = optloss.optimize_loss(
        lambda p, x: jnp.sum(p["kernel"] ** 2) + jnp.sum(p["bias"]) * jnp.mean(x),
        *(0, 0.1, "adam"),
        clip_gradients=1.0,
        axis_name="data",
        replica_axis_name=(),
    )
    state = op.init(params)
    spec = jax.tree.map(
        lambda leaf: PartitionSpec("data") if leaf.ndim else PartitionSpec(), state
    )
    run = jax.shard_map(
        lambda state, x: op.update(state, x)[0],
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )
    assert jax.jit(run)(state, X).step == 1


@ops
def test_restored_leaves(op):
    """NumPy's arrays, an int for the step."""
    state = jax.device_get(op().init(PARAMS))
    taken(op(), state)
    taken(op(), state._replace(step=3))
    taken(op().update, state._replace(step=3))


@ops
def test_swapped_parameters(op):
    state = op().init(PARAMS)
    taken(op(), state._replace(params=jax.tree.map(lambda leaf: 3 * leaf, PARAMS)))


def test_bfloat16_in_mid_run():
    op = op_of(clip_gradients=1.0, skip_nonfinite=True)
    state = op.init(PARAMS)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    taken(op, state._replace(params=half))


def test_weak_types():
    op = op_of()
    state = op.init(PARAMS)
    rate = state.opt_state.optimizer._replace(base=0.5)
    taken(op, state._replace(opt_state=state.opt_state._replace(optimizer=rate)))


def odd_optimizer(init):
    descend = optax.scale(-0.1)
    return optax.GradientTransformation(
        init, lambda updates, state, _=None: (descend.update(updates, ())[0], state)
    )


def test_an_init_that_cannot_be_traced_is_not_checked():
    def init(params):
        assert all(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(params))
        return jnp.zeros(3)

    op = op_of(optimizer=odd_optimizer(init), learning_rate=None)
    state = op.init(PARAMS)
    longer = state.opt_state._replace(optimizer=jnp.zeros(4))
    taken(op, state._replace(opt_state=longer))


def test_an_init_that_never_makes_the_same_twice_is_not_checked():
    calls = []

    def init(params):
        del params
        calls.append(1)
        return {f"call {len(calls)}": jnp.zeros(3)}

    op = op_of(optimizer=odd_optimizer(init), learning_rate=None)
    taken(op, op.init(PARAMS))


def test_a_check_costs_a_step_nothing():
    calls = []

    def init(params):
        calls.append(1)
        return jax.tree.map(jnp.zeros_like, params)

    op = op_of(optimizer=odd_optimizer(init), learning_rate=None)
    state = op.init(PARAMS)
    for _ in range(3):
        state = taken(op, state)
    for _ in range(3):
        state = taken(op.update, state)
    assert len(calls) == 2


def test_a_copy_of_an_op():
    op = everything()
    taken(copy.deepcopy({"op": op})["op"], op.init(PARAMS))


def test_a_key_of_another_kind():
    op = op_of(gradient_noise_scale=0.1)
    state = op.init(PARAMS)
    with jax.default_prng_impl("rbg"):
        other = op_of(gradient_noise_scale=0.1)
        with pytest.raises(ValueError, match="Its noise, 'key': uint32") as raised:
            other(state, X)
        assert "uint32[2]; here: uint32[4]" in str(raised.value)
        taken(other, other.adopt(state))

"""A state of another op made into one of this: what is alike is kept, bit for bit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from state_pairs import PACKED, PAIRS, PARAMS, loss, op_of

import optloss

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def trained(op, steps=3, params=PARAMS):
    state = op.init(params)
    for _ in range(steps):
        state, _ = op(state, X)
    return state


def adopted(op, state, params=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return op.adopt(state, params)


def same(one, other):
    one, other = map(np.asarray, map(without_kind, (one, other)))
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def without_kind(leaf):
    is_key = jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    leaves = map(jax.tree.leaves, (one, other))
    assert all(map(same, *leaves))


def plain(op_options, state):
    """Return the leaves of an optimizer's state by name, unpacked."""
    size = op_options.get("pack_small_leaves", 0)
    variables = op_options.get("variables")
    opt_state = optloss.unpack_state(
        state.opt_state, state.params, size, variables=variables
    )
    pairs, _ = jax.tree_util.tree_flatten_with_path(opt_state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in pairs
    }


# What is kept where the old op and the new one differ: parts of names, all of them
# leaves of the new state.
MOMENTS = ("inner/0/mu", "inner/0/nu", "inner/0/count")
KEPT = {
    "unguarded to guarded": MOMENTS,
    "guarded to unguarded": MOMENTS,
    "none to clip": MOMENTS,
    "clip to adaptive": MOMENTS,
    "adaptive to clip": MOMENTS,
    "none to noise": MOMENTS,
    "noise to none": MOMENTS,
    "number to schedule": MOMENTS,
    "schedule to number": MOMENTS,
    "counter to none": MOMENTS,
    "adam to adamw": MOMENTS,
    "a rate's own instance": ("0/mu", "0/nu", "0/count"),
    "an unfrozen body": ("mu/head", "nu/head", "count", "base"),
    "a frozen body": ("mu/head", "nu/head", "count", "base"),
    "packed to unpacked": (*MOMENTS, "base"),
    "unpacked to packed": (*MOMENTS, "base"),
    "packed at another size": (*MOMENTS, "base"),
    "packed, unfrozen": ("mu/head", "nu/head", "count", "base"),
    "adam to nadam": (*MOMENTS, "base"),
    "RMSProp, centered": ("base",),
    "another rate": (*MOMENTS, "base"),
}
FRESH = {
    "adam to SGD": ("base",),
    "SGD to adam": ("mu", "nu", "count", "base"),
    "adam to Adam": ("m/", "v/", "inner/step", "base"),
    "adam to amsgrad": ("mu", "nu", "count", "base"),
    "adam to lion": ("mu", "count", "base"),
    "adam to adamw": ("base",),
    "Adagrad to Momentum": ("accumulator", "base"),
    "Momentum to Ftrl": ("accumulator", "linear", "base"),
    "RMSProp, centered": ("mean_square", "mean_gradient"),
    "clip to adaptive": ("clip/",),
    "adaptive to clip": ("clip/",),
    "current to previous": ("clip/",),
    "an unfrozen body": ("mu/body", "nu/body"),
    "packed, unfrozen": ("mu/body", "nu/body"),
    "kernels to biases": ("mu", "nu", "count"),
    "packed, of like shapes": ("mu", "nu", "count"),
}


@pytest.mark.wide
@pytest.mark.parametrize("pair", PAIRS)
def test_adopt_keeps_what_is_alike_and_starts_the_rest(pair):
    old, new, _ = PAIRS[pair]
    before, op = trained(op_of(**old)), op_of(**new)
    state = adopted(op, before)
    assert_same(state.params, before.params)
    if state.step is not None and before.step is not None:
        assert state.step == 3
    ours, theirs = plain(new, state), plain(old, before)
    first = plain(new, op.init(before.params))
    _, kept, fresh = _carried(before, op)
    assert sorted([*kept, *fresh]) == sorted(ours)
    for name in kept:
        short = name.removeprefix("inner/") if name not in theirs else name
        source = theirs.get(name, theirs.get(short, theirs.get(f"inner/{name}")))
        if source is None:  # under another path, as in an instance of its own
            continue
        assert same(ours[name], source), name
    for name in fresh:
        assert same(ours[name], first[name]), name
    for part in KEPT.get(pair, ()):
        assert any(part in name for name in kept), part
        assert not any(part in name for name in fresh), part
    for part in FRESH.get(pair, ()):
        assert any(part in name for name in fresh), part
        assert not any(part in name for name in kept), part
    assert np.isfinite(op(state, X)[1].loss)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def _carried(before, op):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return optloss.carry_over(before.opt_state, op.tx.init(before.params))


@pytest.mark.wide
@pytest.mark.parametrize("packed", [0, 4])
def test_a_run_that_adopts_its_own_state_ends_as_one_that_did_not(packed):
    def op():
        return op_of(
            optimizer="adamw",
            gradient_noise_scale=0.1,
            clip_gradients=optloss.adaptive_clipping(),
            skip_nonfinite=True,
            pack_small_leaves=packed,
        )

    state = trained(op(), 2)
    state = op().adopt(state)
    for _ in range(2):
        state, _ = op()(state, X)
    assert_same(state, trained(op(), 4))


def test_unfreezing_keeps_the_heads_moments_and_warns_of_the_body():
    before = trained(op_of(variables="head/*"))
    op = op_of()
    with pytest.warns(UserWarning, match="newly trained") as caught:
        state = op.adopt(before)
    assert str(caught[0].message) == (
        "train_op.adopt: 'body/bias', 'body/kernel', newly trained, start with fresh "
        "moments under the count of 'optimizer/inner/0', which has moved on. Where it "
        "corrects a bias, as Adam's does, their first steps are up to six times too "
        "long: start them at a lower rate, with learning_rate_multipliers for example."
    )
    adam, was = (s.opt_state.optimizer.inner[0] for s in (state, before))
    assert_same((adam.count, adam.mu["head"]), (was.count, was.mu["head"]))
    assert not jnp.any(adam.mu["body"]["kernel"])


def test_nothing_is_warned_of_where_all_is_known_or_nothing_has_moved():
    op_of(variables="head/*").adopt(trained(op_of()))
    op_of().adopt(op_of(variables="head/*").init(PARAMS))


def test_a_layer_added():
    before = trained(op_of())
    params = PARAMS | {"more": {"kernel": jnp.full((2, 2), 5.0)}}
    state = adopted(op_of(), before, params)
    assert_same(state.params["head"], before.params["head"])
    assert jnp.all(state.params["more"]["kernel"] == 5)
    adam, was = (s.opt_state.optimizer.inner[0] for s in (state, before))
    assert_same(adam.nu["body"], was.nu["body"])
    assert not params["more"]["kernel"].is_deleted()
    op_of()(state, X)
    assert not params["more"]["kernel"].is_deleted()


def test_a_layer_of_another_shape_is_a_new_one():
    before = trained(op_of())
    head = {"kernel": jnp.full((2, 7), 0.5), "bias": jnp.ones(7)}
    state = adopted(op_of(), before, PARAMS | {"head": head})
    assert_same(state.params["head"], head)
    adam, was = (s.opt_state.optimizer.inner[0] for s in (state, before))
    assert_same((adam.count, adam.mu["body"]), (was.count, was.mu["body"]))
    assert not jnp.any(adam.mu["head"]["bias"])


# Raw checkpoints


def raw_orbax(folder, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "orbax")


def raw_msgpack(folder, state):
    del folder
    return serialization.msgpack_restore(serialization.to_bytes(state))


RAW = {"orbax": raw_orbax, "msgpack": raw_msgpack}
raws = pytest.mark.parametrize("raw", RAW.values(), ids=RAW)


@pytest.mark.wide
@raws
@pytest.mark.parametrize("packed", [0, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "RMSProp", "Ftrl", "SGD"])
def test_a_raw_checkpoint_goes_on_bit_for_bit(raw, packed, optimizer, tmp_path):
    def op():
        return op_of(
            optimizer=optimizer,
            gradient_noise_scale=0.1,
            clip_gradients=optloss.adaptive_clipping(),
            skip_nonfinite=True,
            pack_small_leaves=packed,
            variables=["head/*", "body/kernel"],
        )

    before = trained(op(), 2)
    tree = raw(tmp_path, before)
    state = op().adopt(tree)
    assert_same(state, op().adopt(before))
    assert_same(state, trained(op(), 2))
    unpacked = adopted(op_of(optimizer=optimizer), tree)
    kept = unpacked.opt_state.optimizer.base
    assert same(kept, before.opt_state.inner.optimizer.base)


@raws
def test_a_raw_checkpoint_of_another_optimizer(raw, tmp_path):
    tree = raw(tmp_path, trained(op_of(clip_gradients=1.0, learning_rate=0.5)))
    state = op_of(optimizer="SGD").adopt(tree)
    assert_same(state.opt_state, op_of(optimizer="SGD").init(PARAMS).opt_state)
    assert state.step == 3


@raws
def test_a_packed_checkpoint_without_names(raw, tmp_path):
    tree = raw(tmp_path, trained(op_of(**PACKED)))
    del tree["opt_state"]["packed"]
    with pytest.raises(ValueError, match="without their names") as raised:
        op_of(**PACKED).adopt(tree)
    assert str(raised.value) == (
        "train_op.adopt: the state holds packed parameters without their names, so "
        "whose moments they are is not known. Unpack it first with unpack_state, where "
        "it was packed."
    )


@pytest.mark.parametrize("old", [None, 3, {"step": 1}, (1, 2)])
def test_what_is_no_state(old):
    with pytest.raises(ValueError, match=r"train_op\.adopt\(old_state=.*TrainOpState"):
        op_of().adopt(old)


def test_traced():
    before = trained(op_of())
    op = op_of(clip_gradients=1.0)
    assert_same(jax.jit(op.adopt)(before), op.adopt(before))


def test_a_chain_of_optax():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(PARAMS, state, PARAMS)
    new = optloss.make_optimizer(0.1, "adam", clip_gradients=1.0)
    made, kept, fresh = optloss.carry_over(state, new.init(PARAMS))
    assert_same(made.optimizer.inner[0], state[1][0])
    assert [name for name in kept if "/mu" not in name and "/nu" not in name] == [
        "optimizer/inner/0/count"
    ]
    assert "clip/step" in fresh


def test_groups_of_optax():
    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda p, _: str(p[-1].key), params)

    def groups():
        return optax.partition(
            {"kernel": optax.adam(0.1), "bias": optax.adam(0.2)}, labels
        )

    single = optax.adam(0.1)
    state = single.init(PARAMS)
    for _ in range(2):
        _, state = single.update(PARAMS, state, PARAMS)
    parted, _, fresh = optloss.carry_over(state, groups().init(PARAMS))
    assert not fresh
    adam = parted.inner_states["bias"].inner_state[0]
    assert same(adam.mu["head"]["bias"], state[0].mu["head"]["bias"])
    back, _, fresh = optloss.carry_over(parted, single.init(PARAMS))
    assert not fresh
    assert_same(back, state)


@pytest.mark.wide
def test_a_parameter_that_moves_to_another_group_keeps_its_moments():
    old = op_of(
        optimizer={"**/kernel": "adam", "**": "adamw"},
        learning_rate={"**/kernel": 0.1, "**": 0.2},
    )
    new = op_of(optimizer={"head/*": "adam", "**": "adamw"}, learning_rate=0.1)
    before = trained(old)
    state = adopted(new, before)

    def adams(state):
        nodes = jax.tree.leaves(state, is_leaf=is_adam)
        return [node for node in nodes if is_adam(node)]

    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    def moments(state, name):
        return {
            key: leaf
            for adam in adams(state.opt_state)
            for key, leaf in adam.mu[name].items()
            if isinstance(leaf, jax.Array)
        }

    for name in ("body", "head"):
        assert moments(before, name).keys() == {"kernel", "bias"}
        assert_same(moments(state, name), moments(before, name))
    assert [int(adam.count) for adam in adams(state.opt_state)] == [3, 3]
    assert np.isfinite(new(state, X)[1].loss)


def test_an_eager_loss_is_still_the_same():
    """The table's loss trains: what is kept is not all zeros."""
    state = trained(op_of())
    assert jnp.any(state.opt_state.optimizer.inner[0].mu["head"]["kernel"] != 0)
    assert loss(state.params, X) < loss(PARAMS, X)

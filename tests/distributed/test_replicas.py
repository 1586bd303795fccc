"""Where types do not say what the devices share: ``pmap`` and ``check_vma=False``."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributed.meshes import (
    AUTO,
    distance,
    loss,
    make_batches,
    make_mesh,
    make_params,
    specs_of,
)
from jax.sharding import PartitionSpec as P

import optloss

STEPS = 5
RATE = 1e-3
OPTIONS = {
    "plain": {},
    "everything": {
        "clip_gradients": 0.5,
        "gradient_noise_scale": 0.01,
        "gradient_multipliers": {"dense/*": 0.5},
        "skip_nonfinite": True,
        "summaries": ["loss", "global_gradient_norm"],
    },
}
CLIPPED = {
    "clip_gradients": 0.5,
    "skip_nonfinite": True,
    "summaries": ["loss", "global_gradient_norm"],
}
EACH = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
SHARDED = {
    "embedding": P("model"),
    "dense": {"kernel": P("model"), "bias": P("model")},
    "scale": P("model"),
}


def params_of_vectors():
    """The parameters of ``loss``, none of them a scalar, which no axis divides."""
    return {**make_params(), "scale": np.full(32, 1.5, np.float32)}


def mean_loss(axes):
    return lambda *args: jax.lax.pmean(loss(*args), axes)


def gathered_loss(axes, model="model"):
    def local(params, x, y):
        whole = functools.partial(jax.lax.all_gather, axis_name=model, tiled=True)
        return jax.lax.pmean(loss(jax.tree.map(whole, params), x, y), axes)

    return local


def alone(params, options):
    op = optloss.optimize_loss(loss, 0, RATE, "sgd", **options)
    state = op.init(params)
    for batch in make_batches(STEPS):
        state, output = op(state, *batch)
    return state, output


def by_pmap(op, state):
    state = jax.tree.map(lambda leaf: np.stack([leaf] * 2), state)
    step = jax.pmap(op.update, axis_name="data")
    for x, y in make_batches(STEPS):
        state, output = step(state, x.reshape(2, 16, -1), y.reshape(2, 16, -1))
    return jax.tree.map(lambda leaf: leaf[1], (state, output))


def by_shard_map(op, state, shape, names, specs=None, check_vma=False):
    spread = specs_of(state, specs or {})
    step = jax.jit(
        jax.shard_map(
            op.update,
            mesh=make_mesh(shape, names, AUTO),
            in_specs=(spread, P(names), P(names)),
            out_specs=(spread, P()),
            check_vma=check_vma,
        )
    )
    for batch in make_batches(STEPS):
        state, output = step(state, *batch)
    return state, output


def assert_alike(found, expected):
    assert distance(found[0].params, expected[0].params) < 2e-6
    np.testing.assert_allclose(found[1].loss, expected[1].loss, rtol=2e-6)
    for tag, value in expected[1].summaries.items():
        np.testing.assert_allclose(found[1].summaries[tag], value, rtol=2e-6)


@EACH
@pytest.mark.parametrize("axis_name", [None, "data"])
def test_pmap_averages_the_gradients_of_replicas(options, axis_name):
    op = optloss.optimize_loss(
        mean_loss("data"), 0, RATE, "sgd",
        axis_name=axis_name, replica_axis_name="data", **options,
    )  # fmt: skip
    found = by_pmap(op, op.init(make_params()))
    assert_alike(found, alone(make_params(), options))


@EACH
@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_averages_them_once(options, check_vma):
    op = optloss.optimize_loss(
        mean_loss("data"), 0, RATE, "sgd", replica_axis_name="data", **options
    )
    state = op.init(make_params())
    found = by_shard_map(op, state, (2,), ("data",), check_vma=check_vma)
    assert_alike(found, alone(make_params(), options))


@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_get_the_gradient_of_one_loss(check_vma):
    """Not that of the sum of the losses that two devices return."""
    op = optloss.optimize_loss(
        gathered_loss("model"), 0, RATE, "sgd",
        axis_name="model", replica_axis_name=(), **CLIPPED,
    )  # fmt: skip
    state = op.init(params_of_vectors())
    found = by_shard_map(op, state, (2,), ("model",), SHARDED, check_vma)
    assert_alike(found, alone(params_of_vectors(), CLIPPED))


@pytest.mark.parametrize("check_vma", [False, True])
def test_some_axes_hold_replicas_and_others_shards(check_vma):
    names = ("data", "model")
    op = optloss.optimize_loss(
        gathered_loss(names), 0, RATE, "sgd",
        axis_name=names, replica_axis_name="data", **CLIPPED,
    )  # fmt: skip
    state = op.init(params_of_vectors())
    found = by_shard_map(op, state, (2, 2), names, SHARDED, check_vma)
    assert_alike(found, alone(params_of_vectors(), CLIPPED))


UNKNOWN = (
    "under pmap, and shard_map with check_vma=False, types do not say whether the "
    "parameters are the same on all devices, and their gradients are not averaged. "
    "Name the axes along which they are: optimize_loss(replica_axis_name=...), or () "
    "for none: all are sharded along axis_name, or the devices train apart."
)


@pytest.mark.parametrize(
    "run",
    [by_pmap, functools.partial(by_shard_map, shape=(2,), names=("data",))],
    ids=["pmap", "shard_map"],
)
@pytest.mark.parametrize("axis_name", ["data", None])
def test_it_is_not_guessed_what_the_devices_share(run, axis_name):
    op = optloss.optimize_loss(mean_loss("data"), 0, RATE, "sgd", axis_name=axis_name)
    call = f"train_op.update(axis_name={axis_name!r}): "
    with pytest.raises(ValueError, match=f"^{re.escape(call + UNKNOWN)}"):
        run(op, op.init(make_params()))


def test_devices_may_train_apart():
    op = optloss.optimize_loss(loss, 0, RATE, "sgd", replica_axis_name=())
    state = jax.tree.map(lambda leaf: np.stack([leaf] * 2), op.init(make_params()))
    x, y = make_batches(1)[0]
    halves = x.reshape(2, 16, -1), y.reshape(2, 16, -1)
    found, _ = jax.pmap(op.update, axis_name="data")(state, *halves)
    alone = optloss.optimize_loss(loss, 0, RATE, "sgd")
    for i in range(2):
        expected, _ = alone(alone.init(make_params()), halves[0][i], halves[1][i])
        one = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        assert distance(one.params, expected.params) < 2e-6


@pytest.mark.parametrize("argument", ["axis_name", "replica_axis_name"])
def test_an_axis_of_no_shard_map(argument):
    op = optloss.optimize_loss(
        lambda w: jnp.sum(w**2), 0, RATE, "sgd", **{argument: "data"}
    )
    state = op.init(jnp.ones(3))
    for step in (op, op.update, jax.jit(op.update)):
        with pytest.raises(ValueError, match=r"\('data',\) is no axis of a shard_map"):
            step(state)

"""Moments live beside their parameters, and what mirrors none on the whole mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optloss.mesh import manual_axes, shard_state

SPEC = {"w": PartitionSpec("x"), "b": PartitionSpec()}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((4,), ("x",), axis_types=(request.param,))


def parameters(mesh):
    leaves = {"w": jnp.ones((8, 2)), "b": jnp.ones(2)}
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, SPEC[name]))
        for name, leaf in leaves.items()
    }


def a_state():
    return {
        "moments": {"w": jnp.zeros((8, 2)), "b": jnp.zeros(2)},
        "factored": {"w": jnp.zeros(8)},
        "other": jnp.zeros((8, 2)),
        "step": jnp.int32(0),
    }


def spread(leaf):
    """Tell over how many devices a leaf lies, and how much of it each holds."""
    shard = leaf.sharding.shard_shape(leaf.shape)
    return len(leaf.sharding.device_set), shard


def test_leaves_are_placed_like_what_they_mirror(mesh):
    placed = shard_state(a_state(), parameters(mesh))
    assert jax.tree.map(spread, placed) == {
        "moments": {"w": (4, (2, 2)), "b": (4, (2,))},
        "factored": {"w": (4, (8,))},
        "other": (4, (8, 2)),
        "step": (4, ()),
    }


def test_under_jit_moments_follow_their_parameters(mesh):
    with jax.set_mesh(mesh):
        place = jax.jit(lambda params: shard_state(a_state(), params))
        placed = place(parameters(mesh))
    assert spread(placed["moments"]["w"]) == (4, (2, 2))
    assert spread(placed["moments"]["b"]) == (4, (2,))


def test_manual_axes_have_the_mesh_s_order():
    """All processes of a cluster must compile the same program, and sets differ."""
    names = tuple("hgfedcba")
    found = []

    def look(leaf):
        found.append(manual_axes())
        return leaf

    spread = jax.shard_map(
        look,
        mesh=jax.make_mesh((1,) * 8, names),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
    )
    jax.eval_shape(spread, jnp.zeros(()))
    assert found[0] == names


def test_what_lies_on_the_mesh_already_stays(mesh):
    rows = NamedSharding(mesh, PartitionSpec("x"))
    state = a_state() | {"other": jax.device_put(jnp.zeros((8, 2)), rows)}
    assert spread(shard_state(state, parameters(mesh))["other"]) == (4, (2, 2))


def test_on_one_device_nothing_is_moved():
    params = {"w": jnp.ones((8, 2)), "b": jnp.ones(2)}
    state = a_state()
    placed = shard_state(state, params)
    for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(state), strict=True):
        assert one is other


def test_parameters_on_another_device_take_the_state_with_them():
    device = jax.devices()[3]
    params = jax.device_put({"w": jnp.ones((8, 2)), "b": jnp.ones(2)}, device)
    for leaf in jax.tree.leaves(shard_state(a_state(), params)):
        assert leaf.devices() == {device}

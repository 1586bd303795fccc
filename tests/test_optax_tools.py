"""What optax's own functions do with transforms works with ours."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optloss

PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
RULES = {"dense/kernel": 0.5}
OPTIONS = {
    "plain": {},
    "rules": {
        "gradient_multipliers": RULES,
        "learning_rate_multipliers": RULES,
        "clip_gradients": 1.0,
        "skip_nonfinite": True,
    },
    "packed": {"pack_small_leaves": 4, "clip_gradients": 1.0},
    "all packed": {"pack_small_leaves": 100, "gradient_noise_scale": 0.1},
}
options = pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)


def make(**given):
    return optloss.make_optimizer(0.1, "adam", **given)


@options
def test_map_params(given):
    tx = make(**given)
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    inner = getattr(mapped, "inner", mapped).optimizer.inner[0]
    assert all(jnp.all(leaf == 1) for leaf in jax.tree.leaves((inner.mu, inner.nu)))
    assert inner.count == 0
    with_specs = optax.tree.map_params(
        tx, lambda _: "spec", state, transform_non_params=lambda _: "other"
    )
    assert {"spec", "other"} == set(jax.tree.leaves(with_specs))


def test_map_params_with_a_selection_of_them():
    tx = make(variables="dense/kernel", gradient_multipliers=RULES)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(PARAMS))
    assert jnp.all(mapped.optimizer.inner[0].mu["dense"]["kernel"] == 1)


@options
def test_an_empty_tree(given):
    tx = make(**given)
    for empty in ({}, {"a": None}, ()):
        updates, _ = tx.update(empty, tx.init(empty), empty)
        assert updates == empty


@options
def test_init_of_shapes(given):
    tx = make(**given)
    shapes = jax.eval_shape(lambda: PARAMS)
    of_shapes, of_arrays = tx.init(shapes), tx.init(PARAMS)
    assert jax.tree.structure(of_shapes) == jax.tree.structure(of_arrays)
    for one, other in zip(*map(jax.tree.leaves, (of_shapes, of_arrays)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.wide
@pytest.mark.parametrize("bad", [False, True])
def test_the_guard_outside_of_jit_on_an_explicit_mesh(bad):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        params = jax.device_put({"w": jnp.ones((4, 2)), "b": jnp.ones(2)}, sharded)
        gradients = jax.tree.map(lambda leaf: leaf * (jnp.nan if bad else 1), params)
        for tx in (
            optloss.skip_nonfinite(optax.adam(0.1)),
            make(skip_nonfinite=True, clip_gradients=1.0),
        ):
            updates, state = tx.update(gradients, tx.init(params), params)
            moved = optax.apply_updates(params, updates)
            assert bool(jnp.all(moved["w"] == 1)) == bad
            assert state.total == bad
            for name, leaf in moved.items():
                spread = params[name].sharding  # P("data") and P("data", None) are one
                assert leaf.sharding.is_equivalent_to(spread, leaf.ndim)

"""One table of transforms, each held to the whole contract of the parts."""

import functools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optloss
from optloss.optimizers import tensorflow

part = functools.partial


def halve(pairs):
    return [(gradient / 2, variable) for gradient, variable in pairs]


def decay(rate, step):
    return rate * 0.9**step


EVERYTHING = part(
    optloss.make_optimizer,
    0.1,
    "Adam",
    gradient_noise_scale=0.01,
    gradient_multipliers={"**/kernel": 2.0},
    clip_gradients=optloss.adaptive_clipping(),
    learning_rate_decay_fn=decay,
    learning_rate_multipliers={"**/kernel": 0.5},
    skip_nonfinite=True,
    seed=7,
)
TRANSFORMS = {
    "noise": part(optloss.add_gradient_noise, 0.1, annealing=0.55, key=3),
    "truncated noise": part(
        optloss.add_gradient_noise, 0.1, distribution="truncated_normal"
    ),
    "multipliers": part(
        optloss.multiply_gradients, {"dense/*": 0.5, "**/kernel": 0.0}
    ),
    "clip": part(optloss.clip_by_global_norm, 0.5),
    "clip by function": part(optloss.clip_by_function, halve),
    "adaptive clip": part(optloss.adaptive_clipping, 0.5, static_max_norm=1.0),
    "adaptive clip, previous": part(optloss.adaptive_clipping, statistics="previous"),
    "rate": part(optloss.scale_by_learning_rate, 0.1, decay),
    "schedule": part(
        optloss.scale_by_learning_rate, optax.linear_schedule(0.1, 0.0, 9)
    ),
    "injected adam": part(optloss.inject_learning_rate, optax.adam, 0.1, decay),
    "injected ftrl": part(optloss.inject_learning_rate, tensorflow.ftrl, 0.1),
    "guarded sgd": part(optloss.skip_nonfinite, optax.sgd(0.1, momentum=0.9)),
    "everything": EVERYTHING,
    "everything packed": part(EVERYTHING, pack_small_leaves=4),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)
NEED_PARAMS = {"clip by function", "injected ftrl"}
RANDOM = {"noise", "truncated noise"} | {n for n in TRANSFORMS if "everything" in n}
OPTIMIZERS = {n for n in TRANSFORMS if "injected" in n or "everything" in n}


def build(name):
    return TRANSFORMS[name]()


def parameters(*dtypes):
    """A tree with everything in it that a tree may hold."""
    return {
        "dense": {
            str(jnp.dtype(dtype)): jnp.linspace(-1, 1, 6).astype(dtype).reshape(2, 3)
            for dtype in dtypes
        },
        "layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(())},
        "empty": jnp.zeros((0, 4)),
        "none": None,
        "masked": optax.MaskedNode(),
        "table": jnp.arange(4),
        "flags": jnp.array([True, False]),
        "key": jax.random.key(0),
    }


def gradients(params, seed=0):
    """What JAX gives for such a tree: ``float0`` for whole numbers."""
    random = np.random.default_rng(seed)

    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        values = random.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            values = values + 1j * random.normal(size=leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(one, params)


def plain(dtype=jnp.float32):
    """A tree of one floating dtype, for wrappers that accept no more."""
    return {
        "dense": {"a": jnp.linspace(-1, 1, 6).astype(dtype).reshape(2, 3)},
        "layer": {"kernel": jnp.ones((3, 2), dtype), "bias": jnp.zeros((), dtype)},
    }


def is_arithmetic(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def kinds(tree):
    """The structure of a tree, and what type each of its leaves is of."""
    return jax.tree.structure(tree), [
        (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False))
        for leaf in jax.tree.leaves(tree)
    ]


def bits(tree):
    leaves = [
        jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def close(found, expected, tolerance=1e-5):
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(one, np.complex128),
            np.asarray(other, np.complex128),
            rtol=tolerance,
            atol=tolerance,
        )


def run(transform, params, steps=4, *, update=None):
    """Some updates one after the other: all of them, and the state at the end."""
    state, results = transform.init(params), []
    for seed in range(steps):
        updates, state = (update or transform.update)(
            gradients(params, seed), state, params
        )
        results.append(updates)
    return results, state


@every_transform
@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_dtypes_are_kept_and_the_rest_is_passed_on(name, wide):
    with jax.enable_x64(wide):
        dtypes = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
        params = parameters(*dtypes, *([jnp.float64, jnp.complex128] if wide else []))
        transform, grads = build(name), gradients(params)
        state = transform.init(params)
        updates, new_state = jax.jit(transform.update)(grads, state, params)
        assert kinds(new_state) == kinds(state)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        for before, after in zip(
            jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True
        ):
            assert after.shape == before.shape
            allowed = {before.dtype}
            if is_arithmetic(before) and name in OPTIMIZERS:
                allowed.add(jnp.promote_types(before.dtype, jnp.float32))
            assert after.dtype in allowed
            if is_arithmetic(after):
                assert np.isfinite(np.asarray(after, np.complex128)).all()
        moved = optax.apply_updates(
            optax.tree.cast(_arithmetic(params), None), _arithmetic(updates)
        )
        assert kinds(moved) == kinds(_arithmetic(params))


def _arithmetic(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if is_arithmetic(leaf)]


@every_transform
def test_whole_numbers_are_returned_as_they_came(name):
    params = parameters()
    transform, grads = build(name), gradients(params)
    rest = {key: params[key] for key in ("table", "flags", "key")}
    updates, _ = transform.update(grads | rest, transform.init(params), params)
    assert bits({key: updates[key] for key in rest}) == bits(rest)
    assert updates["none"] is None
    assert updates["masked"] == optax.MaskedNode()


@every_transform
def test_whole_numbers_are_not_counted(name):
    few = plain()
    more = few | {"table": jnp.array([10**6]), "flags": jnp.array([True])}
    transform, grads = build(name), gradients(few)
    rest = {key: more[key] for key in ("table", "flags")}
    alone, _ = transform.update(grads, transform.init(few), few)
    among, _ = transform.update(grads | rest, transform.init(more), more)
    assert bits({key: among[key] for key in few}) == bits(alone)


@every_transform
@pytest.mark.parametrize("tree", [{}, None, {"a": None}, {"n": jnp.arange(3)}], ids=str)
def test_a_tree_without_arithmetic_is_fine(name, tree):
    if "multipliers" in name or "everything" in name:
        pytest.skip("a multiplier of nothing is refused")
    transform = build(name)
    updates, state = transform.update(tree, transform.init(tree), tree)
    assert bits(updates) == bits(tree)
    assert kinds(state) == kinds(transform.init(tree))


@every_transform
def test_it_is_traced_once(name):
    transform, params, traces = build(name), parameters(jnp.bfloat16), []

    @jax.jit
    def update(*arguments):
        traces.append(1)
        return transform.update(*arguments)

    run(transform, params, update=update)
    assert len(traces) == 1


@every_transform
def test_scan_does_what_a_loop_does(name):
    transform, params = build(name), plain()
    results, last = run(transform, params)
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(gradients(params, s) for s in range(4))
    )

    def body(state, grads):
        updates, state = transform.update(grads, state, params)
        return state, updates

    state, scanned = jax.lax.scan(body, transform.init(params), stacked)
    close(state, last)
    close(scanned, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results))


@every_transform
def test_vmap_runs_several_at_once(name):
    transform, params = build(name), parameters(jnp.bfloat16)
    members = [
        jax.tree.map(
            lambda g, scale=scale: g * scale if is_arithmetic(g) else g,
            gradients(params),
        )
        for scale in (jnp.float32(0.01), jnp.float32(1), jnp.float32(jnp.nan))
    ]
    axes = jax.tree.map(lambda g: 0 if is_arithmetic(g) else None, members[0])
    batch = jax.tree.map(
        lambda axis, *leaves: leaves[0] if axis is None else jnp.stack(leaves),
        axes,
        *members,
        is_leaf=lambda leaf: leaf is None,
    )
    state = transform.init(params)
    many = jax.vmap(transform.update, in_axes=(axes, None, None))
    updates, states = many(batch, state, params)
    for i, grads in enumerate(members):
        alone, alone_state = transform.update(grads, state, params)
        close(
            _arithmetic(jax.tree.map(lambda leaf, i=i: leaf[i], _arithmetic(updates))),
            _arithmetic(alone),
            1e-2 if name in OPTIMIZERS else 1e-5,
        )
        close(jax.tree.map(lambda leaf, i=i: leaf[i], states), alone_state)

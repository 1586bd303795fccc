"""One table of transforms, each of them held to the whole contract of the parts."""

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
everything = part(
    optloss.make_optimizer,
    0.1,
    "Adam",
    gradient_noise_scale=0.01,
    gradient_multipliers={"**/kernel": 2.0},
    clip_gradients=optloss.adaptive_clipping(),
    learning_rate_decay_fn=lambda rate, step: rate * 0.9**step,
    learning_rate_multipliers={"**/dense/*": 0.5},
    skip_nonfinite=True,
    seed=7,
)
TRANSFORMS = {
    "noise": part(optloss.add_gradient_noise, 0.1, annealing=0.55, key=3),
    "truncated noise": part(
        optloss.add_gradient_noise, 0.1, distribution="truncated_normal"
    ),
    "multipliers": part(optloss.multiply_gradients, {"**/kernel": 0.5}),
    "clip": part(optloss.clip_by_global_norm, 0.5),
    "clip by function": part(
        optloss.clip_by_function, lambda pairs: [(g / 2, v) for g, v in pairs]
    ),
    "adaptive clip": part(optloss.adaptive_clipping, 0.5, static_max_norm=1.0),
    "adaptive clip, previous": part(optloss.adaptive_clipping, statistics="previous"),
    "zclip": part(optloss.zclip, 0.5, warmup=1),
    "autoclip": part(optloss.autoclip, 60, history=3),
    "adagc": part(optloss.adagc, 1.1, warmup=1),
    "agc": part(optloss.agc, 0.5),
    "rate": part(
        optloss.scale_by_learning_rate, 0.1, lambda rate, step: rate * 0.9**step
    ),
    "schedule": part(
        optloss.scale_by_learning_rate, optax.linear_schedule(0.1, 0.0, 9)
    ),
    "injected adam": part(optloss.inject_learning_rate, optax.adam, 0.1),
    "injected ftrl": part(optloss.inject_learning_rate, tensorflow.ftrl, 0.1),
    "guard": part(optloss.skip_nonfinite, optax.sgd(0.1, momentum=0.9)),
    "spikes": part(optloss.skip_spikes, optax.sgd(0.1, momentum=0.9), warmup=1),
    "everything": everything,
    "everything packed": part(everything, pack_small_leaves=4),
}
CLIPS = {"clip", "adaptive clip", "zclip", "autoclip", "adagc", "agc"}
# Their updates may be float32 until they are applied.
OPTIMIZERS = {"injected adam", "injected ftrl", "everything", "everything packed"}
NEED_A_PARAMETER = {"multipliers", "everything", "everything packed"}
# Functions, which optax.inject_hyperparams would take for schedules, and sizes.
STATIC = {
    "clip by function": ("fn",),
    "autoclip": ("history",),
    "rate": ("decay_fn",),
    "injected adam": ("factory",),
    "injected ftrl": ("factory",),
    "everything": ("learning_rate_decay_fn", "pack_small_leaves"),
    "everything packed": ("learning_rate_decay_fn", "pack_small_leaves"),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def build(name):
    return TRANSFORMS[name]()


def mixed_parameters():
    """A tree of everything that a tree may hold."""
    wide = jax.config.jax_enable_x64
    more = (jnp.float64, jnp.complex128) if wide else (jnp.float16, jnp.complex64)
    return {
        "dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16), "bias": jnp.float32(1)},
        "more": [jnp.ones(2, dtype) for dtype in more],
        "empty": jnp.zeros((0, 4)),
        "none": None,
        "masked": optax.MaskedNode(),
        "table": jnp.arange(4),
        "count": jnp.int32(7),
        "flags": jnp.array([True, False]),
        "key": jax.random.key(0),
    }


def mixed_gradients(params, seed=0, count=10**6):
    grads = gradients(params, seed) | {"count": jnp.int32(count)}
    return grads | {name: params[name] for name in ("flags", "key")}


def plain_parameters():
    return {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(())}}


def gradients(params, seed=0):
    """Return random numbers for a gradient, and ``float0`` for whole numbers."""
    random = np.random.default_rng(seed)

    def one(leaf):
        if not is_arithmetic(leaf):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        values = random.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            values = values + 1j * random.normal(size=leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(one, params)


def is_arithmetic(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def arithmetic(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if is_arithmetic(leaf)]


def kinds(tree):
    """Return the structure of a tree and what its leaves are, without their values."""
    return jax.tree.structure(tree), [
        (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False))
        for leaf in jax.tree.leaves(tree)
    ]


def bits(tree):
    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return str(leaf.dtype), np.asarray(leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def assert_close(found, expected, tolerance=1e-5):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@functools.cache
def compiled(name):
    """Return the update of plain parameters, compiled once for several tests."""
    return jax.jit(build(name).update)


@pytest.mark.parametrize(
    "wide",
    [False, pytest.param(True, marks=pytest.mark.wide)],
    ids=["32 bits", "64 bits"],
)
@every_transform
def test_types_stay_and_what_is_no_number_is_passed_on(name, wide):
    traces = []
    with jax.enable_x64(wide):
        transform, params = build(name), mixed_parameters()

        @functools.partial(jax.jit, donate_argnums=1)
        def update(*arguments):
            traces.append(1)
            return transform.update(*arguments)

        state = transform.init(params)
        expected = kinds(state)
        assert expected == kinds(jax.eval_shape(transform.init, params))
        for seed in range(3):
            grads = mixed_gradients(params, seed)
            updates, state = update(grads, state, params)
            assert kinds(state) == expected
            assert_passed_on(grads, updates, widened=name in OPTIMIZERS)
        # Integers are not counted: no other number changes if they do.
        alone, _ = update(
            mixed_gradients(params, count=0), transform.init(params), params
        )
        among, _ = update(mixed_gradients(params), transform.init(params), params)
        assert bits(arithmetic(alone)) == bits(arithmetic(among))
    assert len(traces) == 1


def assert_passed_on(grads, updates, *, widened):
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True)
    for before, after in pairs:
        assert after.shape == before.shape
        if not is_arithmetic(before):
            assert bits(after) == bits(before)
            continue
        wider = jnp.promote_types(before.dtype, jnp.float32)
        assert after.dtype in ({before.dtype, wider} if widened else {before.dtype})
        assert np.isfinite(np.asarray(after, np.complex128)).all()


@pytest.mark.wide
@pytest.mark.parametrize(
    "name", ["noise", "multipliers", *sorted(CLIPS), "rate", "guard"]
)
def test_no_nan_is_made_of_an_infinity(name):
    params = {"dense": {"kernel": jnp.ones(3), "wave": jnp.ones(2, jnp.complex64)}}
    grads = {
        "dense": {
            "kernel": jnp.array([jnp.inf, -jnp.inf, 1]),
            "wave": jnp.array([complex(np.inf, -2), complex(3, -np.inf)]),
        }
    }
    transform = build(name)
    updates, state = jax.jit(transform.update)(grads, transform.init(params), params)
    for leaf in jax.tree.leaves((updates, state)):
        parts = (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
        assert not any(np.isnan(part).any() for part in parts)


@pytest.mark.wide
@pytest.mark.parametrize("tree", [{}, (None,), {"n": jnp.arange(3)}], ids=str)
@pytest.mark.parametrize("name", sorted(TRANSFORMS.keys() - NEED_A_PARAMETER))
def test_a_tree_without_anything_to_train_is_fine(name, tree):
    transform = build(name)
    updates, state = jax.jit(transform.update)(tree, transform.init(tree), tree)
    assert bits(updates) == bits(tree)
    assert kinds(state) == kinds(transform.init(tree))


@every_transform
def test_it_takes_extra_arguments_of_all_kinds(name):
    transform, params = build(name), plain_parameters()
    assert isinstance(transform, optax.GradientTransformationExtraArgs)
    state = transform.init(params)
    _, after = jax.eval_shape(
        part(transform.update, step=3, value=jnp.float32(1), other="thing"),
        gradients(params),
        state,
        params,
    )
    assert kinds(after) == kinds(state)


@pytest.mark.parametrize(
    "name", sorted(TRANSFORMS.keys() - {"clip by function", "agc", "injected ftrl"})
)
def test_it_does_without_params(name):
    transform, params = build(name), plain_parameters()
    state = transform.init(params)
    updates, after = jax.eval_shape(transform.update, gradients(params), state)
    assert kinds(after) == kinds(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.wide
@every_transform
def test_scan_does_what_a_loop_does(name):
    params, state = plain_parameters(), build(name).init(plain_parameters())
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(gradients(params, s) for s in range(3))
    )

    def body(state, grads):
        updates, state = build(name).update(grads, state, params)
        return state, updates

    last, scanned = jax.lax.scan(body, state, stacked)
    for i in range(3):
        updates, state = compiled(name)(gradients(params, i), state, params)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], scanned), updates)
    assert_close(last, state)


@pytest.mark.wide
@every_transform
def test_vmap_does_several_at_once(name):
    params, state = plain_parameters(), build(name).init(plain_parameters())
    members = [
        jax.tree.map(lambda leaf, by=by: by * leaf, gradients(params))
        for by in (0.01, 1.0, np.nan)
    ]
    batch, states = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        for trees in (members, [state] * 3)
    )
    many = jax.jit(jax.vmap(build(name).update, in_axes=(0, 0, None)))
    updates, states = many(batch, states, params)
    for i, grads in enumerate(members):
        alone = compiled(name)(grads, state, params)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], (updates, states)), alone)


@pytest.mark.wide
@every_transform
def test_it_can_be_differentiated(name):
    params = plain_parameters()
    start, along = gradients(params, 0), gradients(params, 1)
    state = build(name).init(params)
    # A second update: the first of Adam is no function of the gradient's size.
    _, state = compiled(name)(gradients(params, 2), state, params)

    def total(update, grads):
        updates, _ = update(grads, state, params)
        return sum((leaf * (i + 1)).sum() for i, leaf in enumerate(arithmetic(updates)))

    def moved(by):
        there = jax.tree.map(lambda a, b: a + by * b, start, along)
        return total(compiled(name), there)

    slope = jax.jit(jax.grad(jax.checkpoint(part(total, build(name).update))))(start)
    directional = sum(
        jnp.vdot(a, b)
        for a, b in zip(arithmetic(slope), arithmetic(along), strict=True)
    )
    expected = (moved(0.01) - moved(-0.01)) / 0.02
    np.testing.assert_allclose(directional, expected, rtol=0.02, atol=2e-3)


@pytest.mark.wide
@every_transform
def test_inject_hyperparams_may_hold_its_numbers(name):
    made, params = TRANSFORMS[name], plain_parameters()
    factory = optax.inject_hyperparams(made.func, static_args=STATIC.get(name, ()))
    injected = factory(*made.args, **made.keywords)
    state = injected.init(params)
    updates, after = jax.jit(injected.update)(gradients(params), state, params)
    assert kinds(after) == kinds(state)
    alone, _ = compiled(name)(gradients(params), build(name).init(params), params)
    assert_close(updates, alone)


@pytest.mark.wide
@every_transform
def test_masked_and_multi_steps_may_wrap_it(name):
    """Two half steps of a masked transform are one whole step of it."""
    params = plain_parameters() | {"frozen": jnp.ones(3)}
    mask = {"dense": True, "frozen": False}
    wrapped = optax.MultiSteps(optax.masked(build(name), mask), 2)
    update, state = jax.jit(wrapped.update), wrapped.init(params)
    expected = kinds(state)
    halves = [gradients(params, seed) for seed in range(2)]
    first, state = update(halves[0], state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))
    second, state = update(halves[1], state, params)
    assert kinds(state) == expected
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert_close(second["frozen"], mean["frozen"])
    dense = {"dense": params["dense"]}
    alone, _ = compiled(name)({"dense": mean["dense"]}, build(name).init(dense), dense)
    assert_close(second["dense"], alone["dense"])


@every_transform
def test_partition_and_chain_may_hold_it(name):
    params = {"a": plain_parameters(), "b": plain_parameters()}
    labels = {"a": "ours", "b": "theirs"}
    parts = {"ours": optax.chain(build(name)), "theirs": optax.sgd(0.1)}
    transform = optax.partition(parts, labels)
    state = transform.init(params)
    _, after = jax.eval_shape(transform.update, gradients(params), state, params)
    assert kinds(after) == kinds(state)


def by_pickle(state, folder):
    del folder
    return pickle.loads(pickle.dumps(state))


def by_msgpack(state, folder):
    del folder
    return serialization.from_bytes(state, serialization.to_bytes(state))


def by_equinox(state, folder):
    eqx.tree_serialise_leaves(folder / "state.eqx", state)
    return eqx.tree_deserialise_leaves(folder / "state.eqx", state)


def by_orbax(state, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", state)


def by_npz(state, folder):
    leaves, structure = jax.tree.flatten(state)
    np.savez(folder / "state.npz", *leaves)
    with np.load(folder / "state.npz") as saved:
        # NumPy has no name for bfloat16, and reads it as raw bytes.
        read = [saved[f"arr_{i}"].view(leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, read)


@pytest.mark.parametrize(
    "saved_by", [by_pickle, by_msgpack, by_equinox, by_orbax, by_npz]
)
def test_every_saver_can_keep_the_states(saved_by, tmp_path):
    params = mixed_parameters()
    del params["empty"]  # Orbax saves no empty array, whosever it is.
    states = {name: build(name).init(params) for name in TRANSFORMS}
    read = saved_by(states, tmp_path)
    assert jax.tree.structure(read) == jax.tree.structure(states)
    assert bits(read) == bits(states)


@every_transform
def test_a_state_holds_plain_arrays_alone(name):
    for leaf in jax.tree.leaves(build(name).init(mixed_parameters())):
        assert isinstance(leaf, jax.Array)
        assert not leaf.weak_type
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


@every_transform
def test_it_may_be_sharded_over_explicit_axes(name):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec()}
    with jax.set_mesh(mesh):
        params = {
            "dense": {
                leaf: jax.device_put(values, NamedSharding(mesh, specs[leaf]))
                for leaf, values in (
                    ("kernel", jnp.ones((2, 4))),
                    ("bias", jnp.ones(())),
                )
            }
        }
        transform = build(name)
        state = jax.eval_shape(transform.init, params)
        updates, after = jax.eval_shape(transform.update, params, state, params)
        again, last = jax.eval_shape(transform.update, params, after, params)
    placed = jax.tree.map(lambda leaf: leaf.sharding.spec, updates)
    assert placed == {"dense": specs}
    assert [leaf.sharding for leaf in jax.tree.leaves(last)] == [
        leaf.sharding for leaf in jax.tree.leaves(after)
    ]
    assert kinds(again) == kinds(updates)


def test_donating_a_state_leaves_what_the_caller_gave():
    key, bound, rate = jax.random.key(3), jnp.float32(1), jnp.float32(0.1)
    transform = optax.chain(
        optloss.add_gradient_noise(0.1, key=key),
        optloss.clip_by_global_norm(bound),
        optloss.scale_by_learning_rate(rate),
    )
    params = plain_parameters()
    update = jax.jit(transform.update, donate_argnums=1)
    _, state = update(gradients(params), transform.init(params), params)
    update(gradients(params), state, params)
    assert not any(given.is_deleted() for given in (key, bound, rate))
    assert jax.random.uniform(key) < 1

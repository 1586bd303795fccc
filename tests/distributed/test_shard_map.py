"""Training inside ``shard_map`` and ``pmap``, where each device sees its own part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distributed.meshes import (
    AUTO,
    EXPLICIT,
    MIXED,
    REPLICATED,
    SHARDED,
    distance,
    line,
    loss,
    make_batches,
    make_mesh,
    make_params,
    manual_loss,
    put,
    specs_of,
)
from jax.sharding import PartitionSpec as P

import optloss

AXES = ("rows", "columns")
TREES = {
    "replicated": {"kernel": P(), "bias": P(), "phase": P(), "half": P(), "ids": P()},
    "sharded": {
        "kernel": P("rows", "columns"),
        "bias": P(AXES),
        "phase": P("columns", "rows"),
        "half": P(None, AXES),
        "ids": P("rows"),
    },
    "mixed": {
        "kernel": P("rows"),
        "bias": P(),
        "phase": P("columns"),
        "half": P(None, AXES),
        "ids": P(),
    },
}
EVERY_TREE = pytest.mark.parametrize("specs", TREES.values(), ids=TREES)


def gradients():
    random = np.random.default_rng(4)
    phase = random.normal(size=(16, 4)) + 1j * random.normal(size=(16, 4))
    return {
        "kernel": random.normal(size=(8, 16)).astype(np.float32),
        "bias": random.normal(size=16).astype(np.float32),
        "phase": phase.astype(np.complex64),
        "half": jnp.asarray(random.normal(size=(2, 64)), jnp.bfloat16),
        "ids": np.arange(8),
    }


def dense_norm(tree):
    """By NumPy, in double precision."""
    floating = [np.asarray(tree[name]) for name in tree if name != "ids"]
    wide = [
        leaf.astype(np.result_type(leaf.dtype, np.float64)) for leaf in floating[:3]
    ]
    wide.append(floating[3].astype(np.float64))
    return np.sqrt(sum(np.square(np.abs(leaf)).sum() for leaf in wide))


def over_the_mesh(fn, in_specs, out_specs, **options):
    mesh = make_mesh((4, 2), AXES, AUTO)
    return jax.jit(
        jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)
    )


@EVERY_TREE
def test_the_norm_equals_the_dense_one(specs):
    measure = functools.partial(optloss.global_norm, axis_name=AXES)
    norm = over_the_mesh(measure, (specs,), P())(gradients())
    np.testing.assert_allclose(norm, dense_norm(gradients()), rtol=1e-6)


def test_where_types_say_nothing_every_leaf_counts_as_sharded():
    measure = functools.partial(optloss.global_norm, axis_name=AXES)
    specs = {**TREES["sharded"], "ids": P()}
    norm = over_the_mesh(measure, (specs,), P(), check_vma=False)(gradients())
    np.testing.assert_allclose(norm, dense_norm(gradients()), rtol=1e-6)


def test_over_an_axis_that_is_not_named_each_device_measures_its_own():
    specs, tree = P("rows", "columns"), gradients()["kernel"]

    def measure(leaf):
        norm = optloss.global_norm(leaf, axis_name="rows")
        clip = optloss.clip_by_global_norm(1.0, axis_name="rows")
        clipped, _ = clip.update(leaf, clip.init(leaf))
        return norm[None], clipped

    norms, clipped = over_the_mesh(measure, specs, (P("columns"), specs))(tree)
    for norm, columns, half in zip(
        norms, np.split(tree, 2, axis=1), np.split(clipped, 2, axis=1), strict=True
    ):
        np.testing.assert_allclose(norm, np.linalg.norm(columns), rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(half), 1, rtol=1e-6)


def test_explicit_axes_beside_manual_ones_are_measured_together():
    types = (AUTO, EXPLICIT)
    mesh = jax.make_mesh((4, 2), AXES, axis_types=types)
    leaf = put(gradients()["kernel"], mesh, P("rows", "columns"))
    measure = jax.shard_map(
        functools.partial(optloss.global_norm, axis_name="rows"),
        mesh=mesh,
        in_specs=P("rows"),
        out_specs=P(),
        axis_names={"rows"},
    )
    np.testing.assert_allclose(jax.jit(measure)(leaf), np.linalg.norm(leaf), rtol=1e-6)


@pytest.mark.wide
@EVERY_TREE
@pytest.mark.parametrize(
    "make_clip",
    [
        functools.partial(optloss.clip_by_global_norm, 2.0),
        functools.partial(optloss.adaptive_clipping, static_max_norm=2.0),
    ],
    ids=["fixed", "adaptive"],
)
def test_a_clip_shrinks_by_the_norm_of_the_whole(specs, make_clip):
    def clip(tree, **options):
        transform = make_clip(**options)
        return transform.update(tree, transform.init(tree))

    part = functools.partial(clip, axis_name=AXES)
    # The state comes out replicated, or the mesh would refuse P() for it.
    clipped, state = over_the_mesh(part, (specs,), (specs, P()))(gradients())
    expected, alone = clip(gradients())
    assert float(state.factor) < 1
    for name, leaf in expected.items():
        tolerance = 1e-2 if name == "half" else 1e-6
        one, other = (
            np.asarray(x).astype(np.complex128) for x in (clipped[name], leaf)
        )
        np.testing.assert_allclose(one, other, rtol=tolerance)
    assert distance((state.norm, state.factor), (alone.norm, alone.factor)) < 1e-6


EVERYTHING = {
    "gradient_multipliers": {"dense/*": 0.5},
    "clip_gradients": optloss.adaptive_clipping(0.5, 0.8, axis_name="data"),
    "learning_rate_decay_fn": functools.partial(
        optloss.exponential_decay, decay_steps=10, decay_rate=0.5
    ),
    "skip_nonfinite": True,
    "summaries": ["loss", "learning_rate", "global_gradient_norm"],
}


def stacked_batches():
    """Twenty batches, the ninth of which holds a NaN."""
    x, y = map(np.stack, zip(*make_batches(20), strict=True))
    x[8, 3, 5] = np.nan
    return x, y


@functools.cache
def run_alone(noise):
    options = {**EVERYTHING, "clip_gradients": optloss.adaptive_clipping(0.5, 0.8)}
    op = optloss.optimize_loss(loss, 0, 0.01, "adam", noise, **options)

    @jax.jit
    def run(state, batches):
        return jax.lax.scan(
            lambda state, batch: op.update(state, *batch), state, batches
        )

    return run(op.init(make_params()), stacked_batches())


@pytest.mark.wide
@pytest.mark.parametrize(
    ("specs", "noise"),
    [(REPLICATED, 0.05), (SHARDED, None), (MIXED, None)],
    ids=["replicated", "sharded", "mixed"],
)
def test_twenty_steps_equal_those_of_one_device(specs, noise):
    op = optloss.optimize_loss(
        manual_loss(specs), 0, 0.01, "adam", noise, axis_name="data", **EVERYTHING
    )
    state = op.init(make_params())
    spread = specs_of(state, specs)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=line(AUTO),
        in_specs=(spread, P(None, "data")),
        out_specs=(spread, P()),
    )
    def run(state, batches):
        return jax.lax.scan(
            lambda state, batch: op.update(state, *batch), state, batches
        )

    state, output = run(state, stacked_batches())
    expected, outputs = run_alone(noise)
    assert int(state.opt_state.total) == 1
    assert distance(state.params, expected.params) < 1e-5
    assert distance(state.opt_state.inner.clip, expected.opt_state.inner.clip) < 1e-4
    finite = np.arange(20) != 8
    for tag, values in outputs.summaries.items():
        np.testing.assert_allclose(
            output.summaries[tag][finite], values[finite], rtol=1e-4, err_msg=tag
        )


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_state_may_be_made_on_each_device(check_vma):
    op = optloss.optimize_loss(
        manual_loss(MIXED), 0, 0.01, "adam", 0.05, axis_name="data", **EVERYTHING
    )
    expected = op.init(make_params())
    spread = specs_of(expected, MIXED)
    init = jax.shard_map(
        op.init,
        mesh=line(AUTO),
        in_specs=(MIXED,),
        out_specs=spread,
        check_vma=check_vma,
    )
    state = jax.jit(init)(make_params())
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(state), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_the_gradient_of_one_shard_makes_all_skip():
    def root(params):
        # Its gradient at zero is infinite, and the loss is not.
        return jax.lax.psum(jnp.sum(jnp.sqrt(jnp.abs(params["kernel"]))), "data")

    op = optloss.optimize_loss(
        root, 0, 0.1, "adam", clip_gradients=1.0, skip_nonfinite=True, axis_name="data"
    )
    specs = {"kernel": P("data")}
    good = {"kernel": np.linspace(1, 2, 16, dtype=np.float32)}
    bad = {"kernel": np.where(np.arange(16) == 11, 0, good["kernel"])}
    spread = specs_of(op.init(good), specs)
    step = jax.jit(
        jax.shard_map(
            op.update, mesh=line(AUTO), in_specs=(spread,), out_specs=(spread, P())
        )
    )
    moved, _ = step(op.init(good))
    assert np.all(moved.params["kernel"] < good["kernel"])
    kept, output = step(op.init(bad))
    assert np.isfinite(output.loss)
    np.testing.assert_array_equal(kept.params["kernel"], bad["kernel"])
    assert [int(n) for n in (kept.opt_state.total, moved.opt_state.total)] == [1, 0]
    assert [int(state.step) for state in (kept, moved)] == [1, 1]


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_loss_of_one_device_makes_all_skip(check_vma):
    guarded = optloss.skip_nonfinite(optax.sgd(0.1), axis_name="data")

    def update(grads, losses):
        updates, state = guarded.update(grads, guarded.init(grads), value=losses[0])
        return updates, state.total[None]

    step = jax.shard_map(
        update,
        mesh=line(AUTO),
        in_specs=P("data"),
        out_specs=(P("data"), P("data") if not check_vma else P(None)),
        check_vma=check_vma,
    )
    losses = np.ones(8, np.float32)
    updates, total = jax.jit(step)(np.ones(16, np.float32), losses)
    assert np.all(updates == np.float32(-0.1))
    assert np.all(total == 0)
    losses[5] = np.nan
    updates, total = jax.jit(step)(np.ones(16, np.float32), losses)
    assert np.all(updates == 0)
    assert np.all(total == 1)


@pytest.mark.wide
def test_devices_may_train_apart():
    """Eight runs, one a device, that share nothing: no axis is named."""
    op = optloss.optimize_loss(
        lambda w, x: jnp.mean((x @ w) ** 2),
        0,
        0.01,
        "SGD",
        clip_gradients=1.0,
        skip_nonfinite=True,
        summaries=optloss.OPTIMIZER_SUMMARIES,
        histogram_every=2,
    )
    w, x = np.ones(16, np.float32), make_batches(1, rows=64)[0][0]
    x[17, 3] = np.nan
    states = jax.tree.map(lambda leaf: np.stack([leaf] * 8), op.init(w))

    def step(state, x):
        state, output = op.update(jax.tree.map(lambda leaf: leaf[0], state), x)
        return jax.tree.map(lambda leaf: leaf[None], (state, output))

    apart = jax.shard_map(
        step, mesh=line(AUTO), in_specs=P("data"), out_specs=P("data")
    )
    states, output = jax.jit(apart)(states, x)
    assert list(states.opt_state.total) == [0, 0, 1, 0, 0, 0, 0, 0]
    state, alone = op(op.init(w), x[:8])
    first = jax.tree.map(lambda leaf: leaf[0], (states.params, output.summaries))
    assert distance(first, (state.params, alone.summaries)) < 1e-5


def draw(leaves, specs, axis_name=AXES, **options):
    """Noise on zeros, as each of eight devices adds it to its part."""
    noise = optloss.add_gradient_noise(1.0, key=5, axis_name=axis_name)

    def update(tree):
        return noise.update(tree, noise.init(tree))[0]

    return over_the_mesh(update, (specs,), specs, **options)(leaves)


def test_shards_draw_independent_noise_and_replicas_the_same():
    leaves = {
        "sharded": np.zeros((8, 4096), np.float32),
        "rows": np.zeros((8, 4096), np.float32),
        "copied": np.zeros((2, 4096), np.float32),
    }
    specs = {"sharded": P(AXES), "rows": P("rows"), "copied": P()}
    # Types prove that what is returned as a replica is the same on all devices.
    found = draw(leaves, specs)
    shards = np.concatenate([*found.values()])
    assert shards.shape == (18, 4096)
    assert abs(np.std(shards) - 1) < 0.02
    correlation = np.corrcoef(shards)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)


def test_replicas_draw_what_one_device_draws():
    leaves = {"copied": np.zeros((2, 64), np.float32)}
    found = draw(leaves, {"copied": P()})["copied"]
    noise = optloss.add_gradient_noise(1.0, key=5)
    alone, _ = jax.jit(noise.update)(leaves, noise.init(leaves))
    assert np.asarray(found).tobytes() == np.asarray(alone["copied"]).tobytes()


@pytest.mark.wide
def test_histograms_and_norms_of_parameters_cover_all_devices():
    op = optloss.optimize_loss(
        manual_loss(MIXED),
        0,
        0.01,
        "adam",
        axis_name="data",
        summaries=["gradients", "gradient_norm"],
    )
    state = op.init(make_params())
    spread = specs_of(state, MIXED)
    step = jax.shard_map(
        op.update,
        mesh=line(AUTO),
        in_specs=(spread, P("data"), P("data")),
        out_specs=(spread, P()),
    )
    ((x, y),) = make_batches(1)
    _, output = jax.jit(step)(state, x, y)
    expected = jax.grad(loss)(make_params(), x, y)
    names = ("dense/bias", "dense/kernel", "embedding", "scale")
    for name, leaf in zip(names, jax.tree.leaves(expected), strict=True):
        norm = output.summaries[f"OptimizeLoss/gradient_norm/{name}"]
        np.testing.assert_allclose(norm, np.linalg.norm(leaf), rtol=1e-5)
        found = output.summaries[f"OptimizeLoss/gradients/{name}"]
        assert int(found.num) == leaf.size
        assert int(found.bucket_counts.sum()) == leaf.size
        np.testing.assert_allclose(found.sum_squares, norm**2, rtol=1e-5)
        np.testing.assert_allclose(found.max, leaf.max(), rtol=1e-4)


@pytest.mark.wide
def test_pmap_trains_data_parallel():
    """There a gradient is averaged by averaging the parameters it is taken at."""

    def averaged(params, x, y):
        params = jax.lax.pmean(params, "data")
        return jax.lax.pmean(loss(params, x, y), "data")

    options = {**EVERYTHING, "clip_gradients": optloss.adaptive_clipping(0.5, 0.8)}
    options["replica_axis_name"] = ()
    op = optloss.optimize_loss(averaged, 0, 0.01, "adam", 0.05, **options)
    state = jax.tree.map(lambda leaf: np.stack([leaf] * 8), op.init(make_params()))
    step = jax.pmap(op.update, axis_name="data")
    for x, y in zip(*stacked_batches(), strict=True):
        state, _ = step(state, x.reshape(8, 4, -1), y.reshape(8, 4, -1))
    expected, _ = run_alone(0.05)
    for leaf in jax.tree.leaves(state.params):
        assert np.all(leaf == leaf[:1])
    first = jax.tree.map(lambda leaf: leaf[0], state.params)
    assert distance(first, expected.params) < 1e-5


def test_pmap_clips_shards_by_the_norm_of_the_whole():
    clip = optloss.clip_by_global_norm(1.0, axis_name="data")
    shards = np.random.default_rng(6).normal(size=(8, 5)).astype(np.float32)

    def update(shard):
        return clip.update(shard, clip.init(shard))[0]

    clipped = jax.pmap(update, axis_name="data")(shards)
    np.testing.assert_allclose(clipped, shards / np.linalg.norm(shards), rtol=1e-6)

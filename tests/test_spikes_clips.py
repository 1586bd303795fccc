"""Clips by history and by weights: the papers in NumPy, spikes, and what cannot be."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import spikes_reference as reference
from distributed.meshes import AUTO, EXPLICIT, distance, entered, line, put
from jax.sharding import PartitionSpec as P

import optloss
from optloss import adagc, agc, autoclip, zclip
from optloss.stages import Stage, looks_at_leaves

UPDATES = 500


def recorded_norms(seed=0, leaves=()):
    """A run's norms: they fall, with spikes, zeros, infinities and NaNs among them."""
    random = np.random.default_rng(seed)
    norms = np.exp(0.2 * random.normal(size=(UPDATES, *leaves)))
    norms = norms.T * np.geomspace(8.0, 0.5, UPDATES)
    at = random.permutation(UPDATES)[:60]
    norms[..., at[:40]] *= np.geomspace(2, 1e5, 40)
    norms = norms.T
    norms[at[40:50]], norms[at[50:55]] = np.nan, np.inf
    norms[at[55:]] = 0
    return np.float32(norms)


@functools.cache
def runner(make, *arguments, **options):
    """Return ``init`` and a run over norms, each the gradient of one leaf."""
    transform = make(*arguments, **options)

    def body(state, norm):
        clipped, state = transform.update(norm, state)
        return state, (clipped, state)

    return transform.init, jax.jit(
        lambda state, norms: jax.lax.scan(body, state, norms)
    )


def follow(make, norms, state=None, **options):
    """Return what each of ``norms`` [updates, *leaves] was clipped to, and states."""
    init, run = runner(make, **options)
    norms = jnp.asarray(norms, jnp.float32)
    leaves = list(norms.T) if norms.ndim > 1 else norms
    start = init(jax.tree.map(lambda leaf: leaf[0], leaves))
    last, (clipped, states) = run(start if state is None else state, leaves)
    return np.stack(jax.tree.leaves(clipped), -1).squeeze(), states, last


def raw(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "mean", "z_threshold": 1.0},
        {"mode": "threshold", "alpha": 0.9, "warmup": 3},
        {"warmup": 10, "z_threshold": 4.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_zclip_is_what_the_paper_says(options, seed):
    norms = recorded_norms(seed)
    clipped, states, last = follow(zclip, norms, **options)
    expected = reference.zclip(np.float64(norms), **options)
    for found, column in zip(
        (clipped, states.max_norm, states.mean, states.std), expected, strict=True
    ):
        close(found, column)
    assert int(last.clipped) == (expected[0] < norms).sum() > 15
    assert int(last.observed) == np.isfinite(norms).sum() == UPDATES - 15


@pytest.mark.parametrize(
    "options",
    [{}, {"percentile": 90, "history": 50}, {"percentile": 33.3, "history": 7}],
    ids=str,
)
def test_autoclip_is_what_the_paper_says(options):
    norms = recorded_norms()
    clipped, states, last = follow(autoclip, norms, **options)
    expected = reference.autoclip(np.float64(norms), **options)
    close(clipped, expected[0])
    close(states.max_norm, expected[1])
    assert abs(int(last.clipped) - (expected[0] < (1 - 1e-6) * norms).sum()) <= 1
    assert int(last.observed) == UPDATES - 15


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relative": 1.5, "beta": 0.9, "warmup": 10, "absolute": 3.0},
        {"warmup": 0, "absolute": np.inf},
    ],
    ids=str,
)
def test_adagc_is_what_the_paper_says(options):
    norms = recorded_norms(leaves=(3,))
    norms[::7, 1] = 0
    clipped, states, last = follow(adagc, norms, **options)
    expected, means = reference.adagc(np.float64(norms), **options)
    close(clipped, expected)
    close(states.means, means)
    finite = np.isfinite(norms).all(1)
    total = np.linalg.norm(expected[finite], axis=1)
    close((states.norm * states.factor)[finite], total)
    assert int(last.observed) == finite.sum() == UPDATES - 15
    assert int(last.clipped) > 60


SHAPES = [(), (5,), (3, 4), (1, 4), (3, 2, 4), (2, 3, 2, 4), (2, 1, 2, 1, 2, 3)]


@pytest.mark.wide
def test_agc_is_what_the_paper_says():
    random = np.random.default_rng(0)
    scales = recorded_norms()
    params = [random.normal(size=shape).astype(np.float32) for shape in SHAPES]
    params[2][:, 1] = 0  # a unit that starts at zero
    grads = [
        np.float32(0.05 * random.normal(size=(UPDATES, *shape)).T * scales).T
        for shape in SHAPES
    ]
    transform = agc(0.1)

    def body(state, grads):
        clipped, state = transform.update(grads, state, params)
        return state, (clipped, state)

    run = jax.jit(lambda grads: jax.lax.scan(body, transform.init(params), grads))
    last, (clipped, states) = run(grads)
    finite = np.isfinite(scales)
    for found, given, weights in zip(clipped, grads, params, strict=True):
        expected = [reference.agc(np.float64(g), weights, 0.1) for g in given[finite]]
        np.testing.assert_allclose(found[finite], expected, rtol=1e-5, atol=1e-7)
        assert raw(found[~finite]) == raw(given[~finite])
    after = np.sqrt(sum((np.float64(g[finite]) ** 2).T.sum(-2) for g in flat(clipped)))
    close((states.norm * states.factor)[finite], after)
    assert (int(last.observed), int(last.step)) == (UPDATES - 15, UPDATES)
    assert 400 < int(last.clipped) < UPDATES - 15


def flat(stacked):
    return [np.asarray(leaf).reshape(UPDATES, -1) for leaf in stacked]


@pytest.mark.wide
def test_agc_agrees_with_optax_where_that_looks_at_the_same_units():
    random = np.random.default_rng(1)
    shapes = [(), (5,), (3, 4), (2, 3, 2, 4), (2, 2, 2, 2, 3)]
    params, grads = (
        [jnp.float32(random.normal(size=shape)) for shape in shapes] for _ in range(2)
    )
    theirs = optax.adaptive_grad_clip(0.3)
    expected, _ = jax.jit(theirs.update)(grads, theirs.init(params), params)
    clipped, _ = jax.jit(agc(0.3).update)(grads, agc(0.3).init(params), params)
    for found, leaf in zip(clipped, expected, strict=True):
        np.testing.assert_allclose(found, leaf, rtol=1e-5)


def test_agc_leaves_out_what_is_excluded():
    params = {"body": {"w": jnp.ones(2), "b": jnp.ones(2)}, "head": jnp.ones(2)}
    grads = jax.tree.map(lambda leaf: 9 * leaf, params)
    for exclude, kept in [
        ("head", [False, False, True]),
        (("**/b", re.compile("he.*")), [True, False, True]),
        ([], [False] * 3),
    ]:
        clip = agc(0.1, exclude=exclude)
        clipped, state = clip.update(grads, clip.init(params), params)
        assert [leaf[0] == 9 for leaf in jax.tree.leaves(clipped)] == kept
        close(state.norm, 9 * np.sqrt(6))
        close(
            state.norm * state.factor, np.sqrt(2 * sum(81 if k else 0.01 for k in kept))
        )


def test_what_is_excluded_may_be_frozen():
    params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    tx = optloss.make_optimizer(
        0.1, "SGD", clip_gradients=agc(0.1, exclude="head"), variables="body"
    )
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["body"], -0.01, rtol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (zclip, {}),
        (zclip, {"mode": "mean"}),
        (zclip, {"mode": "threshold"}),
        (autoclip, {}),
        (autoclip, {"percentile": 90, "history": 100}),
        (adagc, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_spike_is_cut_and_leaves_no_trace(make, options):
    random = np.random.default_rng(2)
    norms = np.float32(0.3 * np.exp(0.1 * random.normal(size=250)))
    places = np.arange(120, 220)
    spiked = np.tile(norms, (100, 1))
    spiked[np.arange(100), places] *= 1000
    transform = make(**options)

    def run(norms):
        def body(state, norm):
            clipped, state = transform.update(norm, state)
            return state, (clipped, threshold_of(state))

        return jax.lax.scan(body, transform.init(norms[0]), norms)[1]

    _, thresholds = jax.jit(run)(norms)
    clipped, marked = jax.jit(jax.vmap(run))(spiked)
    clipped = clipped[np.arange(100), places]
    assert np.all(clipped <= 1.5 * np.mean(norms[:100]))
    later = marked[np.arange(100), places + 20] / thresholds[places + 20]
    assert np.all(np.abs(later - 1) < 0.05)


def threshold_of(state):
    """The bound an update is held to; that of a leaf, made after it, for adagc."""
    return 1.04 * state.means[0] if hasattr(state, "means") else state.max_norm


def test_a_spike_ends_at_what_agc_allows_and_is_forgotten():
    params, clip = jnp.ones((4, 3)), agc(0.1)
    update, state = jax.jit(clip.update), clip.init(params)
    for scale in (0.1, 100.0, 0.1):
        clipped, state = update(scale * params, state, params)
        np.testing.assert_allclose(clipped, 0.1, rtol=1e-6)


def test_autoclip_follows_norms_that_double_for_good():
    random = np.random.default_rng(3)
    norms = np.exp(0.2 * random.normal(size=400))
    norms[200:] *= 2
    _, states, _ = follow(autoclip, norms, history=100)
    before, after = states.max_norm[199], states.max_norm[299]
    close(after, np.percentile(norms[200:300], 10))
    assert abs(after / before / 2 - 1) < 0.1
    # Those of clipped norms would have stayed below.
    assert states.max_norm[210] < 1.1 * before


@pytest.mark.parametrize(
    ("mode", "most"), [("adaptive", 400), ("mean", 400), ("threshold", 30)]
)
def test_zclip_follows_norms_that_double_for_good_in_one_mode_alone(mode, most):
    norms = np.exp(0.1 * np.random.default_rng(4).normal(size=600))
    norms[200:] *= 2
    _, states, last = follow(zclip, norms, mode=mode)
    cut = int(last.clipped - states.clipped[199])
    assert most - 15 < cut <= most


def test_adagc_follows_a_leaf_as_slowly_as_its_docstring_says():
    norms = np.repeat(np.float32([0.5, 1.0]), [200, 2000])
    _, _, last = follow(adagc, norms)
    assert 1600 <= int(last.clipped) < 1700


def test_a_leaf_that_was_zero_in_the_warm_up_is_not_silenced():
    norms = np.full((300, 3), 0.1, np.float32)
    norms[50, 0] = 0  # once
    norms[:150, 1] = 0  # an expert that is first chosen later
    norms[200, 1] = 1000
    clipped, states, _ = follow(adagc, norms)
    np.testing.assert_allclose(clipped[51:, 0], 0.1)
    np.testing.assert_allclose(clipped[150:200, 1], 0.1)
    assert clipped[200, 1] < 0.11
    assert states.means[149, 1] == np.inf
    silenced, _ = reference.adagc(norms, published=True)
    assert not silenced[100:, :2].any()


def test_a_leaf_without_a_history_is_held_to_the_absolute_bound():
    norms = np.full((120, 2), 0.1, np.float32)
    norms[:110, 1] = 0
    norms[110:, 1] = 50
    clipped, states, _ = follow(adagc, norms, absolute=2.0)
    close(clipped[110:112, 1], [2, 2.08])
    close(states.means[110], [0.1, 2])


@pytest.mark.parametrize(
    "make", [functools.partial(zclip, warmup=5), functools.partial(autoclip, 50)]
)
def test_a_history_of_zeros_silences_nothing(make):
    clip = make()
    state = clip.init(jnp.zeros(()))
    for norm in [0.0] * 8 + [2.0]:
        clipped, state = clip.update(jnp.array(norm), state)
    assert (clipped, state.clipped) == (2, 0)


EVERY = {
    "zclip": functools.partial(zclip, warmup=3),
    "autoclip": functools.partial(autoclip, 40, history=5),
    "adagc": functools.partial(adagc, warmup=3),
    "agc": agc,
}
MODES = {
    "zclip, mean": functools.partial(zclip, mode="mean", warmup=1),
    "zclip, threshold": functools.partial(zclip, mode="threshold", warmup=2),
}
every_clip = pytest.mark.parametrize("name", EVERY)


def train(clip, state, norms, params):
    """Return what each gradient became, and the last state."""

    @jax.jit
    def run(state, norms, params):
        def body(state, norm):
            grads = jax.tree.map(lambda leaf: norm * leaf, params)
            clipped, state = clip.update(grads, state, params)
            return state, clipped

        return jax.lax.scan(body, state, norms)

    last, clipped = run(state, norms, params)
    return clipped, last


def small_params():
    random = np.random.default_rng(5)
    shapes = {"kernel": (8, 4), "bias": (8,), "scale": (), "stack": (8, 2, 3)}
    shapes["wide"] = (2, 8)
    return {name: jnp.float32(random.normal(size=s)) for name, s in shapes.items()}


@pytest.mark.wide
@every_clip
def test_what_is_not_finite_leaves_the_statistics_alone(name):
    clip, params = EVERY[name](), small_params()
    _, before = train(clip, clip.init(params), recorded_norms()[:40], params)
    kept = set(before._fields) - {"step", "norm", "factor", "max_norm"}
    assert kept >= {"observed", "clipped"}
    update = jax.jit(clip.update)
    for poison in (np.nan, np.inf, -np.inf):
        bad = np.array(params["kernel"])
        bad[2, 3] = poison
        grads = {**params, "kernel": bad}
        clipped, after = update(grads, before, params)
        assert raw(clipped) == raw(grads)
        assert (int(after.step), float(after.factor)) == (int(before.step) + 1, 1)
        for field in kept:
            assert raw(getattr(after, field)) == raw(getattr(before, field))


@pytest.mark.wide
@pytest.mark.parametrize("name", EVERY | MODES)
@pytest.mark.parametrize(
    "norms",
    [
        [0] * 12,
        [0, 0, 0, 0, 0, 0, 1, 0, 1e30, 0, 3e38, 1e-38, 0],
        [3e38] * 10 + [1e-38] * 10,
        [1e-38] * 10 + [3e38] * 10,
        [np.nan] * 10 + [1, 2, 3],
        [1e-30, 2e-30, 1e-30, 2e-30, 1e-27, 2e-30],
    ],
    ids=["zeros", "mixed", "falling", "rising", "not a number at first", "tiny"],
)
def test_no_stream_makes_a_nan(name, norms):
    norms, params = np.float32(norms), {"w": jnp.ones(1)}
    clip = (EVERY | MODES)[name]()
    clipped, last = train(clip, clip.init(params), norms, params)
    finite = np.isfinite(norms)
    clipped = clipped["w"][:, 0]
    assert np.isfinite(clipped[finite]).all()
    assert ((clipped >= 0) & (clipped <= norms))[finite].all()
    assert not any(np.isnan(leaf).any() for leaf in last)


def test_a_spike_is_cut_at_any_magnitude():
    for scale in (1e-30, 1.0, 1e30):
        norms = np.float32(scale) * np.tile(np.float32([1, 1.1, 0.9, 1]), 10)
        norms[-1] = 1e6 * scale
        for make in (EVERY["zclip"], EVERY["autoclip"], *MODES.values()):
            clipped, _, _ = follow(make, norms)
            assert 0.5 * scale < clipped[-1] < 1.5 * scale


@pytest.mark.wide
@every_clip
def test_a_run_that_is_saved_goes_on_bit_for_bit(name, tmp_path):
    clip, params, norms = EVERY[name](), small_params(), recorded_norms()[:60]
    straight, expected = train(clip, clip.init(params), norms, params)
    first, state = train(clip, clip.init(params), norms[:30], params)
    np.savez(tmp_path / "state.npz", *state)
    with np.load(tmp_path / "state.npz") as saved:
        restored = type(state)(*map(jnp.asarray, saved.values()))
    second, last = train(clip, restored, norms[30:], params)
    both = jax.tree.map(lambda *parts: np.concatenate(parts), first, second)
    assert raw((both, last)) == raw((straight, expected))


SPECS = {name: P("data") for name in ("kernel", "bias", "stack")}
SPECS |= {"scale": P(), "wide": P()}


def assert_alike(found, name, params):
    """Compare the finite updates and the statistics with those of one device."""
    clip, params = EVERY[name](), jax.device_get(params)
    expected = train(clip, clip.init(params), recorded_norms()[:40], params)
    finite = np.isfinite(recorded_norms()[:40])
    for leaf, other in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        np.testing.assert_allclose(leaf[finite], other[finite], rtol=1e-5, atol=1e-7)
    assert distance(found[1], expected[1]) < 1e-5


@pytest.mark.wide
@every_clip
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_eight_devices_clip_as_one(name, kind):
    clip, mesh = EVERY[name](), line(kind)
    specs = {**SPECS, "wide": P(None, "data")}
    with entered(mesh):
        params = put(small_params(), mesh, specs)
        state = clip.init(params)
        found = train(clip, state, recorded_norms()[:40], params)
    assert found[0]["kernel"].sharding.spec[:2] == (None, "data")
    assert_alike(found, name, params)


@pytest.mark.wide
@every_clip
@pytest.mark.parametrize("checked", [True, False])
def test_shards_are_clipped_by_the_norm_of_the_whole_leaf(name, checked):
    clip, params, specs = EVERY[name](axis_name="data"), small_params(), SPECS
    if not checked:  # where types say nothing every leaf counts as sharded
        specs = {leaf: spec for leaf, spec in SPECS.items() if spec}
        params = {leaf: params[leaf] for leaf in specs}

    def run(params):
        return train(clip, clip.init(params), recorded_norms()[:40], params)

    stacked = jax.tree.map(lambda spec: P(None, *spec), specs)
    found = jax.jit(
        jax.shard_map(
            run,
            mesh=line(AUTO),
            in_specs=(specs,),
            out_specs=(stacked, P()),
            check_vma=checked,
        )
    )(params)
    assert_alike(found, name, params)


@pytest.mark.wide
def test_what_looks_at_leaves_is_not_packed():
    """Not even where no two updates show it: in a warm-up, or with room to spare."""
    for make, looks in [
        (adagc, True),
        (functools.partial(agc, 1e6), True),
        (functools.partial(agc, exclude="head"), True),
        (zclip, False),
        (autoclip, False),
    ]:
        for clip in (make(), optax.chain(optax.clip(1.0), make())):
            assert looks_at_leaves(Stage("clip", clip)) == looks


@pytest.mark.wide
@every_clip
def test_it_goes_with_packing_and_into_a_training_op(name):
    params = small_params()

    def loss(params, x):
        return sum(jnp.sum((x * leaf) ** 2) for leaf in jax.tree.leaves(params))

    outputs = []
    for size in (0, 16):
        train_op = optloss.optimize_loss(
            loss,
            global_step=0,
            learning_rate=0.01,
            optimizer="adam",
            clip_gradients=EVERY[name](),
            skip_nonfinite=True,
            pack_small_leaves=size,
            summaries=["global_gradient_norm"],
            name="",
        )
        state = train_op.init(params)
        for x in (1.0, 2.0, np.nan, 1.0, 1000.0, 1.0):
            state, output = train_op(state, x)
        outputs.append((state.params, output.summaries, optloss.get_summaries(state)))
    assert distance(outputs[1], outputs[0]) < 1e-5
    _, summaries, found = outputs[0]
    assert found["skipped/total"] == 1
    for tag in ("gradient_norm", "clipped_gradient_norm"):
        close(summaries[f"global_norm/{tag}"], found[f"global_norm/{tag}"])


@every_clip
def test_what_it_measured_is_published(name):
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    clip = EVERY[name]()
    _, state = train(clip, clip.init(params), np.float32([1, 1.1, 1, 1, 50]), params)
    found = {tag: float(value) for tag, value in optloss.get_summaries(state).items()}
    uniform = hasattr(state, "max_norm")
    assert state.uniform == uniform
    assert list(found) == [
        "global_norm/gradient_norm",
        "global_norm/clipped_gradient_norm",
        "clip_factor",
        "clipped_share",
        *["clip_threshold"] * uniform,
    ]
    close(found["global_norm/gradient_norm"], 50 * np.sqrt(6))
    assert found["clip_factor"] < 0.05
    close(found["clipped_share"], int(state.clipped) / 5)
    if uniform:
        assert found["global_norm/clipped_gradient_norm"] <= found["clip_threshold"]


def test_adaptive_clipping_publishes_its_threshold():
    clip = optloss.adaptive_clipping()
    _, state = clip.update(jnp.ones(2), clip.init(jnp.ones(2)))
    found = optloss.get_summaries(state)
    threshold = found["global_norm/adaptive_max_gradient_norm"]
    assert found["clip_threshold"] == threshold == state.max_norm


@pytest.mark.wide
@every_clip
def test_a_norm_that_is_handed_on_is_not_measured_again(name):
    clip, params = EVERY[name](), {"w": jnp.ones(4)}
    update = jax.jit(clip.update)
    state = clip.init(params)
    expected, measured = update(params, state, params)
    found, told = update(params, state, params, gradient_norm=jnp.float32(2))
    assert raw((found, told)) == raw((expected, measured))
    _, told = update(params, state, params, gradient_norm=jnp.float32(8))
    assert told.norm == 8


NUMBERS = {
    "zclip": (zclip, {"z_threshold": 1.5, "alpha": 0.9, "warmup": 3}),
    "autoclip": (autoclip, {"percentile": 40.0}),
    "adagc": (
        adagc,
        {"relative": 1.2, "beta": 0.8, "warmup": 3, "absolute": 0.5},
    ),
    "agc": (agc, {"clipping": 0.1, "epsilon": 0.5}),
}


@pytest.mark.wide
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_may_be_traced(name):
    (make, options), params = NUMBERS[name], small_params()

    @jax.jit
    def run(options):
        clip = make(**options)
        return train(clip, clip.init(params), recorded_norms()[:10], params)

    found = run({key: jnp.float32(value) for key, value in options.items()})
    alone = make(**options)
    expected = train(alone, alone.init(params), recorded_norms()[:10], params)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
        assert one.dtype == other.dtype


@pytest.mark.wide
def test_half_precision_is_clipped_by_its_true_norm():
    params = {"w": jnp.full((100, 2), 1, jnp.float16)}
    grads = {"w": jnp.full((100, 2), 1e4, jnp.float16)}
    for name in EVERY:
        clip = EVERY[name]()
        _, state = clip.update(grads, clip.init(params), params)
        close(state.norm, 1e4 * np.sqrt(200))


WHOLE = "must be a whole number >= {} or a 0-d array."
REFUSED = [
    (zclip, "z_threshold", 0, "must be a finite real number > 0 or a 0-d array."),
    (zclip, "z_threshold", "2", "must be a finite real number > 0 or a 0-d array."),
    (
        zclip,
        "alpha",
        1.0,
        "must be a real number in [0, 1) or a 0-d array. 0.97 averages over some 33 "
        "updates.",
    ),
    (zclip, "warmup", 0, WHOLE.format(1)),
    (zclip, "warmup", 2.5, WHOLE.format(1)),
    (zclip, "warmup", True, WHOLE.format(1)),
    (zclip, "mode", "median", "must be 'adaptive', 'mean' or 'threshold'."),
    (autoclip, "percentile", -1, "must be a real number from 0 to 100 or a 0-d array."),
    (
        autoclip,
        "percentile",
        float("nan"),
        "must be a real number from 0 to 100 or a 0-d array.",
    ),
    (autoclip, "history", 0, "must be an int in [1, 1048576]: how many norms to keep."),
    (
        autoclip,
        "history",
        9.0,
        "must be an int in [1, 1048576]: how many norms to keep.",
    ),
    (
        adagc,
        "relative",
        0.99,
        "must be a finite real number >= 1 or a 0-d array. Below 1 each clip would "
        "lower the bound of the next.",
    ),
    (
        adagc,
        "beta",
        -0.1,
        "must be a real number in [0, 1) or a 0-d array. 0.99 averages over some 100 "
        "updates.",
    ),
    (adagc, "warmup", -1, WHOLE.format(0)),
    (
        adagc,
        "absolute",
        0,
        "must be a real number > 0 or a 0-d array. Use inf to clip nothing in the "
        "warm-up.",
    ),
    (
        agc,
        "clipping",
        -0.01,
        "must be a real number >= 0 or a 0-d array. Use inf to measure the norm alone.",
    ),
    (agc, "epsilon", 0, "must be a finite real number > 0 or a 0-d array."),
    (agc, "exclude", 3, "must be a name, a pattern or a list of them."),
    (agc, "exclude", ("a", 3), "must be a name, a pattern or a list of them."),
]


def message_of(call, *arguments, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - callers compare the whole message
        call(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "argument", "value", "problem"),
    REFUSED,
    ids=[f"{make.__name__}, {argument}={v}" for make, argument, v, _ in REFUSED],
)
def test_what_is_out_of_range_is_refused(make, argument, value, problem):
    message = f"{make.__name__}({argument}={value!r}): {problem}"
    assert message_of(make, **{argument: value}) == message


def test_agc_refuses_what_it_learns_later():
    params = {"dense": {"kernel": jnp.ones(2)}, "head": jnp.ones(2)}
    assert message_of(agc(exclude="haed").init, params) == (
        "agc, exclude: the pattern 'haed' matches no parameter. Nearest: 'head'."
    )
    clip = agc()
    assert message_of(clip.update, params, clip.init(params)) == (
        "agc: the gradient is compared with the parameters, so update(updates, state, "
        "params) needs params."
    )

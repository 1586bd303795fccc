"""Updates far above those before them are skipped, and leave no trace."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distributed.meshes import AUTO, EXPLICIT, entered, line, put
from jax.sharding import PartitionSpec as P

import optloss
from optloss import skip_spikes

OPTIONS = {"std_factor": 3.0, "decay": 0.9, "warmup": 8, "patience": 4}


class Oracle:
    """The rule in plain Python, with the statistics written out."""

    def __init__(self, std_factor=6.0, decay=0.98, warmup=100, patience=20):
        self.factor, self.decay = std_factor, decay
        self.warmup, self.patience = warmup, patience
        self.total = self.consecutive = self.spikes = 0
        self.start()

    def start(self):
        self.levels = {"norm": (0, 0.0, 0.0), "loss": (0, 0.0, 0.0)}
        self.in_a_row = 0

    def far(self, name, value):
        n, mean, variance = self.levels[name]
        least = 0.1 if name == "norm" else 0.01 * abs(mean)
        deviation = max(math.sqrt(variance), least)
        return n >= self.warmup and value > mean + self.factor * deviation

    def enter(self, name, value):
        n, mean, variance = self.levels[name]
        decay = min(self.decay, n / (n + 1))
        new = decay * mean + (1 - decay) * value
        variance = decay * variance + decay * (1 - decay) * (value - mean) ** 2
        self.levels[name] = n + 1, new, variance

    def makes(self, norm, loss):
        finite = math.isfinite(norm) and math.isfinite(loss)
        spike = False
        if finite:
            log = math.log(norm) if norm > 0 else -math.inf
            spike = self.far("norm", log) or self.far("loss", loss)
        made = finite and not spike
        self.total += not made
        self.consecutive = 0 if made else self.consecutive + 1
        self.spikes += spike
        if made:
            if norm > 0:
                self.enter("norm", log)
            self.enter("loss", loss)
            self.in_a_row = 0
        self.in_a_row += spike
        if self.in_a_row >= self.patience:
            self.start()
        return made


def stream(seed, steps=400):
    """Norms and losses with spikes, a lasting rise, zeros, NaNs and infinities."""
    random = np.random.default_rng(seed)
    norms = np.exp(0.2 * random.normal(size=steps))
    losses = 2 + 0.3 * random.normal(size=steps)
    at = random.permutation(steps // 2)
    norms[at[:10]] *= 50
    losses[at[10:20]] += 40
    norms[at[20:23]], norms[at[23:25]], norms[at[25:28]] = np.nan, np.inf, 0
    losses[at[28:30]] = np.nan
    norms[steps // 2 :] *= 30
    return np.float32(norms), np.float32(losses)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "others"])
def test_every_update_is_judged_as_by_the_oracle(seed, options):
    norms, losses = stream(seed)
    guarded = skip_spikes(optax.scale(1.0), **options)
    oracle = Oracle(**options)

    def step(state, seen):
        norm, loss = seen
        updates, state = guarded.update({"w": norm * jnp.ones(())}, state, value=loss)
        return state, (updates["w"], state)

    start = guarded.init({"w": jnp.zeros(())})
    last, (updates, states) = jax.jit(lambda s: jax.lax.scan(step, s, (norms, losses)))(
        start
    )
    made = np.array(
        [oracle.makes(float(n), float(v)) for n, v in zip(norms, losses, strict=True)]
    )
    np.testing.assert_array_equal(updates, np.where(made, norms, -0.0))
    assert (last.total, last.spikes) == (oracle.total, oracle.spikes)
    assert last.consecutive == oracle.consecutive
    assert last.levels.in_a_row == oracle.in_a_row
    for level, (observed, mean, variance) in zip(
        last.levels[:2], oracle.levels.values(), strict=True
    ):
        assert level.observed == observed
        assert level.mean == pytest.approx(mean, rel=1e-4, abs=1e-5)
        assert level.variance == pytest.approx(variance, rel=1e-3, abs=1e-5)
    assert oracle.spikes > 1
    assert jax.tree.structure(states) == jax.tree.structure(start)


def loss_of(params, x):
    return jnp.sum(params["w"] * x)


def op_of(**options):
    given = {"global_step": 0, "learning_rate": 0.1, "optimizer": "adam"} | options
    return optloss.optimize_loss(loss_of, **given)


def after_warmup(op, steps=101, at=1.0):
    state = op.init({"w": jnp.ones(4)})
    for i in range(steps):
        state, _ = op(state, at + 0.01 * (i % 5) + jnp.zeros(4))
    return state


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_spike_changes_the_counters_and_nothing_else():
    op = op_of(
        skip_spikes=True,
        gradient_noise_scale=1e-3,
        clip_gradients=optloss.adaptive_clipping(),
        moving_average=0.9,
        summaries=["loss", "global_gradient_norm"],
    )
    state = after_warmup(op)
    before = jax.tree.map(jnp.copy, state)
    state, output = op(state, jnp.full(4, 1e4))
    assert state.step == before.step + 1
    for name in ("params", "average"):
        assert bits(getattr(state, name)) == bits(getattr(before, name))
    ours, theirs = state.opt_state, before.opt_state
    assert bits(ours.inner) == bits(theirs.inner)
    assert bits(ours.levels[:2]) == bits(theirs.levels[:2])
    found = optloss.get_summaries(state)
    assert found["skipped/total"] == found["skipped/spikes"] == 1
    assert found["skipped/consecutive"] == ours.levels.in_a_row == 1
    assert output.summaries["OptimizeLoss/global_norm/gradient_norm"] > 1e4
    state, _ = op(state, jnp.full(4, jnp.nan))
    found = optloss.get_summaries(state)
    assert (found["skipped/total"], found["skipped/spikes"]) == (2, 1)
    assert state.opt_state.levels.in_a_row == 1


def test_a_rise_that_lasts_is_the_new_level():
    op = op_of(skip_spikes=6.0)
    state = after_warmup(op)
    for _ in range(30):
        state, _ = op(state, jnp.full(4, 1e4))
    assert state.opt_state.spikes == 20
    assert state.opt_state.consecutive == 0
    assert state.opt_state.levels.log_norm.observed == 10


def test_without_a_loss_the_norm_alone_is_judged():
    tx = optloss.make_optimizer(0.1, "sgd", skip_spikes=4.0)
    params = {"w": jnp.ones(4)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(101):
        _, state = update(params, state, params)
    updates, state = update({"w": jnp.full(4, 1e3)}, state, params)
    assert bits(updates) == bits({"w": jnp.full(4, -0.0)})
    assert state.spikes == 1
    assert state.levels.loss.observed == 0


def test_a_fall_is_no_spike():
    op = op_of(skip_spikes=True)
    state = after_warmup(op)
    for size in (1e-3, 1e-6, 0.0, 1e-3):
        state, _ = op(state, jnp.full(4, size))
    assert state.opt_state.total == 0


@pytest.mark.wide
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_on_a_mesh_it_judges_as_on_one_device(kind):
    norms, losses = stream(0, 60)
    norms[20] = 1e6
    guarded = skip_spikes(optax.scale(1.0), **OPTIONS)
    shape = np.arange(8.0, dtype=np.float32).reshape(8, 1)

    def run(params, norms, losses):
        def step(state, seen):
            norm, loss = seen
            updates, state = guarded.update(params * norm, state, params, value=loss)
            return state, optloss.global_norm(updates)

        return jax.lax.scan(step, guarded.init(params), (norms, losses))

    last, alone = jax.jit(run)(shape, norms, losses)
    mesh = line(kind)
    with entered(mesh):
        spread = put(shape, mesh, P("data"))
        last_spread, found = jax.jit(run)(spread, norms, losses)
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert (last.total, last.spikes) == (last_spread.total, last_spread.spikes)
    assert last.spikes > 0


@pytest.mark.wide
@pytest.mark.parametrize("check_vma", [True, False])
def test_under_shard_map_all_devices_skip_or_none(check_vma):
    guarded = skip_spikes(optax.scale(1.0), warmup=3, axis_name="data")
    mesh = line(AUTO)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P(None, "data")),
        out_specs=(P(None, "data"), P()),
        check_vma=check_vma,
    )
    def run(gradient, losses):
        def step(state, loss):
            local = loss[0]  # each device has its own
            updates, state = guarded.update(gradient * local, state, value=local)
            return state, updates

        last, updates = jax.lax.scan(step, guarded.init(gradient), losses)
        return updates, last.spikes

    losses = np.ones((6, 8), np.float32)
    losses[5, 3] = 1e4
    updates, spikes = run(jnp.ones(8), losses)
    assert spikes == 1
    assert not np.any(updates[5])
    assert np.all(updates[:5] == 1)


def test_a_loss_scale_shrinks_for_overflows_alone():
    op = op_of(skip_spikes=True, loss_scale=optloss.dynamic_loss_scale(64.0))
    state = after_warmup(op)
    state, _ = op(state, jnp.full(4, 1e4))
    assert state.opt_state.spikes == 1
    assert state.opt_state.inner.loss_scale.scale == 64
    state, _ = op(state, jnp.full(4, jnp.inf))
    assert state.opt_state.inner.loss_scale.scale == 32


@pytest.mark.wide
@pytest.mark.parametrize("packed", [0, 8])
def test_a_state_goes_on_bit_for_bit(packed, tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    op = op_of(skip_spikes=True, pack_small_leaves=packed)
    state = after_warmup(op)
    raw = serialization.to_bytes(state)
    restored = serialization.from_bytes(op.init({"w": jnp.ones(4)}), raw)
    for x in (jnp.full(4, 1e4), jnp.ones(4)):
        state, _ = op(state, x)
        restored, _ = op(restored, x)
    assert bits(state) == bits(restored)


def test_a_guard_more_is_another_op():
    state = op_of(skip_nonfinite=True).init({"w": jnp.ones(4)})
    with pytest.raises(ValueError, match="Its guard: SkipNonfiniteState"):
        op_of(skip_spikes=True)(state, jnp.ones(4))
    adopted = op_of(skip_spikes=True).adopt(state)
    op_of(skip_spikes=True)(adopted, jnp.ones(4))


@pytest.mark.parametrize("value", [False, 0, -1.0, math.inf, math.nan, "6", [6]])
def test_what_is_no_factor(value):
    for call, make in {
        "optimize_loss": lambda: op_of(skip_spikes=value),
        "make_optimizer": lambda: optloss.make_optimizer(0.1, "sgd", skip_spikes=value),
    }.items():
        with pytest.raises(ValueError, match="skip_spikes") as raised:
            make()
        assert str(raised.value).startswith(f"{call}(skip_spikes=")
        assert str(raised.value).endswith(
            "must be a real number > 0 (standard deviations), True for 6, or None."
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"std_factor": 0}, "std_factor=0): must be a finite real number > 0 or a 0-d"),
        ({"decay": 1.0}, "decay=1.0): must be a real number in [0, 1) or a 0-d"),
        ({"warmup": 0}, "warmup=0): must be a whole number >= 1 or a 0-d array."),
        ({"patience": 1.5}, "patience=1.5): must be a whole number >= 1 or a 0-d"),
    ],
    ids=str,
)
def test_wrong_numbers(options, words):
    with pytest.raises(ValueError, match="skip_spikes") as raised:
        skip_spikes(optax.sgd(0.1), **options)
    assert words in str(raised.value)
    with pytest.raises(ValueError, match=r"skip_spikes\(inner=.*transformation"):
        skip_spikes(optax.sgd)


@jax.jit
def judged(norms, losses):
    """Return the guard's state after updates with these norms and losses."""
    tx = skip_spikes(optax.scale(1.0))

    def step(state, seen):
        norm, loss = seen
        _, state = tx.update(jnp.full(1, norm), state, value=loss)
        return state, None

    return jax.lax.scan(step, tx.init(jnp.zeros(1)), (norms, losses))[0]


def random(deviation, steps=6000, seed=0):
    drawn = np.random.default_rng(seed).normal(size=steps)
    return np.exp(deviation * drawn).astype(np.float32)


def steady(value, steps=1000):
    return np.full(steps, value, np.float32)


FALLING = np.linspace(5, 1, 1000, dtype=np.float32)
HARMLESS = {
    "wild norms": (random(1.0), random(0.1, seed=1)),
    "a constant loss": (steady(1.0), steady(3.0)),
    "a loss of zero": (steady(1.0), steady(0.0)),
    "a loss below zero": (steady(1e-30), steady(-3.0)),
    "a huge loss": (steady(1e30), steady(1e30)),
    "a loss that ends its descent": (
        steady(1.0, 1300), np.append(FALLING, steady(1.001 * FALLING[-1], 300)),
    ),
    "a rise by 0.1 % on the way": (
        steady(1.0, 1001), np.insert(FALLING, 500, 1.001 * FALLING[499]),
    ),
    "a fall to a hundredth": (
        random(0.3, 2000), random(0.1, 2000) * np.geomspace(1, 0.01, 2000, dtype="f"),
    ),
    "a fall to a hundredth at once": (
        random(0.3, 2000), random(0.1, 2000) * np.repeat(np.float32([1, 0.01]), 1000),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_no_spike_is_not_skipped(case):
    assert judged(*HARMLESS[case]).total == 0


@pytest.mark.parametrize("what", ["norm", "loss"])
def test_of_a_new_level_no_more_than_patience_is_skipped(what):
    level = random(0.1, 2000) * np.repeat(np.float32([1, 10]), 1000)
    seen = {"norm": random(0.1, 2000), "loss": random(0.1, 2000), what: level}
    state = judged(seen["norm"], seen["loss"])
    assert 1 <= state.total <= 20
    assert state.consecutive == 0


def test_corrupted_batches_leave_no_trace():
    """The run ends, bit for bit, as the one that never saw them."""

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)

    op = optloss.optimize_loss(
        loss, 0, 0.01, "adam", clip_gradients=optloss.zclip(), skip_spikes=True
    )
    drawn = np.random.default_rng(5)
    params = {
        "a": drawn.normal(size=(4, 8)).astype("f"),
        "b": drawn.normal(size=(8, 1)).astype("f") / 3,
    }
    x = drawn.normal(size=(300, 16, 4)).astype("f")
    y = np.sin(x.sum(-1, keepdims=True))
    corrupt = np.sort(drawn.choice(np.arange(120, 300), 10, replace=False))
    bad_y = y.copy()
    bad_y[corrupt] = 1e3 * drawn.normal(size=(10, 16, 1))

    @jax.jit
    def run(x, y):
        def step(state, batch):
            return op.update(state, *batch)[0], None

        return jax.lax.scan(step, op.init(params), (x, y))[0]

    seen = run(x, bad_y)
    never = run(np.delete(x, corrupt, 0), np.delete(y, corrupt, 0))
    assert seen.opt_state.spikes == seen.opt_state.total == 10
    assert bits(seen.params) == bits(never.params)
    assert bits(seen.opt_state.inner) == bits(never.opt_state.inner)

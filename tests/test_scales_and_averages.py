"""Loss scale, moving average and projection in a whole training step: design 2.7."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training.dynamic_scale import DynamicScale

import optloss

RANDOM = np.random.default_rng(0)
PARAMS = {"w": RANDOM.normal(size=3).astype(np.float32), "b": np.zeros((), np.float32)}
X = RANDOM.normal(size=(16, 3)).astype(np.float32)


def half(params, x):
    """A loss in float16, which overflows where an example is infinite."""
    w, b, x = (leaf.astype(jnp.float16) for leaf in (params["w"], params["b"], x))
    return jnp.mean((x @ w + b - 1) ** 2)


def make(loss=half, **options):
    common = {"global_step": 0, "learning_rate": 0.01, "optimizer": "adam"}
    return optloss.optimize_loss(loss, **common | options)


def close(found, expected, rtol=1e-6, atol=1e-6):
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


def batches(count, bad=()):
    made = np.random.default_rng(1).normal(size=(count, 8, 3)).astype(np.float32)
    made[list(bad), 0, 0] = np.inf
    return made


# Loss scale


def test_a_run_with_overflows_is_the_run_without_those_batches():
    bad = [3, 4, 9, 14]
    scale = optloss.dynamic_loss_scale(256.0, growth_interval=4)
    train_op = make(loss_scale=scale, gradient_noise_scale=0.01)
    state, without, scales = train_op.init(PARAMS), train_op.init(PARAMS), []
    for i, x in enumerate(batches(20, bad)):
        state, output = train_op(state, x)
        scales.append(float(optloss.get_summaries(state)["loss_scale"]))
        assert np.isfinite(output.loss) == (i not in bad)
        if i not in bad:
            without, _ = train_op(without, x)
    # Halved at 3, 4, 9 and 14, doubled after four good steps.
    expected = [256] * 3 + [128] + [64] * 4 + [128, 64] + [64] * 3 + [128, 64]
    assert scales == [*expected, 64, 64, 64, 128, 128]
    assert state.opt_state.total == 4
    # The scale is a power of two, and the noise counts the updates that are made.
    chex.assert_trees_all_equal(state.params, without.params)


def test_a_skipped_step_changes_the_scale_and_nothing_else():
    train_op = make(
        loss_scale=optloss.dynamic_loss_scale(4.0, minimum=2.0), moving_average=0.9
    )
    state = train_op.init(PARAMS)
    state, _ = train_op(state, X)
    before = jax.tree.map(np.asarray, state)
    for scale in (2, 2):
        state, _ = train_op(state, np.full_like(X, np.nan))
        assert state.opt_state.inner.loss_scale.scale == scale
    chex.assert_trees_all_equal(state.params, before.params)
    chex.assert_trees_all_equal(state.average, before.average)
    old, new = (s.opt_state.inner._replace(loss_scale=None) for s in (before, state))
    chex.assert_trees_all_equal(new, old)


def test_it_equals_flax_in_a_loop_written_by_hand():
    """Whose scale grows after one good step more than it is told."""
    interval, tx = 3, optax.adam(0.01)
    theirs = DynamicScale(growth_interval=interval - 1, scale=jnp.float32(1024))
    train_op = make(
        lambda params, x: half(params, x).astype(jnp.float32),
        loss_scale=optloss.dynamic_loss_scale(1024.0, growth_interval=interval),
    )

    @jax.jit
    def step(theirs, params, opt_state, x):
        def loss(params):
            return half(params, x).astype(jnp.float32)

        theirs, finite, value, gradient = theirs.value_and_grad(loss)(params)
        updates, new = tx.update(gradient, opt_state, params)
        moved = optax.apply_updates(params, updates)
        choose = functools.partial(jnp.where, finite)
        params = jax.tree.map(choose, moved, params)
        return theirs, params, jax.tree.map(choose, new, opt_state), value

    state, params = train_op.init(PARAMS), jax.tree.map(jnp.asarray, PARAMS)
    opt_state = tx.init(params)
    for x in batches(12, bad=[2, 7, 8]):
        state, output = train_op(state, x)
        theirs, params, opt_state, value = step(theirs, params, opt_state, x)
        found = state.opt_state.inner.loss_scale
        assert (found.scale, found.good) == (theirs.scale, theirs.fin_steps)
        np.testing.assert_array_equal(output.loss, value)
        close(state.params, params, 1e-6, 1e-7)


def test_small_gradients_reach_a_half_precision_optimizer():
    def tiny(params, x):
        return jnp.mean(params["w"] * x.astype(jnp.float16) * jnp.float16(1e-4)) * 1e-4

    params = {"w": jnp.ones(3, jnp.float16)}
    tag = "OptimizeLoss/global_norm/gradient_norm"
    norms, losses = [], []
    for scale in (None, 2.0**12):
        options = {"summaries": ["loss", "global_gradient_norm"], "loss_scale": scale}
        train_op = make(tiny, optimizer="sgd", **options)
        _, output = train_op(train_op.init(params), np.ones((2, 3), np.float32))
        norms.append(float(output.summaries[tag]))
        losses.append(float(output.loss))
    assert norms[0] == 0 or abs(norms[0] / 5.8e-9 - 1) > 0.1
    assert norms[1] == pytest.approx(1e-8 / 3**0.5, rel=0.01)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_constant_scale_has_no_state_and_guards_nothing():
    train_op = make(loss_scale=1024)
    state = train_op.init(PARAMS)
    assert state.opt_state.loss_scale is None
    assert "loss_scale" not in optloss.get_summaries(state)
    state, _ = train_op(state, X)
    plain = make()
    close(state.params, plain(plain.init(PARAMS), X)[0].params, 1e-4, 1e-5)
    assert repr(train_op) == (
        "OptimizeLoss: gradient at loss scale 1024 -> optax.adam at 0.01 -> step + 1"
    )


# Moving average


def wide(params, x):
    return jnp.mean((x @ params["w"].astype(jnp.float32) + params["b"] - 1) ** 2)


def test_an_average_of_two_hundred_steps():
    params = {
        "w": PARAMS["w"].astype(np.float16),
        "b": PARAMS["b"],
        "frozen": np.ones(2, np.float32),
    }
    skipped = [5, 6, 100]
    train_op = make(
        wide, moving_average=0.99, skip_nonfinite=True, variables=["w", "b"]
    )
    state, t = train_op.init(params), 0
    oracle = {name: np.float64(params[name]) for name in ("w", "b")}
    for i, x in enumerate(batches(200, skipped)):
        state, _ = train_op(state, x)
        if i not in skipped:
            decay = min(0.99, (1 + t) / (10 + t))
            for name, average in oracle.items():
                new = np.float64(state.params[name])
                oracle[name] = decay * average + (1 - decay) * new
            t += 1
    assert state.average.step == t == 197
    assert state.average.params["w"].dtype == jnp.float32
    close({name: np.float64(state.average.params[name]) for name in oracle}, oracle)
    averages = train_op.averaged(state)
    assert averages["w"].dtype == jnp.float16
    chex.assert_trees_all_equal(averages["frozen"], params["frozen"])


def test_a_function_of_the_step_is_the_decay():
    train_op = make(wide, moving_average=lambda step: step / (step + 1))
    state, seen = train_op.init(PARAMS), []
    for x in batches(5):
        state, _ = train_op(state, x)
        seen.append(state.params["w"])
        seen[-1] = np.asarray(seen[-1])
    close(train_op.averaged(state)["w"], np.mean(seen, axis=0))


def test_without_an_average_there_is_nothing_to_return():
    train_op = make(wide)
    state = train_op.init(PARAMS)
    assert state.average is None
    with pytest.raises(ValueError, match="averaged") as caught:
        train_op.averaged(state)
    assert str(caught.value) == (
        "train_op.averaged(state): the state holds no average. Make the op with "
        "optimize_loss(moving_average=0.999)."
    )


# A state goes on

BOTH = {
    "loss_scale": optloss.dynamic_loss_scale(64.0, growth_interval=3),
    "moving_average": 0.9,
}


@functools.cache
def both():
    return make(**BOTH)


def follow(state, data):
    for x in data:
        state, _ = both()(state, x)
    return state


def by_orbax(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", both().init(PARAMS))


def by_msgpack(path, state):
    (path / "state").write_bytes(serialization.to_bytes(state))
    template = both().init(PARAMS)
    return serialization.from_bytes(template, (path / "state").read_bytes())


def raw_by_orbax(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return both().adopt(checkpointer.restore(path / "state"))


def raw_by_msgpack(path, state):
    return both().adopt(serialization.msgpack_restore(serialization.to_bytes(state)))


@pytest.mark.parametrize("saver", [by_orbax, by_msgpack, raw_by_orbax, raw_by_msgpack])
def test_a_resumed_run_is_the_straight_one(saver, tmp_path):
    data = batches(10, bad=[2, 6])
    straight = follow(both().init(PARAMS), data)
    halfway = follow(both().init(PARAMS), data[:5])
    resumed = follow(saver(tmp_path, halfway), data[5:])
    chex.assert_trees_all_equal(resumed, straight)


def test_a_traced_start_is_the_start():
    chex.assert_trees_all_equal(jax.jit(both().init)(PARAMS), both().init(PARAMS))


def test_another_op_adopts_the_average_and_the_scale():
    old = follow(both().init(PARAMS), batches(7, bad=[2]))
    other = make(**BOTH, clip_gradients=1.0, optimizer="sgd")
    state = other.adopt(old, {**PARAMS, "new": jnp.ones(2)})
    assert state.opt_state.inner.loss_scale == old.opt_state.inner.loss_scale
    chex.assert_trees_all_equal(
        state.average.params, {**old.average.params, "new": jnp.ones(2)}
    )
    assert state.average.step == old.average.step == 6
    fresh = make(moving_average=0.9).adopt(make().init(PARAMS))
    assert fresh.average.step == 0
    chex.assert_trees_all_equal(fresh.average.params, fresh.params)
    assert make().adopt(old).average is None


ANOTHER = "train_op(state): this is the state of another op. Its {}; here: {}."
CURE = " train_op.adopt(state) makes one of it, with all that fits."


def test_a_state_with_or_without_them_is_told_apart():
    guarded = make(skip_nonfinite=True, moving_average=0.9)
    for state, train_op, words in (
        (both().init(PARAMS), make(loss_scale=BOTH["loss_scale"]),
         ("moving average: AverageState", "none")),
        (make(loss_scale=BOTH["loss_scale"]).init(PARAMS), both(),
         ("moving average: none", "AverageState")),
        (both().init(PARAMS), guarded, ("loss_scale: LossScaleState", "none")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="another op") as caught:
            train_op(state, X)
        assert str(caught.value) == ANOTHER.format(*words) + CURE


# Projection


def test_parameters_are_never_negative():
    train_op = make(
        lambda params, least, x: wide(params, x),
        learning_rate=0.3,
        gradient_noise_scale=5.0,
        learning_rate_multipliers={"w": 2.0},
        projection=optax.projections.projection_non_negative,
        moving_average=0.5,
        update_ops=[lambda least, c: jnp.minimum(least, c.params["w"].min())],
    )
    state = train_op.init(jax.tree.map(np.abs, PARAMS), jnp.zeros(()))
    zeros = 0
    for x in batches(40):
        state, _ = train_op(state, x)
        lowest = min(leaf.min() for leaf in jax.tree.leaves(state.params))
        assert lowest >= 0
        zeros += int(lowest == 0)
    assert zeros > 5
    # What follows sees the projected parameters.
    assert state.model_state == 0
    assert state.average.params["w"].min() >= 0


def test_only_the_trained_are_projected_and_keep_their_dtypes():
    seen = []

    def projection(params):
        seen.append(jax.tree.map(lambda leaf: leaf.dtype.name, params))
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * 0 - 1, params)

    train_op = make(wide, variables="w", projection=projection)
    state = train_op.init({**PARAMS, "w": PARAMS["w"].astype(jnp.bfloat16)})
    state, _ = train_op(state, X)
    assert seen[0] == {"w": "bfloat16", "b": optax.MaskedNode()}
    assert state.params["w"].dtype == jnp.bfloat16
    assert (state.params["w"] == -1).all()
    assert state.params["b"] == 0


def other_shape(params):
    return {**params, "w": params["w"][None]}


def other_structure(params):
    return [params["w"]]


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (
            other_shape,
            "it returned float32[1,3] for 'w', which is float32[3]. Keep the shape.",
        ),
        (
            other_structure,
            "it returned PyTreeDef([*]), not the structure of the trained parameters, "
            "PyTreeDef({'b': *, 'w': *}).",
        ),
    ],
)
def test_another_shape_or_structure_is_refused(projection, message):
    train_op = make(wide, projection=projection)
    with pytest.raises(ValueError, match="projection") as caught:
        train_op(train_op.init(PARAMS), X)
    assert str(caught.value) == (
        f"optimize_loss(projection={projection.__name__}): {message}"
    )

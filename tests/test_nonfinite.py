"""One bad batch, or a thousand, must not cost a run anything."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optloss import (
    adaptive_clipping,
    clip_by_global_norm,
    get_summaries,
    make_optimizer,
    optimize_loss,
    skip_nonfinite,
)

POISONS = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])


def loss(params, model_state, x, y):
    """A regression whose state counts the batches and follows their mean."""
    prediction = x @ params["w"] + params["b"]
    seen = {
        "batches": model_state["batches"] + 1,
        "mean": 0.9 * model_state["mean"] + 0.1 * x.mean(0),
        "average": model_state["average"],
    }
    return jnp.mean((prediction - y) ** 2), seen


def follow_params(model_state, context):
    average = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new, model_state["average"], context.params
    )
    return model_state | {"average": average}


def start():
    params = {"w": jnp.array([1.0, -0.0, -1.0]), "b": jnp.array(-0.0)}
    return params, {"batches": jnp.int32(0), "mean": jnp.zeros(3), "average": params}


def batches(count, seed=0):
    random = np.random.default_rng(seed)
    xs = random.normal(size=(count, 8, 3)).astype(np.float32)
    return xs, (xs @ np.float32([1, 2, 3]) + 4).astype(np.float32)


def train(train_op, state, xs, ys):
    for x, y in zip(xs, ys, strict=True):
        state, _ = train_op(state, x, y)
    return state


def raw(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_only_counted(after, before):
    """Only the step and the two counters of ``after`` may differ from ``before``."""
    for name in ("params", "model_state"):
        assert raw(getattr(after, name)) == raw(getattr(before, name))
    assert raw(after.opt_state.inner) == raw(before.opt_state.inner)


def skipped(state):
    found = get_summaries(state)
    return int(found["skipped/total"]), int(found["skipped/consecutive"])


def everything_on(**changes):
    options = {
        "gradient_noise_scale": 0.01,
        "gradient_multipliers": {"b": 2.0},
        "clip_gradients": adaptive_clipping(),
        "learning_rate_decay_fn": lambda rate, step: rate * 0.99**step,
        "learning_rate_multipliers": {"b": 0.5},
        "update_ops": [follow_params],
        "skip_nonfinite": True,
    }
    return optimize_loss(loss, 0, 0.05, "Adam", **options | changes)


@POISONS
def test_a_bad_batch_moves_the_step_and_the_counters_alone(poison):
    train_op, (xs, ys) = everything_on(donate=False), batches(100)
    xs[20, 3, 1] = poison
    before = train(train_op, train_op.init(*start()), xs[:20], ys[:20])
    after, output = train_op(before, xs[20], ys[20])
    assert not np.isfinite(output.loss)
    assert_only_counted(after, before)
    assert (before.step, after.step) == (20, 21)
    assert (skipped(before), skipped(after)) == ((0, 0), (1, 1))
    last = train(train_op, after, xs[21:], ys[21:])
    assert (skipped(last), last.step) == ((1, 0), 100)
    assert last.model_state["batches"] == 99
    assert output.loss.dtype == jnp.float32


@pytest.mark.wide
@pytest.mark.parametrize(
    "clip",
    [None, 1.0, adaptive_clipping(decay_warmup=False)],
    ids=["no clip", "clip", "adaptive"],
)
def test_where_nothing_reads_the_step_it_is_as_if_it_had_never_been(clip):
    train_op = everything_on(clip_gradients=clip, learning_rate_decay_fn=None)
    xs, ys = batches(99)
    straight = train(train_op, train_op.init(*start()), xs, ys)
    xs, ys = np.insert(xs, 20, np.nan, axis=0), np.insert(ys, 20, 0, axis=0)
    with_one = train(train_op, train_op.init(*start()), xs, ys)
    assert_only_counted(with_one, straight)
    assert (straight.step, with_one.step) == (99, 100)
    assert (skipped(straight), skipped(with_one)) == ((0, 0), (1, 0))


def test_a_thousand_bad_batches_in_a_row_change_nothing():
    train_op, (xs, ys) = everything_on(donate=False), batches(10)
    before = train(train_op, train_op.init(*start()), xs, ys)
    bad = jnp.full_like(xs[0], jnp.nan)

    @jax.jit
    def starve(state):
        def body(state, _):
            return train_op.update(state, bad, ys[0])[0], None

        return jax.lax.scan(body, state, length=1000)[0]

    after = starve(before)
    assert_only_counted(after, before)
    assert (skipped(after), after.step) == ((1000, 1000), 1010)
    recovered = train(train_op, after, xs, ys)
    assert skipped(recovered) == (1000, 0)
    assert raw(recovered.params) != raw(before.params)


def test_negative_zeros_stay_negative():
    train_op = everything_on()
    state = train_op.init(*start())
    state, _ = train_op(state, np.full((8, 3), np.nan, np.float32), np.zeros(8))
    assert raw(state.params) == raw(start()[0])
    assert np.signbit(state.params["b"])


@POISONS
def test_a_loss_alone_may_be_bad_and_a_gradient_alone(poison):
    @jax.custom_jvp
    def identity(x, slope):
        return x + 0 * slope

    identity.defjvp(lambda primals, tangents: (primals[0], primals[1] * tangents[0]))
    train_op = optimize_loss(
        lambda w, offset, slope: identity(jnp.sum(w), slope) + offset,
        0,
        0.1,
        "SGD",
        skip_nonfinite=True,
        donate=False,
    )
    state = train_op.init(jnp.array([1.0, -0.0]))
    for offset, slope, made in [(0, 1, 1), (poison, 1, 0), (0, poison, 0)]:
        after, _ = train_op(state, jnp.float32(offset), jnp.float32(slope))
        assert (raw(after.params) != raw(state.params)) == made
        assert skipped(after) == (1 - made, 1 - made)


def test_it_is_judged_behind_noise_and_multipliers():
    params = {"good": jnp.ones(2), "bad": jnp.zeros(2)}

    def root(params):
        # The slope of a root at zero is infinite.
        return jnp.sum(params["good"] ** 2) + jnp.sum(jnp.sqrt(params["bad"]))

    for multipliers, made in [(None, False), ({"bad": 0.0}, True)]:
        train_op = optimize_loss(
            root,
            0,
            0.1,
            "SGD",
            gradient_multipliers=multipliers,
            skip_nonfinite=True,
        )
        state, _ = train_op(train_op.init(params))
        assert bool((state.params["good"] != 1).all()) == made
        assert skipped(state) == (1 - made, 1 - made)
    noisy = optimize_loss(
        lambda w: jnp.sum(w), 0, 0.1, "SGD",
        gradient_noise_scale=jnp.float32(np.inf), skip_nonfinite=True,
    )  # fmt: skip
    assert skipped(noisy(noisy.init(jnp.ones(2)))[0]) == (1, 1)


def test_a_finite_gradient_beyond_measure_counts_as_infinite():
    train_op = optimize_loss(
        lambda w, slope: slope * jnp.sum(w), 0, 1e-30, "SGD", skip_nonfinite=True
    )
    few, _ = train_op(train_op.init(jnp.zeros(1)), 3e38)
    many, _ = train_op(train_op.init(jnp.zeros(4)), 3e38)
    assert (skipped(few), skipped(many)) == ((0, 0), (1, 1))


def test_the_clip_has_measured_already():
    """No second norm is computed where the clip has one."""
    x, y = (batch[0] for batch in batches(1))
    params, seen = start()
    for clip, guard, norms in [
        (None, False, 0),
        (None, True, 1),
        (1.0, False, 1),
        (1.0, True, 1),
        (adaptive_clipping(), True, 1),
    ]:
        train_op = everything_on(clip_gradients=clip, skip_nonfinite=guard)
        state = train_op.init(params, seen)
        program = str(jax.make_jaxpr(train_op.update)(state, x, y))
        assert program.count("jvp=_measure_jvp") == norms


def momentum(**options):
    return skip_nonfinite(optax.sgd(0.1, momentum=0.9, **options))


@POISONS
def test_a_guarded_optimizer_updates_by_negative_zeros(poison):
    params = {"w": jnp.array([1.0, -0.0]), "z": jnp.array([-0.0 - 0.0j])}
    transform = momentum()
    update = jax.jit(transform.update)
    grads = jax.tree.map(jnp.ones_like, params)
    _, before = update(grads, transform.init(params), params)
    bad = grads | {"w": jnp.array([1.0, poison])}
    updates, after = update(bad, before, params)
    assert raw(optax.apply_updates(params, updates)) == raw(params)
    assert raw(after.inner) == raw(before.inner)
    assert (after.total, after.consecutive) == (1, 1)
    _, last = update(grads, after, params)
    assert (last.total, last.consecutive) == (1, 0)


def test_the_loss_is_judged_where_it_is_passed():
    for transform in (momentum(), make_optimizer(0.1, "sgd", skip_nonfinite=True)):
        params = jnp.ones(2)
        state = transform.init(params)
        for value, made in [
            (1.0, True),
            (jnp.nan, False),
            (jnp.float32(jnp.inf), False),
        ]:
            updates, after = transform.update(params, state, params, value=value)
            assert bool((updates != 0).all()) == made
            assert after.total == 1 - made


def test_it_may_guard_the_first_half_of_a_chain():
    chain = optax.chain(clip_by_global_norm(1.0), skip_nonfinite(optax.adam(0.1)))
    params = jnp.ones(2)
    state = chain.init(params)
    updates, state = chain.update(jnp.array([jnp.nan, 1]), state, params)
    assert not updates.any()
    found = get_summaries(state)
    assert np.isnan(found["global_norm/gradient_norm"])
    assert found["skipped/consecutive"] == 1


@pytest.mark.wide
@pytest.mark.parametrize(
    "inner",
    [
        lambda: optax.contrib.schedule_free_sgd(jnp.float32(0.1)),
        lambda: optax.lars(jnp.float32(0.1)),
        lambda: optax.contrib.cocob(),
    ],
)
def test_an_inner_state_that_drifts_is_held(inner):
    """Of bfloat16 parameters, optax lets some states become float32."""
    transform, params = skip_nonfinite(inner()), jnp.ones((3, 2), jnp.bfloat16)
    state = transform.init(params)
    for _ in range(2):
        _, after = transform.update(params, state, params)
        before = [leaf.dtype for leaf in jax.tree.leaves(state)]
        assert [leaf.dtype for leaf in jax.tree.leaves(after)] == before
        state = after


@pytest.mark.parametrize(
    ("inner", "shown"), [(0.1, "0.1"), (optax.adam, "adam"), (None, "None")]
)
def test_what_is_no_transformation_is_refused(inner, shown):
    message = f"skip_nonfinite(inner={shown}): must be an optax transformation."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        skip_nonfinite(inner)


def test_the_switch_must_be_a_bool():
    message = "make_optimizer(skip_nonfinite=1): must be True or False."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_optimizer(0.1, "sgd", skip_nonfinite=1)

"""One bad batch, or a thousand, must not cost a run anything."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optloss import (
    adaptive_clipping,
    get_summaries,
    make_optimizer,
    optimize_loss,
    skip_nonfinite,
)

POISONS = [np.nan, np.inf, -np.inf]


def loss(params, model_state, x, y):
    """A linear regression whose state counts batches and follows their mean."""
    prediction = x @ params["w"] + params["b"]
    seen = {
        "batches": model_state["batches"] + 1,
        "mean": 0.9 * model_state["mean"] + 0.1 * x.mean(0),
        "average": model_state["average"],
    }
    return jnp.mean((prediction - y) ** 2), seen, prediction


def average(model_state, context):
    """An update op: the moving average of the parameters."""
    follow = lambda a, p: 0.9 * a + 0.1 * p  # noqa: E731
    return model_state | {
        "average": jax.tree.map(follow, model_state["average"], context.params)
    }


def start():
    params = {"w": jnp.array([1.0, -0.0, -1.0]), "b": jnp.array(-0.0)}
    seen = {"batches": jnp.int32(0), "mean": jnp.zeros(3), "average": params}
    return params, seen


def batches(count, seed=0):
    random = np.random.default_rng(seed)
    xs = random.normal(size=(count, 8, 3)).astype(np.float32)
    return xs, (xs @ [1, 2, 3] + 4).astype(np.float32)


def train(train_op, state, xs, ys):
    for x, y in zip(xs, ys, strict=True):
        state, _ = train_op(state, x, y)
    return state


def raw(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def counted(state):
    found = get_summaries(state)
    return int(found["skipped/total"]), int(found["skipped/consecutive"])


def everything_on(**changes):
    options = {
        "gradient_noise_scale": 0.01,
        "gradient_multipliers": {"b": 2.0},
        "clip_gradients": adaptive_clipping(),
        "learning_rate_decay_fn": lambda rate, step: rate * 0.99**step,
        "learning_rate_multipliers": {"b": 0.5},
        "update_ops": [average],
        "skip_nonfinite": True,
    }
    return optimize_loss(loss, 0, 0.05, "Adam", **options | changes)


@pytest.mark.parametrize("poison", POISONS)
def test_a_bad_batch_moves_the_step_and_the_counters_alone(poison):
    train_op, (xs, ys) = everything_on(donate=False), batches(100)
    xs[20, 3, 1] = poison
    before = train(train_op, train_op.init(*start()), xs[:20], ys[:20])
    after, output = train_op(before, xs[20], ys[20])
    assert not np.isfinite(output.loss)
    assert (before.step, after.step) == (20, 21)
    assert (counted(before), counted(after)) == ((0, 0), (1, 1))
    for name in ("params", "model_state"):
        assert raw(getattr(after, name)) == raw(getattr(before, name))
    assert raw(after.opt_state.inner) == raw(before.opt_state.inner)
    last = train(train_op, after, xs[21:], ys[21:])
    assert (counted(last), last.step) == ((1, 0), 100)
    assert last.model_state["batches"] == 99
    assert np.isfinite(np.concatenate(jax.tree.leaves(jax.tree.map(np.ravel, last.params)))).all()


@pytest.mark.parametrize("clip", [None, 1.0, adaptive_clipping()])
def test_where_nothing_reads_the_step_it_is_as_if_it_had_never_been(clip):
    train_op = everything_on(clip_gradients=clip, learning_rate_decay_fn=None)
    if clip is not None and not isinstance(clip, float):
        train_op = everything_on(
            clip_gradients=adaptive_clipping(decay_warmup=False),
            learning_rate_decay_fn=None,
        )
    xs, ys = batches(99)
    bad, targets = np.insert(xs, 20, np.nan, axis=0), np.insert(ys, 20, 0, axis=0)
    straight = train(train_op, train_op.init(*start()), xs, ys)
    with_one = train(train_op, train_op.init(*start()), bad, targets)
    assert (straight.step, with_one.step) == (99, 100)
    for name in ("params", "model_state"):
        assert raw(getattr(with_one, name)) == raw(getattr(straight, name))
    assert raw(with_one.opt_state.inner) == raw(straight.opt_state.inner)


def test_a_thousand_bad_batches_in_a_row_change_nothing():
    train_op, (xs, ys) = everything_on(donate=False), batches(30)
    before = train(train_op, train_op.init(*start()), xs, ys)

    @jax.jit
    def starve(state):
        bad = (jnp.full_like(xs[0], jnp.nan), jnp.zeros_like(ys[0]))
        return jax.lax.scan(
            lambda state, _: (train_op.update(state, *bad)[0], None),
            state,
            length=1000,
        )[0]

    after = starve(before)
    assert (counted(after), after.step) == ((1000, 1000), 1030)
    assert raw(after.params) == raw(before.params)
    assert raw(after.opt_state.inner) == raw(before.opt_state.inner)
    recovered = train(train_op, after, xs, ys)
    assert counted(recovered) == (1000, 0)
    assert raw(recovered.params) != raw(before.params)


def test_signs_of_zeros_survive():
    train_op = everything_on()
    params, seen = start()
    state, _ = train_op(train_op.init(params, seen), *np.full((2, 8, 3), np.nan)[..., :3][0:1], 0.0)
    assert raw(state.params) == raw(params)

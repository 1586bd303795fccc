"""The update in parts: which there are, and that they change nothing."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss
from optloss import turns

LARGE = 64
SHAPES = {"kernel": (20, 30), "bias": (30,), "embedding": (8, 9, 2), "scale": ()}


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch):
    """Behave as where one CPU is all there is, and take less for large."""
    monkeypatch.setattr(turns, "_on_one_cpu", lambda: True)
    monkeypatch.setattr(turns, "LARGE", LARGE)


def network(seed=0):
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(random.normal(size=shape), jnp.float32)
        for name, shape in SHAPES.items()
    }


def updater(optimizer):
    """Return ``update(gradients, state, params) -> params, state``, and ``init``."""
    tx = optax.with_extra_args_support(optimizer)

    def update(gradients, state, params):
        updates, state = tx.update(gradients, state, params, value=jnp.ones(()))
        return optax.apply_updates(params, updates), state

    return update, tx.init


def branches(update, before, *args):
    def step(before, *args):
        return turns.in_turn(update, before, jnp.ones(()), *args)

    return str(jax.make_jaxpr(step)(before, *args)).count("cond[")


def largest(params):
    return sum(leaf.size >= LARGE for leaf in params.values())


# By how many parts they have: one a large leaf, or one for all, which needs no branch.
LEAF_BY_LEAF = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw, some masked": optax.adamw(
        0.1, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    ),
    "lion": optax.lion(0.1),
    "lamb": optax.lamb(0.1),
    "adafactor": optax.adafactor(0.1),
    "TensorFlow's Ftrl": optloss.optimizers.tensorflow.ftrl(0.1),
    "TensorFlow's RMSProp": optloss.optimizers.tensorflow.rmsprop(0.1, centered=True),
    "several": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1)},
        {"kernel": "a", "bias": "b", "embedding": "b", "scale": "a"},
    ),
}
ALL_TOGETHER = {
    "behind a clip": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    "prodigy": optax.contrib.prodigy(0.1),
    "dowg": optax.contrib.dowg(0.1),
    "guarded": optax.apply_if_finite(optax.sgd(0.1), 3),
}
OPTIMIZERS = LEAF_BY_LEAF | ALL_TOGETHER


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_parts_are_the_leaves_or_all_is_one(name):
    update, init = updater(OPTIMIZERS[name])
    params = network()
    state = init(params)
    found = branches(update, (params, state), network(1), state, params)
    inside = str(jax.make_jaxpr(update)(network(1), state, params)).count("cond[")
    assert found - inside == (largest(params) if name in LEAF_BY_LEAF else 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_updates_in_parts_are_those_made_at_once(name):
    update, init = updater(OPTIMIZERS[name])
    in_parts = jax.jit(
        lambda gradients, state, params: turns.in_turn(
            update, (params, state), jnp.ones(()), gradients, state, params
        )
    )
    at_once = jax.jit(update)
    one = other = (network(), init(network()))
    for seed in (1, 2, 3):
        one = in_parts(network(seed), one[1], one[0])
        other = at_once(network(seed), other[1], other[0])
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.weak_type) == (b.dtype, b.weak_type)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


def test_leaves_that_an_operation_brings_together_stay_together():
    def update(leaves):
        a, b, c, d = leaves
        return [a + jnp.max(b), b * 2, c + 1, jnp.sin(d)]

    leaves = [i * jnp.ones(LARGE) for i in range(4)]
    assert branches(update, leaves, leaves) == 3
    found = turns.in_turn(update, leaves, jnp.ones(()), leaves)
    for one, other in zip(found, update(leaves), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_what_enters_all_parts_is_computed_once():
    def update(leaves, rate, count):
        rate = rate * 0.5**count
        moved = [leaf - rate * leaf for leaf in leaves]
        return [*moved, rate, count + 1, jnp.float32(7), leaves[0]]

    leaves = [jnp.ones(LARGE), 2 * jnp.ones(LARGE), jnp.ones(3)]
    rate, count = jnp.float32(0.1), jnp.int32(1)
    before = [*leaves, rate, count, jnp.float32(0), leaves[0]]
    traced = jax.make_jaxpr(functools.partial(turns.in_turn, update))(
        before, jnp.ones(()), leaves, rate, count
    )
    assert str(traced).count("cond[") == 2
    assert str(traced).count("pow") == 1
    found = turns.in_turn(update, before, jnp.ones(()), leaves, rate, count)
    for one, other in zip(found, update(leaves, rate, count), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_result_unlike_what_was_before_is_made_at_once():
    def update(leaves):
        return [leaf.astype(jnp.bfloat16) for leaf in leaves]

    leaves = [jnp.ones(LARGE), jnp.ones(LARGE)]
    assert branches(update, leaves, leaves) == 0
    assert turns.in_turn(update, leaves, jnp.ones(()), leaves)[0].dtype == jnp.bfloat16


# In a training op


def linear(params, gradients):
    products = jax.tree.map(jnp.vdot, params, gradients)
    return jax.tree.reduce(jnp.add, products)


@jax.custom_vjp
def given(params, gradients):
    """Be a loss of which the gradient is there already."""
    del params, gradients
    return jnp.zeros(())


given.defvjp(
    lambda params, gradients: (jnp.zeros(()), gradients),
    lambda gradients, _: (gradients, jax.tree.map(jnp.zeros_like, gradients)),
)


def make(loss=linear, **changed):
    arguments = {
        "gradient_multipliers": {"kernel": 0.5},
        "clip_gradients": 1.0,
        "learning_rate_multipliers": {"embedding": 0.1},
        "learning_rate_decay_fn": lambda rate, step: rate * 0.9**step,
        "skip_nonfinite": True,
    }
    return optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=0.1,
        optimizer="adam",
        **arguments | changed,
    )


def run(step, state, seeds=(1, 2, 3)):
    for seed in seeds:
        state, output = step(state, network(seed))
    return state, output


def at_once(monkeypatch, function):
    """Return ``function()`` as it is where leaves have no turns."""
    with monkeypatch.context() as patch:
        patch.setattr(turns, "_on_one_cpu", lambda: False)
        return function()


def assert_alike(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def steps_in_a_loop():
    train_op = make()
    return run(train_op, train_op.init(network()))


def steps_in_a_scan():
    train_op = make()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(network, (1, 2, 3)))
    return jax.lax.scan(train_op.update, train_op.init(network()), stacked)


def steps_of_a_sweep():
    train_op = make()
    start = train_op.init(network())

    def one(rate):
        return run(train_op.update, optloss.set_learning_rate(start, rate))

    return jax.jit(jax.vmap(one))(jnp.array([0.1, 0.01]))


def gradient_through_two_steps():
    train_op = make()
    start = train_op.init(network())

    def final(rate):
        state = optloss.set_learning_rate(start, rate)
        return linear(run(train_op.update, state)[0].params, network(9))

    return jax.jit(jax.grad(final))(0.1)


def step_with_a_traced_multiplier():
    @jax.jit
    def one(factor):
        train_op = make(learning_rate_multipliers={"embedding": factor})
        return run(train_op.update, train_op.init(network()), seeds=(1,))

    return one(0.1)


@pytest.mark.parametrize(
    "steps",
    [
        steps_in_a_loop,
        steps_in_a_scan,
        steps_of_a_sweep,
        gradient_through_two_steps,
        step_with_a_traced_multiplier,
    ],
    ids=lambda steps: steps.__name__,
)
def test_a_training_op_does_in_parts_what_it_does_at_once(steps, monkeypatch):
    assert_alike(steps(), at_once(monkeypatch, steps))


def test_a_skipped_update_keeps_every_bit():
    train_op = make(donate=False)
    state, _ = run(train_op, train_op.init(network()))
    bad = network(4) | {"scale": jnp.float32(jnp.nan)}
    after, _ = train_op(state, bad)
    for a, b in zip(
        jax.tree.leaves((state.params, state.opt_state.inner)),
        jax.tree.leaves((after.params, after.opt_state.inner)),
        strict=True,
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("loss", [given, linear])
@pytest.mark.parametrize("guarded", [False, True])
def test_no_leaf_is_copied(loss, guarded, monkeypatch):
    """The parts update in place: besides, a step needs no more than made at once."""
    params = {f"layer_{i}": jnp.ones(10_000) for i in range(4)}

    def compiled():
        train_op = make(
            loss,
            gradient_multipliers=None,
            learning_rate_multipliers=None,
            skip_nonfinite=guarded,
        )
        step = jax.jit(train_op.update, donate_argnums=0)
        return step.lower(train_op.init(params), params).compile()

    in_parts, whole = compiled(), at_once(monkeypatch, compiled)
    assert in_parts.as_text().count(" conditional(") == 4 + guarded
    assert whole.as_text().count(" conditional(") == guarded
    more, less = (
        step.memory_analysis().temp_size_in_bytes for step in (in_parts, whole)
    )
    assert more - less < 0.1 * params["layer_0"].nbytes


COUNT = """
import jax, jax.numpy as jnp, optloss

jax.config.update("jax_num_cpu_devices", {devices})
train_op = optloss.optimize_loss(
    lambda params: sum(jnp.sum(jnp.sin(leaf)) for leaf in params),
    global_step=0, learning_rate=0.1, optimizer="adam", clip_gradients={clip},
)
state = train_op.init([jnp.ones(2**17), jnp.ones((2**9, 2**8)), jnp.ones(2**16)])
compiled = jax.jit(train_op.update).lower(state).compile()
print(compiled.as_text().count(" conditional("))
"""


@pytest.mark.parametrize(
    ("devices", "clip", "expected"), [(1, 1.0, 2), (2, 1.0, 0), (1, None, 0)]
)
def test_turns_are_taken_on_one_cpu_where_all_wait_for_a_norm(devices, clip, expected):
    program = COUNT.format(devices=devices, clip=clip)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == expected

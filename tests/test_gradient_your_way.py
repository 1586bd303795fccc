"""The gradient by another way, in a whole training step: design 2.7."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distributed.meshes import AUTO, EXPLICIT, collectives, entered, line, put
from flax import nnx
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import optloss
from optloss.integrations import nnx as nnx_integration

RANDOM = np.random.default_rng(0)
PARAMS = {
    "w": RANDOM.normal(size=(3, 5)).astype(np.float32),
    "v": RANDOM.normal(size=5).astype(np.float32),
}
X, Y = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((16, 3), (16,)))


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def make(loss=loss, **options):
    common = {"global_step": 0, "learning_rate": 0.1, "optimizer": "adam"}
    return optloss.optimize_loss(loss, **common | options)


def run(train_op, params=PARAMS, batches=((X, Y),) * 3, model_state=None):
    state = train_op.init(params, model_state)
    for batch in batches:
        state, output = train_op(state, *batch)
    return state, output


@functools.cache
def plain(optimizer="adam", steps=3):
    """What the whole batch gives."""
    return run(make(optimizer=optimizer), batches=((X, Y),) * steps)


def close(found, expected, rtol=1e-6, atol=1e-6):
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


# Accumulation

OPTIONS = {
    "gradient_noise_scale": 0.01,
    "gradient_multipliers": {"v": 0.5},
    "clip_gradients": 0.2,
    "summaries": optloss.OPTIMIZER_SUMMARIES,
}


def test_accumulation_trains_as_the_whole_batch_does():
    # SGD, as Adam divides a gradient near zero by its own size.
    options = {**OPTIONS, "optimizer": "sgd", "summaries": ["gradient_norm"]}
    whole = run(make(**options))
    found = run(make(value_and_grad=optloss.accumulate_gradients(4), **options))
    close(found[0].params, whole[0].params)
    close(found[1].loss, whole[1].loss)
    tag = "OptimizeLoss/global_norm/gradient_norm"
    close(found[1].summaries[tag], whole[1].summaries[tag])
    assert found[1].summaries.keys() == whole[1].summaries.keys()


def test_statistics_pass_the_slices_in_order_and_keys_are_split():
    def normalised(params, model_state, x, y, key):
        mean = 0.9 * model_state["mean"] + 0.1 * x.mean(0)
        dropped = jax.random.bernoulli(key, 0.5, x.shape)
        return loss(params, (x - mean) * dropped, y), {"mean": mean}, dropped.sum()

    one = jax.jit(normalised)
    key, state = jax.random.key(3), {"mean": jnp.zeros(3)}
    train_op = make(normalised, value_and_grad=optloss.accumulate_gradients(4))
    found, output = train_op(train_op.init(PARAMS, state), X, Y, key)
    kept = []
    for i, own in enumerate(jax.random.split(key, 4)):
        _, state, dropped = one(PARAMS, state, X[i::4], Y[i::4], own)
        kept.append(dropped)
    close(found.model_state, state)
    assert output.aux.tolist() == [int(count) for count in kept]


def counted(jaxpr, name):
    """How often a primitive stands in a program, loops counted once."""
    inner = (
        counted(sub, name)
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for sub in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns"))
        if hasattr(getattr(sub, "jaxpr", sub), "eqns")
        for sub in [getattr(sub, "jaxpr", sub)]
    )
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(inner)


def scans(jaxpr):
    """The bodies of the loops of a program."""
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            sub = getattr(value, "jaxpr", value)
            if hasattr(sub, "eqns"):
                if eqn.primitive.name == "scan":
                    yield sub
                yield from scans(sub)


def test_noise_clip_and_optimizer_run_once():
    calls = []

    def marked(name):
        def update(updates, state, params=None):
            calls.append(name)
            # atan2 stands for the transform in the program.
            return jax.tree.map(lambda u: jnp.atan2(u, 1.0), updates), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    train_op = make(
        gradient_noise_scale=marked("noise"),
        clip_gradients=marked("clip"),
        optimizer=marked("optimizer"),
        learning_rate=None,
        value_and_grad=optloss.accumulate_gradients(4),
    )
    state = train_op.init(PARAMS)
    program = jax.make_jaxpr(train_op.update)(state, X, Y).jaxpr
    assert calls == ["noise", "clip", "optimizer"]
    assert counted(program, "atan2") == 3 * len(PARAMS)
    bodies = list(scans(program))
    assert bodies
    assert sum(counted(body, "tanh") for body in bodies) > 0
    assert sum(counted(body, "atan2") for body in bodies) == 0


def temporaries(steps):
    def deep(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    train_op = make(deep, value_and_grad=optloss.accumulate_gradients(steps))
    state = jax.eval_shape(train_op.init, [jnp.zeros((64, 64))] * 16)
    x = jax.ShapeDtypeStruct((8192, 64), jnp.float32)
    program = jax.jit(train_op.update, donate_argnums=0).lower(state, x).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_four_slices_need_a_third_of_the_temporaries():
    assert temporaries(4) <= 0.35 * temporaries(1)


MANY = np.resize(X, (256, 3)), np.resize(Y, 256)


@functools.cache
def plain_of_many():
    return run(make(), batches=[MANY])


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_accumulation_keeps_the_batch_where_it_is(kind):
    mesh = line(kind)
    train_op = make(value_and_grad=optloss.accumulate_gradients(4))
    with entered(mesh):
        state = train_op.init(put(PARAMS, mesh, P()))
        batch = put(MANY, mesh, (P("data"), P("data")))
        program = jax.jit(train_op.update).lower(state, *batch).compile()
        state, output = program(state, *batch)
    assert {found.kind for found in collectives(program)} == {"all-reduce"}
    expected, whole = plain_of_many()
    close((state.params, output.loss), (expected.params, whole.loss), 1e-5)


def test_a_line_search_sees_the_whole_batch():
    def update(updates, state, params=None, *, value_fn, **extra):
        return updates, value_fn(params)

    search = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(()), update)
    train_op = make(optimizer=search, value_and_grad=optloss.accumulate_gradients(4))
    state, _ = run(train_op, batches=[(X, Y)])
    close(state.opt_state.optimizer, loss(PARAMS, X, Y))


# Clipping by example


@functools.cache
def clipped_one_by_one():
    one = jax.jit(jax.grad(loss))
    total = jax.tree.map(np.zeros_like, PARAMS)
    for i in range(len(X)):
        gradient = one(PARAMS, X[i : i + 1], Y[i : i + 1])
        factor = min(1.0, 1 / optax.tree.norm(gradient)) / len(X)
        total = jax.tree.map(lambda t, g, c=factor: t + c * g, total, gradient)
    return total


@pytest.mark.parametrize("batch", [None, 4])
def test_clipping_by_example_is_a_loop_over_batches_of_one(batch):
    train_op = make(
        optimizer="sgd", value_and_grad=optloss.clip_per_example(1.0, batch=batch)
    )
    state, _ = run(train_op, batches=[(X, Y)])
    total = clipped_one_by_one()
    close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, total))
    assert optax.tree.norm(total) <= 1


def test_with_noise_it_is_the_step_of_dp_sgd():
    """Abadi et al., Algorithm 1: mean and covariance over 2,000 seeds."""
    max_norm, sigma, draws = 0.5, 1.5, 2000
    std = sigma * max_norm / len(X)

    def linear(params, x):
        return jnp.mean(x @ params["w"]) + 0 * params["b"]

    @jax.jit
    @jax.vmap
    def gradient(key):
        train_op = make(
            linear,
            learning_rate=1.0,
            optimizer="sgd",
            gradient_noise_scale=std,
            seed=key,
            value_and_grad=optloss.clip_per_example(max_norm),
        )
        state = train_op.init({"w": jnp.zeros(3), "b": jnp.zeros(())})
        state, _ = train_op.update(state, X)
        return jnp.append(-state.params["w"], -state.params["b"])

    found = gradient(jax.random.split(jax.random.key(0), draws))
    rows = X * np.minimum(1, max_norm / np.linalg.norm(X, axis=1))[:, None]
    mean = np.append(rows.mean(0), 0)
    # Five standard errors of a mean, and of a covariance of normal numbers.
    np.testing.assert_allclose(found.mean(0), mean, atol=5 * std / draws**0.5)
    np.testing.assert_allclose(
        np.cov(found.T), std**2 * np.eye(4), atol=5 * std**2 * (2 / draws) ** 0.5
    )


# Other functions like jax.value_and_grad


def test_equinox_differentiates_as_jax_does():
    found = run(make(value_and_grad=eqx.filter_value_and_grad))
    chex.assert_trees_all_equal(found[0], plain()[0])


def changed(change):
    """A function like ``jax.value_and_grad`` that changes the gradients."""

    def value_and_grad(objective, has_aux):
        def differentiate(*args, **kwargs):
            result, gradients = jax.value_and_grad(objective, has_aux=has_aux)(
                *args, **kwargs
            )
            return result, change(gradients)

        return differentiate

    return value_and_grad


MISFITS = {
    "none": (lambda g: {"w": g["w"]}, "returned no gradient for 'v'."),
    "too many": (
        lambda g: {**g, "u": g["v"]},
        "returned gradients for 'u', which are not trained.",
    ),
    "shape": (
        lambda g: {**g, "v": g["w"]},
        "returned float32[3,5] as the gradient of 'v', which is float32[5]. Keep "
        "shapes and dtypes.",
    ),
    "dtype": (
        lambda g: {**g, "w": g["w"].astype(jnp.bfloat16)},
        "returned bfloat16[3,5] as the gradient of 'w', which is float32[3,5]. Keep "
        "shapes and dtypes.",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_gradients_that_do_not_fit_are_refused_by_their_name(misfit):
    change, message = MISFITS[misfit]
    train_op = make(value_and_grad=changed(change))
    with pytest.raises(ValueError, match="value_and_grad") as caught:
        train_op(train_op.init(PARAMS), X, Y)
    assert str(caught.value) == (
        f"optimize_loss(value_and_grad=value_and_grad): {message}"
    )


def test_what_returns_no_function_is_refused():
    def value_and_grad(objective, has_aux):
        return None

    train_op = make(value_and_grad=value_and_grad)
    with pytest.raises(ValueError, match="value_and_grad") as caught:
        train_op(train_op.init(PARAMS), X, Y)
    assert str(caught.value) == (
        "optimize_loss(value_and_grad=value_and_grad): returned None, no function of "
        "the parameters."
    )


def test_sam_is_a_function_of_ten_lines():
    """Sharpness-aware minimisation: the gradient at the top of a small ball."""

    def sharpness_aware(objective, has_aux):
        differentiate = jax.value_and_grad(objective, has_aux=has_aux)

        def at_the_top(params, *args, **kwargs):
            result, g = differentiate(params, *args, **kwargs)
            radius = 0.05 / optax.tree.norm(g)
            top = jax.tree.map(lambda p, g: p + radius * g, params, g)
            return result, differentiate(top, *args, **kwargs)[1]

        return at_the_top

    _, output = run(make(value_and_grad=sharpness_aware), batches=[(X, Y)] * 40)
    assert output.loss < 0.5 * loss(PARAMS, X, Y)


# Gradients from elsewhere

differentiated = jax.jit(jax.value_and_grad(loss))


GUARDED = {"skip_nonfinite": True, "pack_small_leaves": 8, "moving_average": 0.9}
GROUPS = {"optimizer": {"w": "sgd", "**": "adam"}, "colocate_gradients_with_ops": True}


@pytest.mark.parametrize(
    "options",
    [{**OPTIONS, "variables": "v", "gradient_multipliers": None}, GUARDED, GROUPS],
    ids=["summaries", "guarded", "groups"],
)
def test_the_losss_own_gradients_make_the_same_step(options):
    train_op = make(**options)
    state, given = train_op.init(PARAMS), train_op.init(PARAMS)
    for _ in range(3):
        value, gradients = differentiated(given.params, X, Y)
        state, output = train_op(state, X, Y)
        given, made = train_op.apply_gradients(given, gradients, loss=value)
        chex.assert_trees_all_equal((given, made), (state, output))


def test_gradients_by_forward_mode_and_of_two_losses():
    @jax.jit
    def elsewhere(params):
        def other(params):
            return jnp.sum(jnp.abs(params["v"]))

        forward, slope = jax.jacfwd(loss)(params, X, Y), jax.grad(other)(params)
        return forward, jax.tree.map(lambda a, b: a + 0.3 * b, forward, slope)

    forward, both = elsewhere(PARAMS)
    train_op = make(optimizer="sgd")
    found, _ = train_op.apply_gradients(train_op.init(PARAMS), forward)
    expected = plain("sgd", steps=1)[0].params
    close(found.params, expected)
    found, _ = train_op.apply_gradients(train_op.init(PARAMS), both)
    expected["v"] = expected["v"] - 0.1 * 0.3 * np.sign(PARAMS["v"])
    close(found.params, expected)


def test_reptile():
    """Nichol et al. 2018: from the parameters to those of an inner run."""
    outer = make(learning_rate=0.5, optimizer="sgd")
    state = outer.init(PARAMS)
    there = plain()[0].params
    difference = jax.tree.map(jnp.subtract, state.params, there)
    state, output = outer.apply_gradients(state, difference)
    halfway = jax.tree.map(lambda p, q: (p + q) / 2, PARAMS, there)
    close(state.params, halfway)
    assert output.loss is None
    assert output.summaries.keys() == {"OptimizeLoss/learning_rate"}


def test_the_rest_of_a_tree_of_gradients_is_not_looked_at():
    train_op = make(variables="w", update_ops=[lambda state, context: context.aux])
    state, output = train_op.apply_gradients(
        train_op.init(PARAMS, jnp.zeros(())),
        {"w": PARAMS["w"], "v": "nothing", "activation": jnp.tanh},
        aux=jnp.ones(()),
    )
    assert (state.params["v"] == PARAMS["v"]).all()
    assert state.model_state == output.aux == 1


def test_a_given_model_state_is_adopted():
    train_op = make(lambda params, seen, x, y: (loss(params, x, y), seen))
    state = train_op.init(PARAMS, {"n": jnp.zeros(2)})
    state, _ = train_op.apply_gradients(state, PARAMS)
    assert (state.model_state["n"] == 0).all()
    state, _ = train_op.apply_gradients(
        state, PARAMS, model_state={"n": np.ones(2, "f")}
    )
    assert (state.model_state["n"] == 1).all()


NEEDS = (
    "Pass loss= for 'value'; 'value_fn', the loss as a function, is known only to a "
    "step of the loss, train_op(state, ...)."
)
APPLY = {
    "missing": (
        {},
        {"gradients": {"w": PARAMS["w"]}},
        "gradients holds none for 'v'. Give one under the name of each trained "
        "parameter, or choose what is trained with variables=.",
    ),
    "shape": (
        {},
        {"gradients": {**PARAMS, "v": X}},
        "the gradient of 'v' is float32[16,3]; the parameter is float32[5].",
    ),
    "ints": (
        {},
        {"gradients": {**PARAMS, "v": np.ones(5, np.int32)}},
        "the gradient of 'v' is int32[5]; the parameter is float32[5].",
    ),
    "vector": (
        {},
        {"gradients": PARAMS, "loss": Y},
        "the loss must be a real floating scalar, got float32[16]. Reduce it first, "
        "for example with loss.mean().",
    ),
    "model_state": (
        {},
        {"gradients": PARAMS, "model_state": {"n": Y}},
        "it was given a model_state of another structure, PyTreeDef({'n': *}), not "
        "PyTreeDef(None). Return all of it, changed or not.",
    ),
    "line search": (
        {"optimizer": "lbfgs"},
        {"gradients": PARAMS, "loss": 1.0},
        "a transform needs more than the gradient: scale_by_zoom_linesearch.<locals>."
        "update_fn() missing 1 required keyword-only argument: 'value_fn'. " + NEEDS,
    ),
    "plateau": (
        {"optimizer": optax.contrib.reduce_on_plateau()},
        {"gradients": PARAMS},
        "a transform needs more than the gradient: reduce_on_plateau.<locals>."
        "update_fn() missing 1 required keyword-only argument: 'value'. " + NEEDS,
    ),
}


@pytest.mark.parametrize("mistake", APPLY)
def test_apply_gradients_refuses(mistake):
    options, arguments, message = APPLY[mistake]
    train_op = make(**options)
    with pytest.raises(ValueError, match="apply_gradients") as caught:
        train_op.apply_gradients(train_op.init(PARAMS), **arguments)
    assert str(caught.value) == f"train_op.apply_gradients: {message}"


# Under transformations, on meshes, with every other option

ALL = {
    "value_and_grad": optloss.accumulate_gradients(2),
    "loss_scale": optloss.dynamic_loss_scale(8.0, growth_interval=2),
    "projection": functools.partial(jax.tree.map, lambda p: jnp.clip(p, -2, 2)),
    "moving_average": 0.9,
    "clip_gradients": 1.0,
}
HALF = {name: leaf.astype(np.float16) for name, leaf in PARAMS.items()}


@functools.cache
def expected_of_all():
    return run(make(**ALL))


@pytest.mark.wide
def test_under_scan_and_vmap():
    train_op = make(**ALL)

    def follow(params):
        def step(state, batch):
            return train_op.update(state, *batch)

        batches = np.stack([X] * 3), np.stack([Y] * 3)
        return jax.lax.scan(step, train_op.init(params), batches)[0]

    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    found = jax.jit(jax.vmap(follow))(two)
    close(jax.tree.map(lambda leaf: leaf[0], found), expected_of_all()[0], 1e-5, 1e-5)


def test_a_traced_start_is_the_start():
    train_op = make(**ALL)
    chex.assert_trees_all_equal(jax.jit(train_op.init)(PARAMS), train_op.init(PARAMS))


WIDE = {name: np.resize(leaf, (3, 8)[-leaf.ndim :]) for name, leaf in PARAMS.items()}


@functools.cache
def expected_of_wide():
    return run(make(**ALL), WIDE)[0]


@pytest.mark.wide
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_on_a_mesh(kind):
    rows = {"w": P(None, "data"), "v": P("data")}

    def gathered(params, x, y):
        return loss(jax.tree.map(lambda p: reshard(p, P()), params), x, y)

    mesh = line(kind)
    train_op = make(gathered if kind == EXPLICIT else loss, **ALL)
    with entered(mesh):
        state = train_op.init(put(WIDE, mesh, rows))
        for _ in range(3):
            state, _ = train_op(state, X, Y)
        averages = train_op.averaged(state)
        given, _ = train_op.apply_gradients(state, averages, loss=1.0)
    close(averages, make(**ALL).averaged(expected_of_wide()), 1e-5, 1e-5)
    close(given.average.step, 4)
    for tree in (averages, given.params, given.average.params):
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(
                NamedSharding(mesh, rows[name]), leaf.ndim
            )


@pytest.mark.wide
def test_under_shard_map():
    mesh, options = line(AUTO, 4), {**ALL, "axis_name": "data"}

    def local(params, x, y):
        return jax.lax.pmean(loss(params, x, y), "data")

    train_op = make(local, **options)
    state = train_op.init(PARAMS)
    step = jax.jit(
        jax.shard_map(
            lambda state, *batch: train_op.update(state, *batch)[0],
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
        )
    )
    for _ in range(3):
        state = step(state, X, Y)
    close(state, expected_of_all()[0], 1e-5, 1e-5)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("pack", "optimizer"),
    [(8, "adam"), (0, {"w": "sgd", "**": "adam"})],
    ids=["packed", "groups"],
)
def test_half_precision_packed_and_in_groups(pack, optimizer):
    seen = []

    def look(pairs):
        seen.extend(gradient.dtype.name for gradient, _ in pairs)
        return pairs

    options = {**ALL, "optimizer": optimizer, "variables": ["w", "v"]}
    train_op = make(**options, pack_small_leaves=pack)
    params = {**HALF, "frozen": jnp.ones(2)}
    state, output = run(train_op, params)
    assert {leaf.dtype.name for leaf in state.params.values()} == {"float16", "float32"}
    assert state.average.params["w"].dtype == jnp.float32
    assert output.loss.dtype == jnp.float32
    assert train_op.averaged(state)["w"].dtype == jnp.float16
    assert int(state.opt_state.total) == 0
    looking = make(**options | {"clip_gradients": look})
    jax.eval_shape(looking.update, looking.init(params), X, Y)
    assert set(seen) == {"float32"}
    if optimizer == "adam":
        trained = {name: np.float32(state.params[name]) for name in PARAMS}
        close(trained, expected_of_all()[0].params, 0.01, 0.01)


def test_donation_takes_the_states_buffers_and_no_others():
    train_op = make(**ALL)
    state = train_op.init(PARAMS)
    averages = train_op.averaged(state)
    following, _ = train_op(state, X, Y)
    assert state.average.params["w"].is_deleted()
    assert not averages["w"].is_deleted()
    again, _ = train_op.apply_gradients(following, following.params)
    assert following.params["w"].is_deleted()
    assert not again.params["w"].is_deleted()


def test_nnx_models_take_every_option():
    def squares(model, x, y):
        return jnp.mean((model(x)[:, 0] - y) ** 2)

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    step = nnx_integration.optimize_loss(
        model, squares, global_step=0, learning_rate=0.1, optimizer="adam", **ALL
    )
    for _ in range(3):
        output = step(X, Y)
    assert output.loss.shape == ()
    assert step.state.average.step == 3
    assert step.state.opt_state.inner.loss_scale.scale == 16
    averages = step.train_op.averaged(step.state)
    assert averages["kernel"].shape == (3, 1)
    saved = jax.tree.map(jnp.copy, step.state)
    step(X, Y)
    step.restore(saved)
    chex.assert_trees_all_equal(step.state.average, saved.average)


def test_the_pipeline_in_words():
    train_op = make(**ALL | {"projection": jax.nn.relu})
    assert repr(train_op) == (
        "OptimizeLoss: gradient by accumulate_gradients(2) at dynamic loss scale from "
        "8 -> clip_by_global_norm(1.0) -> optax.adam at 0.1 -> relu -> "
        "moving_average(0.9) -> step + 1 (skipped if not finite)"
    )

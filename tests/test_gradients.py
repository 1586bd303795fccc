"""Gradients slice by slice, and the checks of gradients from elsewhere."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optloss.gradients import accumulate_gradients, check_keywords, check_result
from optloss.per_example import clip_per_example

RANDOM = np.random.default_rng(0)
PARAMS = {
    "w": RANDOM.normal(size=(3, 5)).astype(np.float32),
    "v": RANDOM.normal(size=5).astype(np.float32),
    "frozen": optax.MaskedNode(),
}
X, Y = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((16, 3), (16,)))


def error(params, x, y):
    return (jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2


def objective(params, /, x, y, model_state=None):
    each = error(params, x, y)
    return each.mean(), (model_state, each)


def sliced(array, steps):
    """[n, ...] as [steps, n / steps, ...], the slices by NumPy's own strides."""
    return np.stack([np.asarray(array)[i::steps] for i in range(steps)])


def close(found, expected, rtol=1e-6, atol=1e-6):
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


def whole(objective=objective):
    return jax.value_and_grad(objective, has_aux=True)


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_slices_give_the_gradient_of_the_whole_batch(steps):
    (loss, (state, aux)), gradients = jax.jit(accumulate_gradients(steps)(objective))(
        PARAMS, X, y=Y
    )
    (expected_loss, (_, each)), expected = whole()(PARAMS, X, Y)
    close((loss, gradients), (expected_loss, expected))
    assert state is None
    close(aux, sliced(each, steps))


def test_a_state_goes_from_slice_to_slice():
    def normalised(w, x, model_state):
        state = {
            "mean": 0.9 * model_state["mean"] + 0.1 * x.mean(0),
            "seen": model_state["seen"] + 1,
        }
        return jnp.mean(w * (x - state["mean"])), (state, None)

    state = {"mean": jnp.zeros(3), "seen": jnp.array(5, jnp.int32)}
    w, one = jnp.ones(3), whole(normalised)
    gradient = 0
    (_, (found, _)), mean = accumulate_gradients(4)(normalised)(w, X, model_state=state)
    for part in sliced(X, 4):
        (_, (state, _)), slope = one(w, part, model_state=state)
        gradient += slope / 4
    close((found, mean), (state, gradient))
    assert found["seen"] == 9


def test_each_slice_gets_a_key_of_its_own():
    def drawn(w, x, key, keys, raw, model_state=None):
        return w * x.mean(), (None, (jax.random.key_data(key), keys, raw))

    key, keys = jax.random.key(1), jax.random.split(jax.random.key(2), 16)
    raw = jax.random.key_data(keys)
    (_, (_, (own, several, raws))), _ = accumulate_gradients(4)(drawn)(
        jnp.ones(()), X, key, keys, raw
    )
    np.testing.assert_array_equal(own, jax.random.key_data(jax.random.split(key, 4)))
    assert several.shape == (4, 4)
    np.testing.assert_array_equal(jax.random.key_data(several), sliced(raw, 4))
    np.testing.assert_array_equal(raws, sliced(raw, 4))


@pytest.mark.parametrize(
    "value_and_grad", [accumulate_gradients, clip_per_example], ids=["steps", "clip"]
)
def test_scalars_and_what_is_excepted_go_to_all(value_and_grad):
    seen = []

    def look(w, x, key, scale, name, nothing, *, rate, model_state=None):
        seen.append((scale, name, nothing))
        return (w * x["a"]).mean() * scale * rate, (None, (x, key))

    key, axes = jax.random.key(0), ({"a": 0, "b": None}, None, 0, 0, 0)
    differentiate = value_and_grad(16, in_axes=axes)(look)
    (_, (_, (x, same))), _ = differentiate(
        jnp.ones(()), {"a": X, "b": X[:5]}, key, 2, "name", None, rate=jnp.float32(3)
    )
    np.testing.assert_array_equal(x["a"], X[:, None])
    np.testing.assert_array_equal(x["b"], np.stack([X[:5]] * 16))
    assert (same == key).all()
    assert set(seen) == {(2, "name", None)}


@pytest.mark.parametrize("axis", [1, -1])
def test_the_examples_may_lie_along_another_axis(axis):
    def columns(params, /, x, y, model_state=None):
        return objective(params, x.T, y[0])

    (loss, (_, aux)), gradients = accumulate_gradients(4, in_axes=axis)(columns)(
        PARAMS, X.T, y=Y[None]
    )
    (expected_loss, (_, each)), expected = whole()(PARAMS, X, Y)
    close((loss, gradients, aux), (expected_loss, expected, sliced(each, 4)))


def test_a_tuple_of_axes_leaves_keywords_at_the_first():
    def columns(params, /, x, *, y, model_state=None):
        return objective(params, x.T, y)

    _, gradients = accumulate_gradients(4, in_axes=(1,))(columns)(PARAMS, X.T, y=Y)
    close(gradients, whole()(PARAMS, X, Y)[1])


def test_without_a_batch_each_slice_draws_its_own():
    def sampled(w, key, model_state=None):
        x = jax.random.normal(key, (8,))
        return jnp.mean(w * x), (None, x)

    (_, (_, x)), gradient = accumulate_gradients(3)(sampled)(
        jnp.ones(()), jax.random.key(0)
    )
    assert x.shape == (3, 8)
    close(gradient, x.mean())


DTYPES = ["float32", "float16", "bfloat16", "complex64"]


@pytest.mark.wide
@pytest.mark.parametrize(
    "value_and_grad", [accumulate_gradients(4), clip_per_example(np.inf)], ids=repr
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtypes_of_the_parameters(value_and_grad, dtype):
    params = {"w": jnp.ones(3, dtype), "v": jnp.ones((), jnp.float32)}

    def mixed(params, /, x, model_state=None):
        product = x.astype(dtype) @ params["w"]
        return (jnp.abs(product) * params["v"].astype(dtype).real).mean(), (None, None)

    (loss, _), gradients = jax.jit(value_and_grad(mixed))(params, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, params)
    (expected_loss, _), expected = jax.jit(whole(mixed))(params, X)
    assert loss.dtype == expected_loss.dtype
    close(gradients, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "value_and_grad", [accumulate_gradients(32), clip_per_example(np.inf)], ids=repr
)
def test_half_precision_is_summed_in_float32(value_and_grad):
    def constant(w, x, model_state=None):
        return (w * x.astype(w.dtype)).sum(), (None, None)

    # In float16, 2048 + 1 is 2048, and 32 slices of 60000 are infinite.
    for values in ([2048.0] + [1.0] * 31, [60000.0] * 32):
        x = np.array(values, np.float32)
        (loss, _), gradient = value_and_grad(constant)(jnp.ones((), jnp.float16), x)
        assert loss == gradient == np.float16(x.mean())


def test_float64_stays_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, PARAMS)
        args = np.float64(X), np.float64(Y)
        for make in (accumulate_gradients(4), clip_per_example(1e6)):
            _, gradients = jax.jit(make(objective))(params, *args)
            expected = jax.jit(whole())(params, *args)[1]
            close(gradients, expected, rtol=1e-12, atol=1e-13)


# Clipping by example


def clipped_loop(objective, max_norm, params, x, y):
    """The definition: one example after the other, each a batch of one."""
    one = jax.jit(whole(objective))
    total, losses, aux = jax.tree.map(np.zeros_like, params), [], []
    for i in range(len(x)):
        (loss, (_, each)), gradients = one(params, x[i : i + 1], y[i : i + 1])
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
        factor = min(1.0, max_norm / norm)
        share = jax.tree.map(functools.partial(np.multiply, factor / len(x)), gradients)
        total = jax.tree.map(np.add, total, share)
        losses.append(loss)
        aux.append(each)
    return np.mean(losses), total, np.stack(aux)


@pytest.mark.parametrize(
    ("max_norm", "batch"),
    [(1.0, None), (1.0, 1), (1.0, 4), (1.0, 16), (0.1, None), (np.inf, None)],
)
def test_clipping_equals_a_loop_over_examples(max_norm, batch):
    value_and_grad = clip_per_example(max_norm, batch=batch)
    (loss, (_, aux)), gradients = jax.jit(value_and_grad(objective))(PARAMS, X, Y)
    expected = clipped_loop(objective, max_norm, PARAMS, X, Y)
    close((loss, gradients, aux), expected)
    assert aux.shape == (16, 1)


@given(
    scale=st.sampled_from([0.0, 1e-30, 1e-10, 1.0, 1e10, 1e25]),
    max_norm=st.sampled_from([1e-6, 1.0, 1e6]),
)
@settings(deadline=None)
def test_the_mean_is_never_longer_than_the_bound(scale, max_norm):
    gradient = clipped_mean(max_norm, X * np.float32(scale))
    assert np.linalg.norm(np.float64(gradient)) <= max_norm * (1 + 1e-6)


@jax.jit
def clipped_mean(max_norm, rows):
    def linear(w, x, model_state=None):
        return jnp.sum(w * x), (None, None)

    return clip_per_example(max_norm)(linear)(jnp.ones(3), rows)[1]


def test_an_example_that_is_not_finite_is_not_hidden():
    for bad in (np.nan, np.inf):
        x = X.copy()
        x[3] = bad
        assert np.isnan(clipped_mean(1.0, x)).all()


@pytest.mark.parametrize("batch", [None, 4])
def test_each_example_gets_a_key_of_its_own(batch):
    def drawn(w, x, key, model_state=None):
        assert x.shape == (1, 3)
        return jnp.sum(w * x), (None, jax.random.key_data(key))

    key = jax.random.key(1)
    (_, (_, own)), _ = clip_per_example(1.0, batch=batch)(drawn)(jnp.ones(3), X, key)
    np.testing.assert_array_equal(own, jax.random.key_data(jax.random.split(key, 16)))


@pytest.mark.parametrize("batch", [None, 4])
def test_a_state_that_no_example_changes_is_adopted_once(batch):
    def counted(w, x, model_state):
        state = {"calls": model_state["calls"] + 1, "table": model_state["table"]}
        return jnp.sum(w * x), (state, None)

    state = {"calls": jnp.array(0), "table": jnp.ones(2)}
    (_, (new, _)), _ = jax.jit(clip_per_example(1.0, batch=batch)(counted))(
        jnp.ones(3), X, model_state=state
    )
    chex.assert_trees_all_equal(new, {"calls": jnp.array(1), "table": jnp.ones(2)})


def test_a_state_that_depends_on_the_example_is_refused():
    def normalised(w, x, model_state):
        return jnp.sum(w * x), ({"mean": x.mean(0)}, None)

    with pytest.raises(ValueError, match="depends on") as caught:
        clip_per_example(1.0)(normalised)(
            jnp.ones(3), X, model_state={"mean": jnp.zeros(3)}
        )
    assert str(caught.value) == (
        "clip_per_example: the new model_state depends on the example, as the "
        "statistics of a BatchNorm do. Use a layer without such, for example a "
        "GroupNorm, or return the model_state as it was."
    )


def test_an_error_of_the_loss_is_its_own():
    def broken(w, x, model_state=None):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        clip_per_example(1.0)(broken)(jnp.ones(3), X)


# Both of them, under transformations

BOTH = {
    "accumulate": accumulate_gradients(4),
    "clip": clip_per_example(0.5),
    "clip in batches": clip_per_example(0.5, batch=4),
}


@pytest.fixture(params=BOTH)
def differentiate(request):
    return BOTH[request.param](objective)


@pytest.mark.wide
def test_under_scan(differentiate):
    @jax.jit
    def step(params, batch):
        (loss, _), gradients = differentiate(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), loss

    batches = np.stack([X, 2 * X, -X]), np.stack([Y, Y, -Y])
    params, losses = jax.lax.scan(step, jax.tree.map(jnp.asarray, PARAMS), batches)
    expected = PARAMS
    for i in range(3):
        expected, loss = step(expected, (batches[0][i], batches[1][i]))
        close(losses[i], loss)
    close(params, expected)


@pytest.mark.wide
def test_under_vmap(differentiate):
    several = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), PARAMS)
    found = jax.jit(jax.vmap(differentiate, in_axes=(0, None, None)))(several, X, Y)
    alone = jax.jit(differentiate)
    one = alone(PARAMS, X, Y)
    two = alone(jax.tree.map(lambda leaf: 2 * leaf, PARAMS), X, Y)
    close(found, jax.tree.map(lambda *leaves: np.stack(leaves), one, two))


@pytest.mark.wide
def test_they_can_be_differentiated(differentiate):
    @jax.jit
    def after_one_step(rate, params):
        _, gradients = differentiate(params, X, Y)
        moved = jax.tree.map(lambda p, g: p - rate * g, params, gradients)
        return error(moved, X, Y).mean()

    slope = jax.grad(after_one_step)(0.1, PARAMS)
    small = 1e-2
    ends = [after_one_step(0.1 + side * small, PARAMS) for side in (1, -1)]
    close(slope, (ends[0] - ends[1]) / (2 * small), rtol=1e-2, atol=1e-3)


def test_a_zero_gradient_can_be_differentiated():
    def flat(w, x, model_state=None):
        return jnp.sum(0 * w * x), (None, None)

    @jax.jit
    @jax.grad
    def total(w):
        _, gradient = clip_per_example(1.0)(flat)(w, X)
        return jnp.sum(gradient)

    assert (total(jnp.ones(3)) == 0).all()


def test_a_traced_bound():
    @jax.jit
    def clipped(max_norm):
        return clip_per_example(max_norm)(objective)(PARAMS, X, Y)[1]

    expected = jax.jit(clip_per_example(0.1)(objective))(PARAMS, X, Y)[1]
    close(clipped(0.1), expected)


def test_their_texts():
    texts = [repr(value_and_grad) for value_and_grad in BOTH.values()]
    assert texts == [
        "accumulate_gradients(4)",
        "clip_per_example(0.5)",
        "clip_per_example(0.5)",
    ]


def test_activations_of_one_slice_at_a_time():
    def deep(params, /, x, model_state=None):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2), (None, None)

    params = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 16
    x = jax.ShapeDtypeStruct((4096, 64), jnp.float32)

    def temporaries(steps):
        program = jax.jit(accumulate_gradients(steps)(deep)).lower(params, x)
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) <= 0.35 * temporaries(1)


# Messages


MISTAKES = {
    "no steps": (
        lambda: accumulate_gradients(0),
        "accumulate_gradients(steps=0): must be an int >= 1, the number of slices.",
    ),
    "a bool": (
        lambda: accumulate_gradients(True),
        "accumulate_gradients(steps=True): must be an int >= 1, the number of slices.",
    ),
    "no axis": (
        lambda: accumulate_gradients(2, in_axes="x"),
        "accumulate_gradients(in_axes='x'): must be an int, None, or a tuple with one "
        "of these, or a tree of these, for each positional argument, as in jax.vmap.",
    ),
    "a float among the axes": (
        lambda: clip_per_example(1.0, in_axes=(0, {"x": 1.0})),
        "clip_per_example(in_axes=(0, {'x': 1.0})): must be an int, None, or a tuple "
        "with one of these, or a tree of these, for each positional argument, as in "
        "jax.vmap.",
    ),
    "too few axes": (
        lambda: accumulate_gradients(2, in_axes=(0,))(objective)(PARAMS, X, Y),
        "accumulate_gradients(in_axes=(0,)): does not fit the 2 positional arguments "
        "after params and model_state. Give an axis or None, or a tree of these, for "
        "each.",
    ),
    "an axis too many": (
        lambda: accumulate_gradients(2, in_axes=(0, 1))(objective)(PARAMS, X, Y),
        "accumulate_gradients: args[1] is float32[16], which has no axis 1. Change "
        "in_axes.",
    ),
    "two lengths": (
        lambda: accumulate_gradients(2)(objective)(PARAMS, {"a": X}, y=[Y[:6]]),
        "accumulate_gradients: the arrays to split differ in the number of examples, "
        "16 and 6: args[0]['a'] is float32[16,3] and kwargs['y'][0] is float32[6]. "
        "Give None in in_axes to what is no batch.",
    ),
    "no divisor": (
        lambda: accumulate_gradients(3)(objective)(PARAMS, X, Y),
        "accumulate_gradients(steps=3): does not divide the number of examples, 16: "
        "args[0] is float32[16,3]. Choose a divisor.",
    ),
    "a negative bound": (
        lambda: clip_per_example(-1.0),
        "clip_per_example(max_norm=-1.0): must be a real number > 0 or a 0-d array.",
    ),
    "an empty batch": (
        lambda: clip_per_example(1.0, batch=0),
        "clip_per_example(batch=0): must be an int >= 1, or None for all at once.",
    ),
    "a batch that does not divide": (
        lambda: clip_per_example(1.0, batch=5)(objective)(PARAMS, X, Y),
        "clip_per_example(batch=5): does not divide the number of examples, 16: "
        "args[0] is float32[16,3]. Choose a divisor.",
    ),
    "no examples": (
        lambda: clip_per_example(1.0, in_axes=None)(objective)(PARAMS, X, Y),
        "clip_per_example: no argument holds examples. Pass the batch to the step, and "
        "do not except it with in_axes.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert str(caught.value) == message


# What a function of the caller's own returned


def checked(result, params=PARAMS, model_state=None):
    return check_result(jax.value_and_grad, result, params, model_state)


def test_what_jax_and_equinox_return_fits():
    state = {"n": jnp.zeros(2)}
    for value_and_grad in (jax.value_and_grad, eqx.filter_value_and_grad):
        result = value_and_grad(objective, has_aux=True)(
            PARAMS, X, Y, model_state=state
        )
        chex.assert_trees_all_equal(checked(result, PARAMS, state), result)


def test_results_are_strongly_typed():
    gradients = jax.tree.map(jnp.zeros_like, PARAMS)
    weak = jnp.asarray(1.0)
    assert weak.weak_type
    (loss, _), found = checked(((weak, (None, None)), {**gradients, "v": PARAMS["v"]}))
    assert not loss.weak_type
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


LOSS = np.ones((), np.float32)
GRADIENTS = {"w": PARAMS["w"], "v": PARAMS["v"], "frozen": optax.MaskedNode()}
MISFITS = {
    "no pair": (
        (LOSS, GRADIENTS),
        "returned (float32[], {'w': float32[3,5], 'v': float32[5], 'frozen'..., "
        "not ((loss, (model_state, aux)), gradients), as jax.value_and_grad does of an "
        "objective with aux.",
    ),
    "no scalar": (
        ((X, (None, None)), GRADIENTS),
        "returned the loss float32[16,3], which is no real scalar.",
    ),
    "a complex loss": (
        ((np.complex64(1), (None, None)), GRADIENTS),
        "returned the loss np.complex64(1+0j), which is no real scalar.",
    ),
    "a missing gradient": (
        ((LOSS, (None, None)), {"w": GRADIENTS["w"], "frozen": optax.MaskedNode()}),
        "returned no gradient for 'v'.",
    ),
    "one too many": (
        ((LOSS, (None, None)), {**GRADIENTS, "frozen": X}),
        "returned gradients for 'frozen', which are not trained.",
    ),
    "another container": (
        ((LOSS, (None, None)), {**GRADIENTS, "frozen": None}),
        "returned gradients in PyTreeDef({'frozen': None, 'v': *, 'w': *}), not "
        "PyTreeDef({'frozen': CustomNode(namedtuple[MaskedNode], []), 'v': *, 'w': "
        "*}).",
    ),
    "another shape": (
        ((LOSS, (None, None)), {**GRADIENTS, "v": X}),
        "returned float32[16,3] as the gradient of 'v', which is float32[5]. Keep "
        "shapes and dtypes.",
    ),
    "another dtype": (
        ((LOSS, (None, None)), {**GRADIENTS, "v": np.zeros(5, np.float16)}),
        "returned float16[5] as the gradient of 'v', which is float32[5]. Keep shapes "
        "and dtypes.",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit(misfit):
    result, message = MISFITS[misfit]
    with pytest.raises(ValueError, match=r".") as caught:
        checked(result)
    assert str(caught.value) == (
        f"optimize_loss(value_and_grad=value_and_grad): {message}"
    )


def test_another_model_state_does_not_fit():
    with pytest.raises(ValueError, match=r".") as caught:
        checked(((LOSS, ({"n": X}, None)), GRADIENTS), PARAMS, {"n": Y})
    assert str(caught.value) == (
        "optimize_loss: value_and_grad returned float32[16,3] for model_state['n'], "
        "which is float32[16]. Keep shapes and dtypes, for example with .astype(...)."
    )


def own_keyword(params, x, *, model_state=None):
    return x


def by_position(params, model_state, x):
    return x


def test_a_keyword_that_the_objective_has():
    message = (
        "optimize_loss(loss={}): has a keyword argument of its own named model_state. "
        "Rename it, or pass it by position."
    )
    for loss, keywords in ((own_keyword, ()), (by_position, ("x", "model_state"))):
        with pytest.raises(ValueError, match=r".") as caught:
            check_keywords(loss, keywords)
        assert str(caught.value) == message.format(loss.__name__)
    check_keywords(by_position)
    check_keywords(functools.partial(by_position, x=1), ["y"])
    check_keywords(max)

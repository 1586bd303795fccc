"""Clipping by the global norm and by a function: against NumPy, and at the edges."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optloss import clip_by_function, clip_by_global_norm, get_summaries, global_norm


def clip(grads, max_norm=1.0):
    """Return what one update of a fresh clip makes of ``grads``, and its state."""
    transform = clip_by_global_norm(max_norm)
    return jax.jit(transform.update)(grads, transform.init(grads))


def raw(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def floats(*patterns):
    """Return the float32 numbers with these bits."""
    return np.array(patterns, np.uint32).view(np.float32)


QUIET, SIGNALLING, NEGATIVE_NAN = 0x7FC00000, 0x7F800001, 0xFFC12345
TINY = 1  # the smallest subnormal
UNTOUCHED = {
    "inside": np.float32([0.3, -0.4]),
    "on the edge": np.float32([0.6, -0.8]),
    "negative zero": np.float32([-0.0, 0.5]),
    "zero": np.zeros(3, np.float32),
    "subnormal": floats(TINY, TINY | 1 << 31),
    "subnormal half": np.float16([6e-8, 0.5]),
    "infinite": np.float32([np.inf, 5.0, -0.0]),
    "not a number": floats(QUIET, SIGNALLING, NEGATIVE_NAN, TINY),
    "infinite complex": np.complex64([complex(np.inf, -2), complex(3, -0.0)]),
    "half infinite": np.float16([np.inf, 1]),
    "bfloat16 infinite": jnp.array([-jnp.inf, 9], jnp.bfloat16),
    "complex inside": np.complex64([complex(-0.0, -0.1), complex(0.1, -0.0)]),
    "complex not a number": np.complex64([complex(np.nan, 2), complex(-0.0, 5)]),
    "too large to measure": np.full(4, 3e38, np.float32),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_inside_the_ball_and_beyond_measure_every_bit_is_kept(case):
    grads = jnp.asarray(UNTOUCHED[case])
    clipped, state = clip(grads)
    assert raw(clipped) == raw(grads)
    assert clipped.dtype == grads.dtype
    assert (state.clipped, state.factor) == (0, 1)


@pytest.mark.wide
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e37])
@pytest.mark.parametrize("share", [0.5, 0.999, 1e-6])
def test_outside_all_leaves_shrink_alike(scale, share):
    random = np.random.default_rng(0)
    grads = {
        name: random.normal(size=shape)
        for name, shape in {"a": (4, 5), "b": ()}.items()
    }
    grads = jax.tree.map(lambda g: jnp.float32(g * scale), grads)
    exact = np.sqrt(sum((np.float64(g) ** 2).sum() for g in grads.values()))
    bound = np.float32(exact * share)
    clipped, state = clip(grads, bound)
    for name, leaf in clipped.items():
        expected = np.float64(grads[name]) * (bound / exact)
        np.testing.assert_allclose(leaf, expected, rtol=1e-6)
    assert global_norm(clipped) <= bound * (1 + 1e-6)
    np.testing.assert_allclose(state.norm, exact, rtol=1e-6)
    assert state.clipped == 1


def test_half_precision_is_clipped_by_its_true_norm():
    wide, _ = clip([jnp.full(100, 100.0)] * 2, 1.0)
    for dtype in (jnp.float16, jnp.bfloat16):
        narrow, state = clip([jnp.full(100, 100, dtype)] * 2, 1.0)
        np.testing.assert_allclose(state.norm, np.sqrt(2e6), rtol=1e-6)
        assert raw(narrow) == raw([leaf.astype(dtype) for leaf in wide])


def test_complex_leaves_keep_their_angle():
    clipped, _ = clip(jnp.array([6 + 8j, 0j]), 5.0)
    np.testing.assert_allclose(clipped, [3 + 4j, 0], rtol=1e-6)


def test_a_bound_of_zero_gives_zeros():
    clipped, state = clip(jnp.array([3.0, -4.0]), 0)
    assert not clipped.any()
    assert (state.norm, state.factor) == (5, 0)


def test_an_infinite_bound_only_measures():
    grads = jnp.array([3e30, -4e30])
    clipped, state = clip(grads, float("inf"))
    assert raw(clipped) == raw(grads)
    assert (state.norm, state.clipped) == (global_norm(grads), 0)


@pytest.mark.parametrize(
    ("bound", "expected"),
    [(0.5, [0.3, -0.4]), (np.inf, [3, -4]), (np.nan, [3, -4]), (-1.0, [0, 0])],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bound_may_be_traced(bound, expected, dtype):
    @jax.jit
    def run(grads, bound):
        transform = clip_by_global_norm(bound)
        return transform.update(grads, transform.init(grads))[0]

    clipped = run(jnp.array([3, -4], dtype), jnp.float32(bound))
    assert clipped.dtype == dtype
    np.testing.assert_allclose(np.float32(clipped), expected, rtol=4e-3)


def test_it_agrees_with_optax_where_that_is_right():
    grads = {"w": jnp.linspace(-2, 3, 12).reshape(3, 4), "b": jnp.array(0.5)}
    theirs, _ = optax.clip_by_global_norm(1.5).update(grads, optax.EmptyState())
    ours, _ = clip(grads, 1.5)
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_what_it_measured_is_published():
    transform = clip_by_global_norm(2.0)
    state = transform.init(jnp.zeros(2))
    assert {k: float(v) for k, v in get_summaries(state).items()} == {
        "global_norm/gradient_norm": 0,
        "global_norm/clipped_gradient_norm": 0,
        "clip_factor": 1,
        "clipped_share": 0,
    }
    for grads in ([0.0, 1.0], [6.0, 8.0], [0.0, 0.0], [0.0, 8.0]):
        _, state = transform.update(jnp.array(grads), state)
    assert {k: float(v) for k, v in get_summaries(state).items()} == {
        "global_norm/gradient_norm": 8,
        "global_norm/clipped_gradient_norm": 2,
        "clip_factor": 0.25,
        "clipped_share": 0.5,
    }


@pytest.mark.parametrize(
    ("max_norm", "shown"),
    [
        (-1.0, "-1.0"),
        (float("nan"), "nan"),
        (True, "True"),
        ("1", "'1'"),
        (None, "None"),
        (jnp.ones(2), "float32[2]"),
        (jnp.array(True), "bool[]"),
        (1j, "1j"),
    ],
)
def test_a_bound_that_is_none_is_refused(max_norm, shown):
    message = (
        f"clip_by_global_norm(max_norm={shown}): must be a real number >= 0 or a 0-d "
        "array. Use inf to measure the norm alone."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        clip_by_global_norm(max_norm)


PARAMS = {
    "a": jnp.array([1.0, 2.0]),
    "b": None,
    "c": jnp.arange(3),
    "d": jnp.ones((), jnp.bfloat16),
    "e": optax.MaskedNode(),
}


def by_function(fn, grads=PARAMS, params=PARAMS):
    transform = clip_by_function(fn)
    return transform.update(grads, transform.init(params), params)


def test_a_function_is_given_the_pairs_and_its_gradients_are_taken():
    seen = []

    def fn(pairs):
        seen.extend(pairs)
        return [(g.astype(jnp.float32) * 2 + v, "ignored") for g, v in pairs]

    grads = PARAMS | {"a": jnp.array([3.0, 4.0])}
    clipped, state = by_function(fn, grads)
    assert [(g.tolist(), v.tolist()) for g, v in seen] == [([3, 4], [1, 2]), (1, 1)]
    assert clipped["a"].tolist() == [7, 10]
    assert (clipped["d"], clipped["d"].dtype) == (3, jnp.bfloat16)
    assert (clipped["b"], clipped["e"]) == (None, optax.MaskedNode())
    assert clipped["c"] is grads["c"]
    assert state == optax.EmptyState()


@pytest.mark.parametrize(
    "fn",
    [
        lambda pairs: tuple([g * 3, v] for g, v in pairs),
        lambda pairs: zip(
            [g * 3 for g, _ in pairs], [v for _, v in pairs], strict=True
        ),
        lambda pairs: ((g * 3, v) for g, v in pairs),
    ],
    ids=["tuple", "zip", "generator"],
)
def test_pairs_may_come_back_in_any_iterable(fn):
    clipped, _ = by_function(fn)
    assert clipped["a"].tolist() == [3, 6]


def shorter(pairs):
    return pairs[:1]


def sums(pairs):
    return [(g.sum(), v) for g, v in pairs]


def numbers(pairs):
    return [(g.astype(int), v) for g, v in pairs]


def lists(pairs):
    return [(g.tolist(), v) for g, v in pairs]


def bare(pairs):
    return [g for g, _ in pairs]


def nothing(pairs):
    del pairs


@pytest.mark.parametrize(
    ("fn", "problem"),
    [
        (shorter, "was given 2 pairs and returned 1. Return one for each."),
        (sums, "returned float32[] for a gradient float32[2]. Keep the shape."),
        (numbers, "returned int32[2] for a gradient float32[2]. Keep the shape."),
        (lists, "returned [1.0, 2.0] for a gradient float32[2]. Keep the shape."),
        (bare, "must return a list of (gradient, variable)."),
        (nothing, "must return a list of (gradient, variable)."),
    ],
)
def test_a_result_that_does_not_fit_is_refused(fn, problem):
    message = f"clip_by_function(fn={fn.__name__}): {problem}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        by_function(fn)


def test_a_function_needs_params():
    message = (
        "clip_by_function: the function is given (gradient, variable) pairs, so "
        "update(updates, state, params) needs params."
    )
    transform = clip_by_function(shorter)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        transform.update(PARAMS, transform.init(PARAMS))


def test_what_is_no_function_is_refused():
    message = "clip_by_function(fn=1.0): must be a function of a list of pairs."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        clip_by_function(1.0)

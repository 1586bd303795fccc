"""What must hold for any numbers, any order of leaves, and any text."""

import builtins
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import optloss
from optloss.optimizers.registry import get_factory

several = settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
SHAPES = {"a": (2, 3), "b": (5,), "c": ()}
LARGEST = float(np.finfo(np.float32).max)

magnitudes = st.floats(2.0**-60, 2.0**60, width=32)
numbers = st.one_of(
    st.floats(-LARGEST, LARGEST, width=32, allow_subnormal=False),
    st.floats(-10, 10, width=32, allow_subnormal=False),
)


def trees(elements):
    """Trees of one structure, so that everything is compiled once."""
    leaves = {
        name: st.lists(elements, min_size=size, max_size=size).map(
            lambda values, shape=shape: np.float32(values).reshape(shape)
        )
        for name, shape in SHAPES.items()
        for size in [int(np.prod(shape))]
    }
    return st.fixed_dictionaries(leaves)


def patterns():
    """Trees of any bits at all: NaN of every kind, subnormals, negative zeros."""
    words = st.integers(0, 2**32 - 1)
    return trees(words.map(lambda word: np.uint32(word).view(np.float32)))


def bits(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in tree.items()}


def exact_norm(tree):
    return np.sqrt(sum((np.float64(leaf) ** 2).sum() for leaf in tree.values()))


norm_of = jax.jit(optloss.global_norm)


@jax.jit
def clip(grads, bound):
    transform = optloss.clip_by_global_norm(bound)
    return transform.update(grads, transform.init(grads))[0]


@functools.cache
def update(build):
    transform = build()
    return jax.jit(lambda grads: transform.update(grads, transform.init(grads))[0])


@several
@given(trees(numbers))
def test_the_norm_is_that_of_float64(tree):
    exact = exact_norm(tree)
    if exact > LARGEST * (1 - 1e-6):
        return
    np.testing.assert_allclose(norm_of(tree), exact, rtol=1e-6, atol=1e-37)


@several
@given(trees(numbers), st.floats(0, LARGEST, width=32, allow_subnormal=False))
def test_a_clipped_norm_never_exceeds_its_bound(tree, bound):
    if exact_norm(tree) > LARGEST:
        return
    clipped = clip(tree, np.float32(bound))
    assert exact_norm(clipped) <= bound * (1 + 1e-6)


@several
@given(
    trees(st.floats(-8, 8, width=32, allow_subnormal=False)),
    magnitudes,
    st.integers(-40, 40),
)
def test_scaling_gradient_and_bound_scales_the_result(tree, bound, exponent):
    """By a power of two, to the last bit."""
    by = np.float32(2.0**exponent)
    small = {
        name: np.where(np.abs(leaf) < 1e-3, 0, leaf) for name, leaf in tree.items()
    }
    scaled = clip({name: leaf * by for name, leaf in small.items()}, bound * by)
    expected = {
        name: leaf * by for name, leaf in clip(small, np.float32(bound)).items()
    }
    for name, leaf in scaled.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-6, atol=1e-37)


@several
@given(trees(numbers), st.permutations(sorted(SHAPES)), st.randoms())
def test_the_order_of_leaves_and_elements_does_not_matter(tree, order, random):
    flat = np.concatenate([np.ravel(tree[name]) for name in order])
    random.shuffle(flat)
    ends = np.cumsum([leaf.size for leaf in tree.values()])[:-1]
    parts = np.split(flat, ends)
    shuffled = {
        name: part.reshape(shape)
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }
    np.testing.assert_allclose(norm_of(shuffled), norm_of(tree), rtol=1e-6)


IDENTITIES = {
    "clip at infinity": lambda: optloss.clip_by_global_norm(float("inf")),
    "multiplier of one": lambda: optloss.multiply_gradients({"**": 1.0}),
    "traced multiplier of one": lambda: optloss.multiply_gradients(
        {"**": jnp.float32(1)}
    ),
    "noise of zero": lambda: optloss.add_gradient_noise(0.0),
    "adaptive clip at first": lambda: optloss.adaptive_clipping(statistics="previous"),
}


@pytest.mark.parametrize("name", IDENTITIES)
@several
@given(patterns())
def test_what_does_nothing_keeps_every_bit(name, tree):
    assert bits(update(IDENTITIES[name])(tree)) == bits(tree)


@several
@given(trees(numbers), trees(numbers))
def test_a_clip_never_turns_a_gradient(tree, other):
    del other
    clipped = clip(tree, np.float32(1))
    for name, leaf in clipped.items():
        assert (np.abs(leaf) <= np.abs(tree[name])).all()
        assert (np.asarray(leaf) * tree[name] >= 0).all()


rates = st.floats(1e-6, 1e3, width=32)
steps = st.integers(0, 10**6)
spans = st.integers(1, 10**5)
parts = st.floats(0.01, 0.99, width=32)
DECAYS = {
    "exponential": (
        lambda r, t, n, p: optloss.exponential_decay(r, t, n, p),
        lambda r, p: (0, r),
    ),
    "staircase": (
        lambda r, t, n, p: optloss.exponential_decay(r, t, n, p, staircase=True),
        lambda r, p: (0, r),
    ),
    "natural": (
        lambda r, t, n, p: optloss.natural_exp_decay(r, t, n, p),
        lambda r, p: (0, r),
    ),
    "inverse": (
        lambda r, t, n, p: optloss.inverse_time_decay(r, t, n, p),
        lambda r, p: (0, r),
    ),
    "polynomial": (
        lambda r, t, n, p: optloss.polynomial_decay(r, t, n, r * p, 2.0),
        lambda r, p: (r * p, r),
    ),
    "polynomial cycle": (
        lambda r, t, n, p: optloss.polynomial_decay(r, t, n, r * p, cycle=True),
        lambda r, p: (r * p, r),
    ),
    "cosine": (
        lambda r, t, n, p: optloss.cosine_decay(r, t, n, p),
        lambda r, p: (r * p, r),
    ),
    "restarts": (
        lambda r, t, n, p: optloss.cosine_decay_restarts(r, t, n, alpha=p),
        lambda r, p: (r * p, r),
    ),
    "linear cosine": (
        lambda r, t, n, p: optloss.linear_cosine_decay(r, t, n, beta=p),
        lambda r, p: (r * p, r * (1 + p)),
    ),
    "piecewise": (
        lambda r, t, n, p: optloss.piecewise_constant(
            t, [n, 2 * n], [r, r * p, r * p * p]
        ),
        lambda r, p: (r * p * p, r),
    ),
}


@pytest.mark.parametrize("name", DECAYS)
@several
@given(rates, steps, spans, parts)
def test_a_decay_stays_between_its_ends(name, rate, step, span, part):
    decay, ends = DECAYS[name]
    low, high = ends(rate, part)
    value = float(decay(np.float32(rate), step, span, np.float32(part)))
    assert low * (1 - 1e-5) - 1e-30 <= value <= high * (1 + 1e-5)


names = st.sampled_from(["adam", "adamw", "Adam", "sgd", "adm", "os.system", "boom"])
values = st.one_of(
    st.sampled_from(
        [
            "boom()",
            "0.9",
            "(boom())",
            "[boom() for _ in [1]]",
            "{boom(): 1}",
            "f'{boom()}'",
        ]
    ),
    st.text(max_size=12),
    st.integers().map(repr),
    st.floats().map(repr),
)
pieces = st.tuples(st.sampled_from(["b1", "weight_decay", "**", "*", "boom"]), values)
specs = st.builds(
    lambda name, keywords, end: name + "(" + ",".join(map("=".join, keywords)) + end,
    names,
    st.lists(pieces, max_size=3),
    st.sampled_from([")", "", "))", ")()", ").update", ") or boom()", "\n)"]),
)


@several
@given(st.one_of(st.text(), names, specs))
def test_any_text_gives_a_factory_or_a_refusal_and_runs_nothing(text):
    ran = []
    builtins.boom = lambda *_: ran.append(text)
    try:
        factory = get_factory("optimize_loss", text)
    except ValueError as error:
        assert str(error).startswith("optimize_loss(optimizer=")
    else:
        assert callable(factory)
    finally:
        del builtins.boom
    assert not ran

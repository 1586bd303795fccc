"""The global norm, against NumPy in float64 and beyond the reach of a plain sum."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optloss import global_norm

LARGEST, SMALLEST = 3.4028235e38, 1.1754944e-38  # normal float32 numbers


def exact(tree):
    squares = [
        np.sum(np.abs(np.asarray(leaf, np.complex128)) ** 2)
        for leaf in jax.tree.leaves(tree)
    ]
    return np.sqrt(sum(squares))


@pytest.mark.parametrize(
    ("tree", "norm"),
    [
        (jnp.full(4, 300, jnp.float16), 600),
        (jnp.full(4, 1e20), 2e20),
        (jnp.full(4, 1e-30), 2e-30),
        (jnp.full(4, 1e38), 2e38),
        (jnp.full(4, 2e-38), 4e-38),
        (jnp.array([LARGEST]), LARGEST),
        (jnp.array([-SMALLEST]), SMALLEST),
        ([jnp.array([1e30]), jnp.array([1e-30])], 1e30),
        (jnp.array([3 + 4j]), 5),
        (jnp.array([3e30 + 4e30j]), 5e30),
        (jnp.array(-2.0), 2),
        (jnp.zeros(4), 0),
        (jnp.array([-0.0]), 0),
    ],
    ids=lambda value: f"{value:g}" if isinstance(value, float) else None,
)
def test_it_is_right_at_every_magnitude(tree, norm):
    for measure in (global_norm, jax.jit(global_norm)):
        found = measure(tree)
        assert found.dtype == jnp.float32
        assert found.shape == ()
        np.testing.assert_allclose(found, norm, rtol=1e-6)


def test_a_thousand_leaves_are_summed_in_float32():
    with jax.disable_jit():  # which is quicker than to compile it
        norm = global_norm([jnp.ones(4, jnp.bfloat16)] * 1000)
    np.testing.assert_allclose(norm, 63.245553, rtol=1e-6)


def test_a_norm_beyond_float32_is_infinite():
    assert global_norm(jnp.full(4, LARGEST)) == jnp.inf


@pytest.mark.parametrize(
    ("values", "norm"),
    [
        ([jnp.inf, 1], jnp.inf),
        ([-jnp.inf], jnp.inf),
        ([jnp.nan, 1], jnp.nan),
        ([jnp.nan, jnp.inf], jnp.nan),
    ],
)
def test_what_is_not_finite_shows(values, norm):
    np.testing.assert_equal(np.asarray(global_norm(jnp.array(values))), norm)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, jnp.bfloat16, np.float16])
def test_it_agrees_with_float64(dtype):
    random = np.random.default_rng(0)
    tree = [
        jnp.asarray(
            random.normal(size=shape) + 1j * random.normal(size=shape)
        ).real.astype(dtype)
        for shape in ((300, 400), (7,), ())
    ]
    np.testing.assert_allclose(global_norm(tree), exact(tree), rtol=1e-6)


def test_many_equal_numbers_do_not_stall_the_sum():
    # One by one, a float32 sum of ones would stop at 2**24.
    assert global_norm(jnp.ones(2**25, jnp.bfloat16)) == np.float32(np.sqrt(2**25))


def test_float64_is_measured_in_float64():
    with jax.enable_x64(True):
        tree = [jnp.full(4, 1e200), jnp.ones(3, jnp.float32)]
        assert global_norm(tree).dtype == jnp.float64
        np.testing.assert_allclose(global_norm(tree), 2e200, rtol=1e-15)
        np.testing.assert_allclose(global_norm(jnp.full(4, 1e-300)), 2e-300, rtol=1e-15)
        np.testing.assert_allclose(global_norm(jnp.array([1e200j])), 1e200, rtol=1e-15)
        assert global_norm(jnp.ones(3, jnp.float32)).dtype == jnp.float32
        assert global_norm(jnp.ones(3, jnp.complex64)).dtype == jnp.float32


def test_only_floating_and_complex_leaves_count():
    tree = {
        "counted": jnp.array([3.0, 4.0]),
        "table": jnp.array([1000]),
        "flags": jnp.array([True]),
        "nothing": None,
        "masked": optax.MaskedNode(),
        "float0": np.zeros(3, jax.dtypes.float0),
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 3)),
    }
    assert global_norm(tree) == 5
    assert global_norm({"table": tree["table"]}) == 0
    assert global_norm({}) == 0
    assert global_norm(jnp.zeros(0)).dtype == jnp.float32


def test_vmap_measures_each_apart():
    rows = jnp.array([[1e30, 1e30], [3, 4], [0, 0], [1e-30, 0], [jnp.inf, 1]])
    expected = [np.sqrt(2) * 1e30, 5, 0, 1e-30, np.inf]
    np.testing.assert_allclose(jax.vmap(global_norm)(rows), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 4e-38, 1e-20, 1e20, 5e37])
def test_its_gradient_is_the_direction(scale):
    slope = jax.jit(jax.grad(global_norm))(jnp.array([3, -4], jnp.float32) * scale)
    np.testing.assert_allclose(slope, [0.6, -0.8], rtol=1e-6)


def test_its_gradient_at_zero_is_zero():
    assert (jax.grad(global_norm)(jnp.zeros(4)) == 0).all()


def formula(z):
    return jnp.sqrt(jnp.sum(jnp.abs(z) ** 2))


def test_its_derivatives_are_those_of_the_formula():
    @jax.jit
    def derivatives(z, x):
        return [
            (jax.grad(norm)(z), jax.grad(norm)(x), jax.hessian(norm)(x))
            for norm in (global_norm, formula)
        ]

    found, expected = derivatives(
        jnp.array([3 + 4j, -1j, 2]), jnp.array([1.0, -2.0, 0.5])
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def lowered_for(platform, fn, *args):
    traced = jax.jit(fn).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "reductions"), [("cuda", 1), ("rocm", 1), ("tpu", 3)]
)
def test_on_an_accelerator_three_sums_and_no_branch(platform, reductions):
    text = lowered_for(platform, global_norm, jnp.ones(3))
    assert text.count("stablehlo.reduce(") == reductions
    assert not re.search(r"stablehlo\.(while|if)", text)
    # These two are known: the number of the platform and what it chooses.
    assert text.count("stablehlo.case") == 2


def test_on_a_cpu_one_sum_and_the_others_in_a_branch():
    text = lowered_for("cpu", global_norm, jnp.ones(3))
    assert text.count("stablehlo.reduce(") == 2
    assert text.count("stablehlo.case") == 3
    assert "stablehlo.while" not in text

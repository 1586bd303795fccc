"""Slices of one array equal plain ones, and each is a small kernel like the others."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import computations
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from optloss.fast.slices import slices

STARTS, SIZES = [0, 7, 300, 20], [7, 1, 45, 0]
DTYPES = ("float32", "bfloat16", "float16", "complex64", "uint32", "int8")


def plain(array):
    return [array[a : a + n] for a, n in zip(STARTS, SIZES, strict=True)]


def example(dtype="float32", shape=(345,)):
    return jnp.asarray(100 * np.random.default_rng(0).normal(size=shape)).astype(dtype)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, -1, np.nan])
def test_they_are_what_plain_slices_are(dtype, first):
    array = example(dtype)
    if np.isfinite(first) or jnp.issubdtype(dtype, jnp.inexact):
        array = array.at[0].set(jnp.asarray(first).astype(dtype))
    for run in (slices, jax.jit(slices, static_argnums=(1, 2))):
        assert_same(run(array, tuple(STARTS), tuple(SIZES)), plain(array))


def test_rows_and_double_precision():
    with jax.enable_x64(True):
        rows = example("float64", (345, 3))
        jitted = jax.jit(lambda x: slices(x, STARTS, SIZES))
        assert_same(jitted(rows), plain(rows))


def test_of_nothing_there_is_nothing():
    empty = jax.jit(lambda x: slices(x, [0], [0]))(jnp.zeros((0, 3)))
    assert empty[0].shape == (0, 3)


@pytest.mark.parametrize("differentiate", [jax.jacfwd, jax.jacrev])
def test_they_can_be_differentiated(differentiate):
    def square(cut):
        return lambda x: jnp.concatenate([piece**2 for piece in cut(x)])

    array = example()
    found = jax.jit(differentiate(square(lambda x: slices(x, STARTS, SIZES))))(array)
    np.testing.assert_array_equal(found, differentiate(square(plain))(array))


def test_under_vmap_each_has_its_own():
    many = example(shape=(3, 345))
    found = jax.jit(jax.vmap(lambda x: slices(x, STARTS, SIZES)))(many)
    assert_same(found, jax.vmap(plain)(many))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(), P("i")])
def test_on_a_mesh(axis_type, spec):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(axis_type,))

    def step(x):
        return slices(x, STARTS, SIZES)

    array = jax.device_put(example(), jax.NamedSharding(mesh, P()))
    assert_same(jax.jit(step)(array), plain(np.asarray(array)))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)
    many = example(shape=(8 * 345,)) if spec else example()
    many = jax.device_put(many, jax.NamedSharding(mesh, spec))
    blocks = np.asarray(many).reshape(-1, 345)
    expected = [np.concatenate(each) for each in zip(*map(plain, blocks), strict=True)]
    assert_same(jax.jit(mapped)(many), expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks at XLA's CPU code")
def test_each_is_a_small_kernel_like_the_others():
    size, count = 2500, 40

    def step(x, factor, leaves):
        starts = [size * i for i in range(count)]
        quotient = (factor * (1 / x)).reshape(-1)
        pieces = slices(quotient, starts, [size] * count)
        return [leaf + piece for leaf, piece in zip(leaves, pieces, strict=True)]

    matrix, leaves = jnp.zeros((400, size)), [jnp.ones(size)] * count
    compiled = jax.jit(step).lower(matrix, 2.0, leaves).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4.1e6  # the quotient
    text = compiled.as_text()
    adding = r"= f32\[2500\]\{0\} fusion\(.*calls=%([^\s,}]+)(.*)"
    kernels = re.findall(adding, text)
    assert len(kernels) == count
    assert not [rest for _, rest in kernels if "outer_dimension_partitions" in rest]
    bodies = [computations(text)[name].split("\n", 1)[1] for name, _ in kernels]
    unnamed = [re.sub(r"%[\w.-]+|, metadata=.*", "", body) for body in bodies]
    assert len(set(unnamed)) == 1
    assert "multiply" not in unnamed[0]

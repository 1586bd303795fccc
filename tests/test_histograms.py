import copy
import functools
import pickle

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from histogram_oracle import assert_equal, oracle, tensorflow_limits
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optloss.fast.handover import Stacked
from optloss.histograms import Histogram, bucket_limits, histogram

LARGEST = np.finfo(np.float32).max


def of_all_magnitudes(dtype, size=20_000, seed=0):
    """Finite values with random bits: as many at 1e-30 as at 1e30."""
    words = np.random.default_rng(seed).integers(0, 256, size * dtype.itemsize)
    values = words.astype(np.uint8).view(dtype)
    return values[np.isfinite(values)]


def at_the_limits(dtype):
    limits = tensorflow_limits(dtype)
    up = np.nextafter(limits[:-1], limits.dtype.type(np.inf))
    down = np.nextafter(limits[1:], limits.dtype.type(-np.inf))
    tiny = np.finfo(dtype).smallest_subnormal
    return np.concatenate([limits, up, down, [0.0, -0.0, tiny, -tiny]]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_limits_are_tensorflows(dtype):
    limits = bucket_limits(dtype)
    np.testing.assert_array_equal(limits, tensorflow_limits(dtype))
    assert limits.dtype == dtype
    assert len(limits) == 1551
    assert np.all(np.diff(limits) > 0)
    assert limits[-1] == np.finfo(dtype).max


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("values", [at_the_limits, of_all_magnitudes])
def test_every_value_is_in_its_bucket(values, jit):
    values = values(np.dtype(np.float32))
    counts = (jax.jit(histogram) if jit else histogram)(values).bucket_counts
    np.testing.assert_array_equal(counts, oracle(values).bucket_counts)
    assert counts.sum() == values.size


@pytest.mark.parametrize("values", [at_the_limits, of_all_magnitudes])
def test_every_float64_is_in_its_bucket(values):
    values = values(np.dtype(np.float64))
    with jax.enable_x64(True):
        found = histogram(jnp.asarray(values))
        structure = [(leaf.dtype, leaf.shape) for leaf in found]
        counts = np.asarray(found.bucket_counts)
    np.testing.assert_array_equal(counts, oracle(values, np.float64).bucket_counts)
    expected = [(np.float64, ())] * 5 + [(np.float64, (1551,)), (np.int32, (1551,))]
    expected[2:2], expected[5] = [(np.int32, ())], (np.int32, ())
    assert structure == expected


@pytest.mark.wide
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (jnp.float32, ()),
        (jnp.float32, (1000,)),
        (jnp.float32, (3, 1, 50)),
        (jnp.bfloat16, (30, 40)),
        (jnp.float16, (30, 40)),
    ],
)
def test_it_equals_numpy(dtype, shape):
    values = np.random.default_rng(1).normal(0.01, 0.1, shape)
    values = jnp.asarray(values, dtype)
    # XLA adds up to some thousand half-precision values one after the other.
    assert_equal(histogram(values), oracle(values.astype(jnp.float32)), rtol=2e-6)


def test_a_million_values_are_summed_to_1e_6():
    values = np.random.default_rng(2).normal(1e-4, 1e-3, 1_000_000)
    values = values.astype(np.float32)
    assert_equal(histogram(values), oracle(values))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32,
        17,
        elements=hypothesis.strategies.floats(width=32),
    )
)
def test_counts_and_extremes_equal_numpys_whatever_the_values(values):
    found, expected = histogram(values), oracle(values)
    for field in ("num", "nonfinite", "bucket_counts"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    # XLA on a CPU takes a subnormal number for zero, except where bits are looked at.
    np.testing.assert_allclose(found.min, expected.min, rtol=0, atol=1.2e-38)
    np.testing.assert_allclose(found.max, expected.max, rtol=0, atol=1.2e-38)


def test_a_float64_array_of_numpys_is_float32_like_everywhere_in_jax():
    values = np.linspace(-1, 1, 7)
    assert_equal(histogram({"w": values}), oracle(values))
    assert histogram(values[:0]).sum.dtype == np.float32


def test_what_is_not_finite_is_counted_and_left_out():
    values = jnp.array([1.0, jnp.nan, -jnp.inf, 3.0, jnp.inf, -jnp.nan])
    found = histogram(values)
    assert_equal(found, oracle([1.0, 3.0])._replace(nonfinite=4))


def test_nothing_but_nan_is_empty():
    found = histogram(jnp.full(3, jnp.nan))
    assert_equal(found, oracle([np.nan] * 3))
    assert found.nonfinite == 3


def test_of_a_complex_value_the_modulus_is_taken():
    values = jnp.array([3 + 4j, -5j, 0, complex(jnp.nan, 1), complex(1, jnp.inf)])
    assert_equal(histogram(values), oracle([5.0, 5.0, 0.0])._replace(nonfinite=2))


def test_squares_that_overflow_are_infinite_and_nothing_else_is():
    found = histogram(jnp.array([1e30, -1e30]))
    assert found.sum_squares == jnp.inf
    assert (found.sum, found.num, found.nonfinite) == (0.0, 2, 0)


@pytest.mark.parametrize(
    "nothing", [{}, None, jnp.zeros(0), {"w": jnp.zeros((3, 0)), "n": jnp.arange(4)}]
)
def test_of_nothing_it_is_empty(nothing):
    found = histogram(nothing)
    assert_equal(found, oracle([]))
    assert (found.num, found.min, found.max) == (0, LARGEST, -LARGEST)


def test_a_tree_is_counted_as_its_leaves_together():
    tree = {
        "kernel": jnp.linspace(-1.0, 2.0, 30).reshape(5, 6),
        "half": jnp.array([0.5, jnp.nan], jnp.bfloat16),
        "none": None,
        "masked": optax.MaskedNode(),
        "steps": jnp.arange(3),
        "flags": jnp.array([True]),
    }
    together = np.append(np.asarray(tree["kernel"]).ravel(), [0.5, np.nan])
    assert_equal(histogram(tree), oracle(together))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.complex64, np.float64])
def test_an_empty_histogram_has_the_same_types(dtype):
    with jax.enable_x64(True):
        tree = {"w": jnp.zeros(3, dtype), "b": jnp.zeros((), np.float32)}
        nothing = jax.tree.map(lambda leaf: leaf.reshape(-1)[:0], tree)
        full, empty = (jax.eval_shape(histogram, some) for some in (tree, nothing))
    assert jax.tree.structure(full) == jax.tree.structure(empty)
    leaves = map(jax.tree.leaves, (full, empty))
    for one, other in zip(*leaves, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.weak_type is other.weak_type is False


def test_every_third_step_of_a_scan_in_one_trace():
    traces = []
    steps = np.random.default_rng(3).standard_normal((7, 50)).astype(np.float32)

    def step(count, values):
        traces.append(None)
        looked_at = jax.lax.cond(
            count % 3 == 0, lambda: histogram(values), lambda: histogram(values[:0])
        )
        return count + 1, looked_at

    _, found = jax.jit(lambda steps: jax.lax.scan(step, 0, steps))(steps)
    assert len(traces) == 1
    for i, values in enumerate(steps):
        expected = oracle(values) if i % 3 == 0 else histogram(None)
        assert_equal(Histogram(*(field[i] for field in found)), expected)


def test_it_can_be_batched():
    values = np.random.default_rng(4).standard_normal((4, 3, 20)).astype(np.float32)
    found = jax.vmap(histogram)(values)
    for i in range(4):
        assert_equal(Histogram(*(field[i] for field in found)), oracle(values[i]))


SPECS = [("a", "b"), ("a", None), (None, "b"), (("a", "b"), None), (None, None)]
SPREAD = np.random.default_rng(5).standard_normal((16, 8)).astype(np.float32)


@pytest.mark.wide
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_sharded_array_is_counted_once_without_being_gathered(spec, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    values = jax.device_put(SPREAD, NamedSharding(mesh, PartitionSpec(*spec)))
    measure = jax.jit(histogram)
    assert_equal(measure(values), oracle(SPREAD))
    assert "all-gather" not in measure.lower(values).compile().as_text()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_outside_of_jit_a_sharded_array_is_counted_once(kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    values = jax.device_put(SPREAD, NamedSharding(mesh, PartitionSpec("a")))
    assert_equal(histogram(values), oracle(SPREAD))


@pytest.mark.parametrize("check_vma", [False, True])
def test_under_shard_map_all_devices_are_counted(check_vma):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    measure = jax.shard_map(
        functools.partial(histogram, axis_name=("a", "b")),
        mesh=mesh,
        in_specs=PartitionSpec("a", "b"),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    assert_equal(jax.jit(measure)(SPREAD), oracle(SPREAD))


def test_under_shard_map_what_is_replicated_is_counted_once():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    measure = jax.shard_map(
        functools.partial(histogram, axis_name=("a", "b")),
        mesh=mesh,
        in_specs=({"w": PartitionSpec("a"), "b": PartitionSpec()},),
        out_specs=PartitionSpec(),
    )
    tree = {"w": SPREAD, "b": np.float32([1e3, 1e-3])}
    expected = oracle(np.append(SPREAD, tree["b"]))
    assert_equal(jax.jit(measure)(tree), expected)


def test_under_pmap_all_devices_are_counted():
    measure = jax.pmap(functools.partial(histogram, axis_name="d"), axis_name="d")
    found = jax.device_get(measure(SPREAD.reshape(8, 2, 8)))
    for device in range(8):
        assert_equal(Histogram(*(field[device] for field in found)), oracle(SPREAD))


def test_a_histogram_is_made_of_its_parts():
    parts = oracle([0.5, -2.0, np.nan])._replace(
        bucket_limits=[-1.0, 0.0, 1.0], bucket_counts=[1, 0, 1]
    )
    made = Histogram(*parts)
    for found, expected in zip(made, parts, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert repr(made) == "Histogram(float32[])"
    assert made.shape == ()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_a_copy_is_read_like_the_original(copied):
    assert_equal(copied(histogram(SPREAD)), oracle(SPREAD))


def test_what_was_fetched_is_numpys():
    fetched = jax.device_get(histogram(SPREAD))
    assert all(isinstance(part, (np.ndarray, np.generic)) for part in fetched)
    assert_equal(fetched, oracle(SPREAD))


def test_histograms_of_one_kind_come_back_in_one_array():
    def seen(values):
        return {
            "h/b": histogram(values[1]),
            "norm": jnp.float32(2.0),
            "h/a": histogram(values[0]),
            "h/wide": histogram(values[2].astype(np.float64)),
        }

    with jax.enable_x64(True):
        stacked = jax.jit(lambda values: Stacked.of(seen(values)))(SPREAD)
        leaves, _ = jax.tree.flatten(stacked)
        assert sorted(leaf.dtype.name for leaf in leaves) == [
            *("float32", "int32", "int64")
        ]
        found = stacked.summaries()
        assert list(found) == ["h/a", "h/b", "h/wide", "norm"]
        assert found["norm"] == 2.0
        for row, tag in enumerate(["h/a", "h/b"]):
            assert_equal(found[tag], oracle(SPREAD[row]))
        assert_equal(found["h/wide"], oracle(SPREAD[2], np.float64))
        again = Stacked.of(found).summaries()
    assert jax.tree.all(jax.tree.map(np.array_equal, found, again))


def test_limits_of_a_wide_histogram_are_read_where_64_bits_are_off_again():
    with jax.enable_x64(True):
        found = histogram(jnp.ones(3, jnp.float64))
    np.testing.assert_array_equal(found.bucket_limits, bucket_limits(np.float64))

"""64 bits switched on and off in one process, whatever was counted before."""

import concurrent.futures
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from histogram_oracle import oracle

import optloss
from optloss import histograms
from optloss.fast.handover import Stacked
from optloss.histograms import Histogram, histogram

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
SHAPES = [(), (7,), (5, 2), (2, 3, 2), (0,), (3, 0)]


def values(dtype, shape):
    random = np.random.default_rng(len(shape) + len(dtype))
    made = random.normal(size=shape) * 10.0 ** random.integers(-8, 5, shape)
    if dtype.startswith("complex"):
        made = made + 1j * random.normal(size=shape)
    return np.asarray(made).astype(jnp.dtype(dtype))


def expected(array, wide):
    """What NumPy counts in the dtype that JAX has with or without 64 bits."""
    dtype = np.float64 if wide and array.dtype.itemsize >= 8 else np.float32
    if array.dtype == np.complex64:
        dtype = np.float32
    size = np.abs(array) if np.iscomplexobj(array) else array
    return oracle(np.asarray(size).astype(dtype), dtype)


def assert_counted(found, array, wide):
    wanted = expected(array, wide)
    for field in ("num", "nonfinite", "bucket_counts", "bucket_limits"):
        np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field))
    kind = np.asarray(wanted.bucket_limits).dtype
    assert [np.dtype(part.dtype) for part in found] == [
        *(kind, kind, np.int32, kind, kind, np.int32, kind, np.int32)
    ]


def forget():
    """Take the tables for one that was never made: what is first made differs."""
    for cached in (histograms._positive_limits, histograms._table):
        cached.cache_clear()


@pytest.mark.wide
@pytest.mark.parametrize("order", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_counts_equal_numpys_in_both_orders(order, jit):
    forget()
    for wide in (*order, *order):
        with jax.enable_x64(wide):
            count = jax.jit(histogram) if jit else histogram
            for dtype, shape in itertools.product(DTYPES, [(5, 2), (0,)]):
                array = values(dtype, shape)
                assert_counted(count(jnp.asarray(array)), array, wide)


@pytest.mark.wide
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_counted(dtype, shape):
    array = values(dtype, shape)
    for wide in (True, False):
        with jax.enable_x64(wide):
            assert_counted(histogram(jnp.asarray(array)), array, wide)


@pytest.mark.wide
def test_four_threads_count_with_and_without_at_once():
    forget()
    start = threading.Barrier(4)

    def work(wide):
        start.wait()
        with jax.enable_x64(wide):
            for dtype in DTYPES:
                array = values(dtype, (6, 2))
                assert_counted(histogram(jnp.asarray(array)), array, wide)
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [True, False, True, False]))


@pytest.mark.parametrize("wide", [True, False])
def test_a_step_first_read_inside_a_jit_keeps_no_tracer(wide):
    array = values("float64" if wide else "float32", (8, 2))
    with jax.enable_x64(wide):
        found = jax.jit(lambda x: Stacked.of({"h": histogram(x)}))(array).summaries()[
            "h"
        ]
        seen = jax.jit(
            lambda: (found.num + 1, found.bucket_counts, found.bucket_limits)
        )
        np.testing.assert_array_equal(seen()[1], expected(array, wide).bucket_counts)
        jax.jit(lambda x: x + found.sum)(jnp.float32(1.0))
    assert_counted(found, array, wide)
    assert not any(isinstance(part, jax.core.Tracer) for part in found)


def test_an_op_is_read_where_64_bits_are_off_again():
    params = {"w": values("float64", (4, 2)), "b": values("float32", (2,))}

    def loss(params):
        return sum(jnp.sum(leaf**2).astype(jnp.float32) for leaf in params.values())

    op = optloss.optimize_loss(loss, 0, 0.1, "SGD", summaries=["gradients"])
    outputs = {}
    for wide in (True, False, True):
        with jax.enable_x64(wide):
            outputs[wide] = op(op.init(params))[1].summaries
    for wide, summaries in outputs.items():
        for name, leaf in params.items():
            found = summaries[f"OptimizeLoss/gradients/{name}"]
            assert isinstance(found, Histogram)
            own = leaf.astype(leaf.dtype if wide else np.float32)
            np.testing.assert_array_equal(
                found.bucket_counts, expected(2 * own, wide).bucket_counts
            )


def test_a_packed_optimizer_by_name_is_judged_the_same():
    for wide in (True, False, True):
        with jax.enable_x64(wide):
            for name, good in (("adam", True), ("muon", False)):
                if good:
                    optloss.make_optimizer(0.1, name, pack_small_leaves=8)
                else:
                    with pytest.raises(ValueError, match="pack_small_leaves"):
                        optloss.make_optimizer(0.1, name, pack_small_leaves=8)

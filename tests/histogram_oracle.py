"""The histogram by NumPy: sums in float64, buckets by a binary search."""

from typing import Any, NamedTuple

import numpy as np


class Expected(NamedTuple):
    """The parts of a Histogram, as NumPy has them."""

    min: Any
    max: Any
    num: Any
    sum: Any
    sum_squares: Any
    nonfinite: Any
    bucket_limits: Any
    bucket_counts: Any


def tensorflow_limits(dtype):
    """As TensorFlow's histogram.cc builds them: one after the other, in double."""
    positive, value = [], 1e-12
    while value < 1e20:
        positive.append(value)
        value *= 1.1
    positive.append(float(np.finfo(dtype).max))
    limits = [*(-v for v in reversed(positive)), 0.0, *positive]
    return np.array(limits, np.float64).astype(dtype)


def oracle(values, dtype=np.float32):
    """The histogram by NumPy: sums in float64, buckets by a binary search."""
    values = np.asarray(values).ravel().astype(dtype)
    finite = values[np.isfinite(values)]
    limits = tensorflow_limits(dtype)
    places = np.searchsorted(limits, finite, side="right")
    places = np.minimum(places, len(limits) - 1)
    wide = finite.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        total, squares = wide.sum(), np.square(wide).sum()
    return Expected(
        min=finite.min() if finite.size else np.finfo(dtype).max,
        max=finite.max() if finite.size else np.finfo(dtype).min,
        num=finite.size,
        sum=total,
        sum_squares=squares,
        nonfinite=values.size - finite.size,
        bucket_limits=limits,
        bucket_counts=np.bincount(places, minlength=len(limits)),
    )


def assert_equal(found, expected, rtol=1e-6):
    for field in ("min", "max", "num", "nonfinite", "bucket_limits", "bucket_counts"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    size = np.sqrt(float(expected.sum_squares) * max(int(expected.num), 1))
    np.testing.assert_allclose(found.sum, expected.sum, rtol=rtol, atol=rtol * size)
    np.testing.assert_allclose(found.sum_squares, expected.sum_squares, rtol=rtol)

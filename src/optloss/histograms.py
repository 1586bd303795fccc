"""Histograms with TensorBoard's own buckets, counted on the device.

The limits grow by 1.1 from 1e-12 to 1e20, the same on the negative side, with zero
between and the largest float at both ends. The counts are exact, as a binary search
among the limits would give them: the bucket is read from the bits of a float, not from
its logarithm.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optloss.mesh import Axes, axes_of, reduce_over_mesh, varying_axes
from optloss.messages import check_axis_name
from optloss.trees import inexact_leaves, norm_dtype
from optloss.typing import AxisName, PyTree

DType: TypeAlias = np.dtype[np.generic]
Part: TypeAlias = jax.Array | np.ndarray

# A sixteenth of an octave is narrower than a bucket: it holds at most one limit.
CELL_BITS = 4
IN_BOUNDS = "promise_in_bounds"


@jax.tree_util.register_pytree_node_class
class Histogram:
    """How many values lie in each bucket, and the sums that TensorBoard keeps.

    Bucket ``i`` holds the values from ``bucket_limits[i - 1]``, included, to
    ``bucket_limits[i]``, excluded; the last one holds its limit, too. NaN and
    infinities are only counted, in ``nonfinite``. Without a finite value, ``num`` is 0,
    and ``min`` and ``max`` are the largest and the smallest float.

    Args:
        min: float ``[]``.
        max: float ``[]``, like the sums of the dtype of ``min``.
        num: int32 ``[]``, finite values.
        sum: float ``[]``.
        sum_squares: float ``[]``.
        nonfinite: int32 ``[]``, NaN and infinities.
        bucket_limits: float ``[buckets]``, increasing; ``None`` for TensorBoard's.
        bucket_counts: int32 ``[buckets]``.

    Note:
        Each part may have leading dimensions, the same for all: those of a ``scan`` or
        ``vmap``. TensorBoard's limits are no leaves of the tree, since they never
        change.

    Example:
        >>> import jax.numpy as jnp
        >>> found = histogram(jnp.array([0.5, 2.0]))
        >>> print(found.num, found.sum, found.bucket_counts.sum())
        2 2.5 2
    """

    __slots__ = ("_parts",)

    def __init__(
        self,
        min: Part,
        max: Part,
        num: Part,
        sum: Part,
        sum_squares: Part,
        nonfinite: Part,
        bucket_limits: Part | None,
        bucket_counts: Part,
    ) -> None:
        self._parts: Sequence[Any] = (
            min, max, num, sum, sum_squares, nonfinite, bucket_limits, bucket_counts
        )  # fmt: skip

    @classmethod
    def of_parts(cls, parts: Sequence[Any]) -> Histogram:
        """Return the histogram whose parts are read from ``parts`` when looked at."""
        made = cls.__new__(cls)
        made._parts = parts
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        """The leading dimensions: ``()``, or those of a ``scan`` or ``vmap``."""
        return tuple(np.shape(self.min))

    @property
    def min(self) -> Part:
        """The smallest finite value."""
        return self._parts[0]

    @property
    def max(self) -> Part:
        """The largest finite value."""
        return self._parts[1]

    @property
    def num(self) -> Part:
        """How many values are finite."""
        return self._parts[2]

    @property
    def sum(self) -> Part:
        """Their sum."""
        return self._parts[3]

    @property
    def sum_squares(self) -> Part:
        """The sum of their squares."""
        return self._parts[4]

    @property
    def nonfinite(self) -> Part:
        """How many values are NaN or infinite."""
        return self._parts[5]

    @property
    def bucket_limits(self) -> Part:
        """Where the buckets end."""
        given: Part | None = self._parts[6]
        if given is not None:
            return given
        smallest = self.min
        limits = bucket_limits(smallest.dtype)
        limits = np.broadcast_to(limits, (*np.shape(smallest), len(limits)))
        if not isinstance(smallest, jax.Array):
            return limits
        # It may be looked at where 64 bits, with which it was made, are off again.
        wide = limits.dtype == np.float64
        with jax.enable_x64(wide or jax.config.jax_enable_x64):
            return jnp.asarray(limits)

    @property
    def bucket_counts(self) -> Part:
        """How many values lie in each bucket."""
        return self._parts[7]

    def __iter__(self) -> Iterator[Part]:
        """Yield the eight parts, in the order of the arguments."""
        yield from (self.min, self.max, self.num, self.sum, self.sum_squares)
        yield from (self.nonfinite, self.bucket_limits, self.bucket_counts)

    def __repr__(self) -> str:
        """Return the dtype of the values and the leading dimensions."""
        return f"Histogram({jnp.result_type(self.min)}{list(self.shape)})"

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Return what JAX handles in the histogram's place."""
        return tuple(self._parts), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Sequence[Any]) -> Histogram:
        """Return the histogram that was flattened to ``children``."""
        del aux
        return cls.of_parts(children)


def histogram(tree: PyTree, *, axis_name: AxisName = None) -> Histogram:
    r"""Return the histogram of all floating and complex values of ``tree`` together.

    It is computed on the device, traced or not, in time proportional to the number of
    values. Of a complex value the modulus is taken.

    Args:
        tree: An array ``[*shape]`` or a tree of them. Integers, bools, ``None`` and
            ``float0`` are not counted; there need be nothing to count.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that the leaves may be
            sharded over.

    Returns:
        A :class:`Histogram` of 1,551 buckets: float32, or float64 if a leaf is float64
        or complex128. Counts are int32, so ``tree`` may hold up to 2**31 - 1 values.

    Note:
        ``sum`` and ``sum_squares`` are infinite where they exceed the largest float.

    Example:
        >>> import jax.numpy as jnp
        >>> grads = {"w": jnp.array([0.5, -2.0, jnp.nan]), "b": jnp.array(0.5)}
        >>> found = histogram(grads)
        >>> print(found.num, found.nonfinite, found.min, found.max, found.sum)
        3 1 -2.0 0.5 -1.0
        >>> print(found.bucket_counts[found.bucket_counts > 0])
        [1 2]

    See also:
        :class:`~optloss.integrations.tensorboard.SummaryWriter`, which shows it.
    """
    check_axis_name("histogram", axis_name)
    axes = axes_of(axis_name)
    dtype = norm_dtype(tree)
    count = functools.partial(_of_a_leaf, dtype=dtype)
    leaves = [leaf for leaf in inexact_leaves(tree) if leaf.size]
    found: list[Histogram] = [reduce_over_mesh(count, leaf, axes) for leaf in leaves]
    return functools.reduce(_merge, found) if found else _nothing(dtype)


def _nothing(dtype: DType) -> Histogram:
    largest = float(jnp.finfo(dtype).max)
    nothing, none = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    return Histogram(
        min=jnp.asarray(largest, dtype),
        max=jnp.asarray(-largest, dtype),
        num=none,
        sum=nothing,
        sum_squares=nothing,
        nonfinite=none,
        bucket_limits=None,
        bucket_counts=jnp.zeros(len(bucket_limits(dtype)), jnp.int32),
    )


@functools.cache
def _positive_limits() -> np.ndarray:
    # Multiplied up, not a power of 1.1: only so the limits are TensorFlow's to the bit.
    limits = [1e-12]
    while limits[-1] * 1.1 < 1e20:
        limits.append(limits[-1] * 1.1)
    return np.array(limits)


def bucket_limits(dtype: DTypeLike) -> np.ndarray:
    """Return TensorBoard's limits, increasing, the largest float of ``dtype`` last."""
    positive = np.append(_positive_limits(), jnp.finfo(dtype).max)
    return np.concatenate([-positive[::-1], [0.0], positive]).astype(dtype)


class _Table(NamedTuple):
    """Where a magnitude stands among the positive limits, by its bits."""

    edges: np.ndarray  # bits of the limits, then the largest integer
    below: np.ndarray  # how many limits lie below each cell
    first: int  # number of the first cell
    shift: int  # from bits to the number of the cell


@functools.cache
def _table(dtype: DType) -> _Table:
    integer = np.dtype(f"i{dtype.itemsize}")
    shift = jnp.finfo(dtype).nmant - CELL_BITS
    limits = _positive_limits().astype(dtype).view(integer)
    cells = np.arange(limits[0] >> shift, (limits[-1] >> shift) + 1)
    below = np.searchsorted(limits, cells << shift).astype(np.int32)
    edges = np.append(limits, np.array(np.iinfo(integer).max, integer))
    return _Table(edges, below, int(cells[0]), shift)


def _bucket(values: jax.Array) -> jax.Array:
    """Return the bucket of each real value; that of a NaN means nothing."""
    table = _table(values.dtype)
    edges, below = jnp.asarray(table.edges), jnp.asarray(table.below)
    bits = jax.lax.bitcast_convert_type(values, edges.dtype)
    magnitude = bits & jnp.iinfo(edges.dtype).max
    negative = (bits < 0) & (magnitude > 0)
    # A bucket owns its lower end; mirrored, its upper one: hence one bit pattern less.
    key = magnitude - negative.astype(edges.dtype)
    cell = jnp.clip((key >> table.shift) - table.first, 0, len(table.below) - 1)
    rank = below.at[cell].get(mode=IN_BOUNDS)
    rank += (key >= edges.at[rank].get(mode=IN_BOUNDS)).astype(rank.dtype)
    zero = len(table.edges)
    return jnp.where(negative, zero - rank, zero + 1 + rank).astype(jnp.int32)


@jax.jit(static_argnames=("axes", "dtype"))
def _of_a_leaf(leaf: jax.Array, axes: Axes, dtype: DType) -> Histogram:
    values = (jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf).astype(dtype)
    finite = jnp.isfinite(values)
    kept = jnp.where(finite, values, 0)
    start = _nothing(dtype)
    # One bucket more, for what is not finite: the counts then tell how many are.
    buckets = len(start.bucket_counts)
    counts = jnp.zeros(buckets + 1, jnp.int32)
    places = jnp.where(finite, _bucket(values), buckets)
    counts = counts.at[places].add(1, mode=IN_BOUNDS)
    here = Histogram(
        min=jnp.min(jnp.where(finite, values, start.min)),
        max=jnp.max(jnp.where(finite, values, start.max)),
        num=jnp.sum(counts[:buckets], dtype=jnp.int32),
        sum=jnp.sum(kept),
        sum_squares=jnp.sum(jnp.square(kept)),
        nonfinite=counts[buckets],
        bucket_limits=None,
        bucket_counts=counts[:buckets],
    )
    over = varying_axes(leaf, axes)
    if not over:
        return here
    _, _, *sums = jax.lax.psum(here.tree_flatten()[0], over)
    return Histogram(jax.lax.pmin(here.min, over), jax.lax.pmax(here.max, over), *sums)


def _merge(a: Histogram, b: Histogram) -> Histogram:
    _, _, *sums = jax.tree.map(jnp.add, a, b).tree_flatten()[0]
    return Histogram(jnp.minimum(a.min, b.min), jnp.maximum(a.max, b.max), *sums)

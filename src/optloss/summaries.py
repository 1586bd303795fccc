"""What can be looked at in a run: its tags, histograms, and what a state measured.

A transform publishes what it measured by a method of its state, ``measurements()``,
that returns a dict from tag to scalar. :func:`get_summaries` finds such states wherever
they are wrapped, so nothing has to be computed, or passed along, a second time.

Histograms have TensorBoard's own buckets: limits that grow by 1.1 from 1e-12 to 1e20,
the same on the negative side, zero, and the largest float at both ends. The counts are
exact, as a binary search among the limits would give them: the bucket is read from the
bits of a float, not from its logarithm.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from optloss.norms import explicit_axes, varying_axes
from optloss.trees import inexact_leaves, norm_dtype

LEARNING_RATE = "learning_rate"
LOSS = "loss"
GRADIENT_NORM = "global_norm/gradient_norm"
CLIPPED_GRADIENT_NORM = "global_norm/clipped_gradient_norm"
PARAMETER_GRADIENT_NORM = "gradient_norm"
PARAMETER_GRADIENTS = "gradients"
CLIP_FACTOR = "clip_factor"
CLIPPED_SHARE = "clipped_share"
ADAPTIVE_MAX_NORM = "global_norm/adaptive_max_gradient_norm"
ADAPTIVE_MEAN = "adaptive/mean"
ADAPTIVE_SQ_MEAN = "adaptive/sq_mean"
NOISE_STD = "noise_std"
SKIPPED_TOTAL = "skipped/total"
SKIPPED_CONSECUTIVE = "skipped/consecutive"

OPTIMIZER_SUMMARIES = (
    "learning_rate",
    "loss",
    "gradients",
    "gradient_norm",
    "global_gradient_norm",
)

Axes = tuple[str, ...]

# A sixteenth of an octave is narrower than a bucket: it holds at most one limit.
CELL_BITS = 4
IN_BOUNDS = "promise_in_bounds"


class Histogram(NamedTuple):
    """How many values lie in each bucket, and the sums that TensorBoard keeps.

    Bucket ``i`` holds the values from ``bucket_limits[i - 1]``, included, to
    ``bucket_limits[i]``, excluded; the last one holds its limit, too. NaN and
    infinities are only counted, in ``nonfinite``. Without a finite value, ``num`` is 0,
    and ``min`` and ``max`` are the largest and the smallest float.
    """

    min: jax.Array  # float []
    max: jax.Array  # float []
    num: jax.Array  # int32 [], finite values
    sum: jax.Array  # float []
    sum_squares: jax.Array  # float []
    nonfinite: jax.Array  # int32 [], NaN and infinities
    bucket_limits: jax.Array  # float [buckets], increasing
    bucket_counts: jax.Array  # int32 [buckets]


def histogram(tree: Any, *, axis_name: str | Axes | None = None) -> Histogram:
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
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    dtype = np.dtype(norm_dtype(tree))
    leaves = [leaf for leaf in inexact_leaves(tree) if leaf.size]
    parts = [_over_the_mesh(leaf, axes, dtype) for leaf in leaves]
    return functools.reduce(_merge, parts) if parts else empty_histogram(tree)


def empty_histogram(tree: Any = None) -> Histogram:
    """Return the histogram of nothing, in the dtypes that ``histogram(tree)`` has.

    >>> empty = empty_histogram()
    >>> print(empty.num, empty.bucket_counts.sum(), empty.bucket_counts.shape)
    0 0 (1551,)
    """
    dtype = np.dtype(norm_dtype(tree))
    largest = float(jnp.finfo(dtype).max)
    nothing, none = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    limits = jnp.asarray(bucket_limits(dtype))
    return Histogram(
        min=jnp.asarray(largest, dtype),
        max=jnp.asarray(-largest, dtype),
        num=none,
        sum=nothing,
        sum_squares=nothing,
        nonfinite=none,
        bucket_limits=limits,
        bucket_counts=jnp.zeros(limits.shape, jnp.int32),
    )


@functools.cache
def _positive_limits() -> np.ndarray[Any, np.dtype[np.float64]]:
    # Multiplied up, not a power of 1.1: only so the limits are TensorFlow's to the bit.
    limits = [1e-12]
    while limits[-1] * 1.1 < 1e20:
        limits.append(limits[-1] * 1.1)
    return np.array(limits)


def bucket_limits(dtype: Any) -> np.ndarray[Any, Any]:
    """Return TensorBoard's limits, increasing, the largest float of ``dtype`` last."""
    positive = np.append(_positive_limits(), jnp.finfo(dtype).max)
    return np.concatenate([-positive[::-1], [0.0], positive]).astype(dtype)


class _Table(NamedTuple):
    """Where a magnitude stands among the positive limits, by its bits."""

    edges: np.ndarray[Any, Any]  # bits of the limits, then the largest integer
    below: np.ndarray[Any, Any]  # how many limits lie below each cell
    first: int  # number of the first cell
    shift: int  # from bits to the number of the cell


@functools.cache
def _table(dtype: np.dtype[Any]) -> _Table:
    integer = np.dtype(f"i{dtype.itemsize}")
    shift = jnp.finfo(dtype).nmant - CELL_BITS
    limits = _positive_limits().astype(dtype).view(integer)
    cells = np.arange(limits[0] >> shift, (limits[-1] >> shift) + 1)
    below = np.searchsorted(limits, cells << shift).astype(np.int32)
    edges = np.append(limits, np.iinfo(integer).max)
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
    rank = _take(below, cell)
    rank += key >= _take(edges, rank)
    zero = len(table.edges)
    return jnp.where(negative, zero - rank, zero + 1 + rank)


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode=IN_BOUNDS)


def _over_the_mesh(leaf: jax.Array, axes: Axes, dtype: np.dtype[Any]) -> Any:
    mesh, explicit = explicit_axes(leaf)
    if not explicit:
        return _of_a_leaf(leaf, axes, dtype)
    spread: Callable[[jax.Array], Any] = jax.shard_map(
        lambda leaf: _of_a_leaf(leaf, (*axes, *explicit), dtype),
        mesh=mesh,
        in_specs=jax.typeof(leaf).sharding.spec,
        out_specs=PartitionSpec(),
        axis_names=set(explicit),
    )
    return spread(leaf)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _of_a_leaf(leaf: jax.Array, axes: Axes, dtype: np.dtype[Any]) -> Histogram:
    values = (jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf).astype(dtype)
    finite = jnp.isfinite(values)
    kept = jnp.where(finite, values, 0)
    start = empty_histogram(values)
    # One bucket more, for what is not finite: the counts then tell how many are.
    buckets = len(start.bucket_counts)
    counts = jnp.zeros(buckets + 1, jnp.int32)
    places = jnp.where(finite, _bucket(values), buckets)
    counts = counts.at[places].add(1, mode=IN_BOUNDS)
    here = start._replace(
        min=jnp.min(jnp.where(finite, values, start.min)),
        max=jnp.max(jnp.where(finite, values, start.max)),
        num=jnp.sum(counts[:buckets], dtype=jnp.int32),
        sum=jnp.sum(kept),
        sum_squares=jnp.sum(jnp.square(kept)),
        nonfinite=counts[buckets],
        bucket_counts=counts[:buckets],
    )
    over = varying_axes(leaf, axes)
    return _over_devices(here, over) if over else here


def _over_devices(part: Histogram, axes: Axes) -> Histogram:
    """Return the histogram of what all devices along ``axes`` hold together."""
    total: Histogram = jax.lax.psum(part, axes)
    return total._replace(
        min=jax.lax.pmin(part.min, axes),
        max=jax.lax.pmax(part.max, axes),
        bucket_limits=part.bucket_limits,
    )


def _merge(a: Histogram, b: Histogram) -> Histogram:
    return Histogram(
        min=jnp.minimum(a.min, b.min),
        max=jnp.maximum(a.max, b.max),
        num=a.num + b.num,
        sum=a.sum + b.sum,
        sum_squares=a.sum_squares + b.sum_squares,
        nonfinite=a.nonfinite + b.nonfinite,
        bucket_limits=a.bucket_limits,
        bucket_counts=a.bucket_counts + b.bucket_counts,
    )


def get_summaries(tree: Any) -> dict[str, jax.Array]:
    """Return what our transforms measured at the latest update, by tag.

    Nothing is computed again: the transforms keep in their state what they measure
    anyway. The state may be that of one transform or of a chain, and may be wrapped in
    others, such as ``optax.masked``, ``optax.partition`` or ``optax.MultiSteps``, in a
    :class:`TrainOpState`, a Flax ``TrainState`` or an ``nnx.Optimizer``.

    Args:
        tree: A state, or any tree that holds one. Its arrays may be traced.

    Returns:
        A dict from tag to float32 scalar ``[]``, in the order of the chain; empty if no
        transform of ours is in ``tree``. A tag found before gets ``_1``, then ``_2``.

    Note:
        Under ``vmap`` the values are batched like the state.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from optloss import clip_by_global_norm
        >>> tx = optax.chain(clip_by_global_norm(1.0), optax.adam(1e-3))
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(grads, tx.init(grads))
        >>> for tag, value in get_summaries(state).items():
        ...     print(tag, value)
        global_norm/gradient_norm 5.0
        global_norm/clipped_gradient_norm 1.0
        clip_factor 0.2
        clipped_share 1.0

    See also:
        :class:`StepOutput`, whose ``summaries`` come from here.
    """
    found: dict[str, jax.Array] = {}
    seen: dict[str, int] = {}
    for state in _measuring(tree):
        for tag, value in _plain(state).measurements().items():
            earlier = seen.setdefault(tag, 0)
            seen[tag] += 1
            name = f"{tag}_{earlier}" if earlier else tag
            found[name] = jnp.asarray(value, jnp.float32)
    return found


def _measures(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "measurements")


def _measuring(tree: Any) -> Iterator[Any]:
    """Yield the states in ``tree`` that measure, an outer one before its inner ones."""
    if _measures(tree):
        yield tree
    for node in jax.tree.leaves(tree, is_leaf=lambda n: n is not tree and _measures(n)):
        if _measures(node):
            yield from _measuring(node)


def _plain(state: Any) -> Any:
    # An nnx.Optimizer keeps the structure of a state and wraps its arrays in Variables.
    fields = (f.get_value() if hasattr(f, "get_value") else f for f in state)
    return type(state)(*fields)

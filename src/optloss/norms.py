r"""The norm of a gradient, right at every magnitude, in every dtype, on every mesh.

Squares are summed in float32 (float64 if a leaf is), whatever the leaves are. A float32
sum of squares alone reaches norms between 1e-19 and 1e19. Blue's remedy has three sums:
of the squares, of the squares of all values scaled down, and of all scaled up; the one
that neither overflows nor underflows gives the norm. All three come out of one pass
over the values, which costs an accelerator no more than one sum. A CPU computes the
plain sum, and in a branch that it seldom takes another one in float64.

Every device of a mesh must come to the same norm, and count each parameter once:

* under ``jit`` with Auto axes XLA sees to it;
* with Explicit axes the sums are a ``shard_map`` of their own, with one all-reduce;
* under ``shard_map`` or ``pmap`` the caller names the axes, and a leaf that is
  replicated over an axis, as its type tells, is counted once and not once per device.

References:
    Blue, *A Portable Fortran Program to Find the Euclidean Norm of a Vector*, 1978. He
    sorts the values into three sums; here each enters all three, without a branch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optloss.mesh import (
    Axes,
    axes_of,
    cond_on_mesh,
    explicit_axes,
    reduce_over_mesh,
    varying_axes,
)
from optloss.messages import check_axis_name
from optloss.trees import inexact_leaves, norm_dtype
from optloss.typing import AxisName, PyTree

Leaves: TypeAlias = list[jax.Array]
DType: TypeAlias = np.dtype[np.generic]


def global_norm(tree: PyTree, *, axis_name: AxisName = None) -> jax.Array:
    r"""Return the Euclidean norm of all floating and complex leaves together.

    .. math:: \lVert g \rVert_2 = \sqrt{\sum_i \lvert g_i \rvert^2}

    It neither overflows nor underflows while the norm itself is representable, and its
    gradient at zero is zero.

    Args:
        tree: Arrays ``[*shape]`` of any floating or complex dtype. Integers, bools,
            ``None`` and ``float0`` are not counted.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that the leaves may be
            sharded over.

    Returns:
        A real scalar ``[]``: float64 if a leaf is float64 or complex128, else float32.

    Example:
        >>> import jax.numpy as jnp
        >>> print(global_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}))
        5.0
        >>> print(global_norm(jnp.full(4, 1e30)))
        2e+30

    See also:
        :func:`clip_by_global_norm`, which measures the gradient with it.
    """
    check_axis_name("global_norm", axis_name)
    dtype = norm_dtype(tree)
    leaves = [leaf for leaf in inexact_leaves(tree) if leaf.size]
    if not leaves:
        return jnp.zeros((), dtype)
    return _norms(leaves, axes_of(axis_name), dtype, False)[0]


def leaf_norms(tree: PyTree, *, axis_name: AxisName = None) -> list[jax.Array]:
    """Return the norm of each floating or complex leaf, in the order of the tree."""
    leaves, dtype = inexact_leaves(tree), norm_dtype(tree)
    full = [leaf for leaf in leaves if leaf.size]
    found = iter(_norms(full, axes_of(axis_name), dtype, True) if full else [])
    return [next(found) if leaf.size else jnp.zeros((), dtype) for leaf in leaves]


def shrink_factor(norm: jax.Array, bound: jax.Array) -> jax.Array:
    """Return what makes ``norm`` at most ``bound``; 1 for one that is not finite."""
    outside = (norm > bound) & jnp.isfinite(norm)
    return jnp.where(outside, bound / jnp.where(outside, norm, 1), 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _measure(leaves: Leaves, axes: Axes, dtype: DType, each: bool) -> Leaves:
    """Return the norm of each leaf, or the one of all together."""
    half, digits = jnp.finfo(dtype).maxexp // 2, jnp.finfo(dtype).nmant
    down, up, least = 2.0 ** -(half + 16), 2.0 ** (half + digits), 2.0**-half

    def sums(
        *scales: float, wide: DType = dtype, at_once: bool = False
    ) -> list[Leaves]:
        def squares(leaf: jax.Array) -> Leaves:
            values = [_squares(_real_parts(leaf, wide), scale) for scale in scales]
            return _sum_at_once(values) if at_once else [*map(jnp.sum, values)]

        return _totals(squares, leaves, axes, each)

    def three_sums(at_once: bool = False) -> Leaves:
        return [pick(*three) for three in sums(1.0, down, up, at_once=at_once)]

    def pick(plain: jax.Array, large: jax.Array, small: jax.Array) -> jax.Array:
        huge, tiny = plain == jnp.inf, plain < least
        total = jnp.where(huge, large, jnp.where(tiny, small, plain))
        scale = jnp.where(huge, down, jnp.where(tiny, up, 1)).astype(dtype)
        return jnp.sqrt(total) / scale

    def one_sum() -> Leaves:
        plain = [total for (total,) in sums(1.0)]
        fine = [(total != jnp.inf) & ~(total < least) for total in plain]
        return cond_on_mesh(
            functools.reduce(jnp.logical_and, fine),
            lambda: [*map(jnp.sqrt, plain)],
            three_sums if dtype == jnp.float64 else in_float64,
        )

    def in_float64() -> Leaves:
        # Constant scales would be written to memory in the shape of each leaf.
        with jax.enable_x64(True):
            roots = [jnp.sqrt(total) for (total,) in sums(1.0, wide=np.dtype("f8"))]
            return [jax.lax.convert_element_type(root, dtype) for root in roots]

    one_all_reduce = axes or explicit_axes(leaves)[1]
    # A GPU has fewer kernels for one reduction of three operands.
    on_a_gpu = functools.partial(three_sums, at_once=True)
    return jax.lax.platform_dependent(
        cpu=three_sums if one_all_reduce else one_sum,
        cuda=on_a_gpu,
        rocm=on_a_gpu,
        default=three_sums,
    )


@_measure.defjvp
def _measure_jvp(
    axes: Axes,
    dtype: DType,
    each: bool,
    primals: tuple[Leaves],
    tangents: tuple[Leaves],
) -> tuple[Leaves, Leaves]:
    (leaves,), (moves,) = primals, tangents
    norms = _norms(leaves, axes, dtype, each)

    def along(leaf: jax.Array, move: jax.Array, norm: jax.Array) -> Leaves:
        safe = jnp.where(norm > 0, norm, 1)
        # Scaled down at first: 1 / norm is zero where the norm is huge.
        shift = jnp.where(safe > 1, 2.0**-8, 1).astype(dtype)
        pairs = zip(_real_parts(leaf, dtype), _real_parts(move, dtype), strict=True)
        inverse = 1 / (safe * shift)
        return [_add([jnp.sum(x * shift * inverse * y) for x, y in pairs])]

    beside = norms if each else norms * len(leaves)
    slopes = _totals(along, leaves, axes, each, moves, beside)
    return norms, [slope for (slope,) in slopes]


# Outside of jit the branches would be compiled at every call.
_norms = jax.jit(_measure, static_argnums=(1, 2, 3))


def _totals(
    fn: Callable[..., Leaves], leaves: Leaves, axes: Axes, each: bool, *beside: Leaves
) -> list[Leaves]:
    """Sum ``fn`` of each leaf over all elements and devices, and unless ``each``, all.

    ``fn`` returns several numbers, which are summed one by one.
    """

    def here(rows: list[Leaves], axes: Axes) -> list[Leaves]:
        over = [varying_axes(row, axes) for row in rows]
        used = tuple(axis for axis in axes if any(axis in own for own in over))
        totals = [
            # A leaf that is replicated over an axis would be counted on each device.
            [part / copies(used, own) for part in fn(*row)]
            for row, own in zip(rows, over, strict=True)
        ]
        if not each:
            totals = [[_add(column) for column in zip(*totals, strict=True)]]
        return jax.lax.psum(totals, used) if used else totals

    def copies(used: Axes, own: Axes) -> int:
        return math.prod(jax.lax.axis_size(axis) for axis in used if axis not in own)

    rows = [list(row) for row in zip(leaves, *beside, strict=True)]
    return reduce_over_mesh(here, rows, axes)


def _add(numbers: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, numbers)


def _squares(parts: Leaves, scale: float) -> jax.Array:
    if scale != 1:
        # Of a known x, XLA may write (x s) (x s) as x^2 s^2, which is out of reach.
        largest = jnp.finfo(parts[0].dtype).max
        parts = [jnp.minimum(jnp.abs(x * scale), largest) for x in parts]
    return _add([*map(jnp.square, parts)])


def _sum_at_once(values: Leaves) -> Leaves:
    zeros = [jnp.zeros((), value.dtype) for value in values]
    return jax.lax.reduce(
        values, zeros, lambda a, b: [*map(jnp.add, a, b)], range(values[0].ndim)
    )


def _real_parts(leaf: jax.Array, dtype: DType) -> Leaves:
    if jnp.iscomplexobj(leaf):
        return [leaf.real.astype(dtype), leaf.imag.astype(dtype)]
    return [leaf.astype(dtype)]

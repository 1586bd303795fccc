r"""The global norm of a tree, right at every magnitude, in every dtype, on every mesh.

The squares are summed in float32 (float64 if a leaf is), whatever the leaves are. A
float32 sum of squares only reaches norms between 1e-19 and 1e19; the rest of float32's
range is reached by summing once more, with the leaves scaled by a power of two. The sum
therefore stands in a loop, whose body runs once for an ordinary gradient and twice for
a huge, tiny or zero one. A loop, and not a branch, because a compiled program that is
spread over devices then holds one all-reduce for it, not two.

Every device of a mesh must come to the same norm, and count each parameter once:

* under ``jit`` with Auto axes XLA sees to it;
* with Explicit axes the sum is a ``shard_map`` of its own, ending in one all-reduce;
* under ``shard_map`` or ``pmap`` the caller names the axes, and a leaf that is
  replicated over an axis, as its type tells, is counted once and not once per device.
"""

import collections
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from optloss.mesh import (
    Axes,
    AxisName,
    axes_of,
    reduce_over_mesh,
    vary_over,
    varying,
    varying_axes,
)
from optloss.trees import accumulator_dtype, inexact_leaves, norm_dtype

LARGE = 2**17
"""Elements of a leaf that is worth a kernel."""


def global_norm(tree: Any, *, axis_name: AxisName = None) -> jax.Array:
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
    axes = axes_of(axis_name)
    dtype = norm_dtype(tree)
    leaves = [leaf for leaf in inexact_leaves(tree) if leaf.size]
    if not leaves:
        return jnp.zeros((), dtype)
    norm: jax.Array = _norm(leaves, axes, jnp.dtype(dtype))
    return norm


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm(leaves: list[jax.Array], axes: Axes, dtype: Any) -> jax.Array:
    half, digits = jnp.finfo(dtype).maxexp // 2, jnp.finfo(dtype).nmant
    down, up = 2.0 ** -(half + 16), 2.0 ** (half + digits)

    def again(carry: tuple[Any, ...]) -> Any:
        return carry[2]

    def measure(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        scales = carry[0]
        parts = [(leaf, scales[i]) for leaf, i in zip(leaves, places, strict=True)]
        total = _sum(parts, _scaled_square, axes, dtype)
        better = jnp.where(total == jnp.inf, down, jnp.where(total < 2.0**-half, up, 1))
        repeat = (scales[0] == 1) & (better != 1)
        return jnp.where(repeat, better, scales).astype(dtype), total, repeat

    places = _places(leaves)
    scales = jnp.ones(1 + max(places), dtype)
    first = (scales, jnp.zeros((), dtype), jnp.array(True))
    unsummed = frozenset().union(*map(varying, leaves)) - set(axes)
    first = jax.tree.map(lambda leaf: vary_over(leaf, unsummed), first)
    scales, total, _ = jax.lax.while_loop(again, measure, first)
    norm: jax.Array = jnp.sqrt(total) / scales[0]
    return norm


def _places(leaves: list[jax.Array]) -> list[int]:
    """Return which of several equal scales each leaf is multiplied by.

    Leaves of one shape would share the broadcast of a common scale, which XLA on a CPU
    then keeps in memory and reads again for each. A scale of its own is worth its
    kernel to a large leaf alone.
    """
    shapes: collections.Counter[tuple[int, ...]] = collections.Counter()
    places = []
    for leaf in leaves:
        places.append(shapes[leaf.shape])
        shapes[leaf.shape] += leaf.size >= LARGE
    return places


@_norm.defjvp
def _norm_jvp(axes: Axes, dtype: Any, primals: Any, tangents: Any) -> Any:
    (leaves,), (moves,) = primals, tangents
    norm = _norm(leaves, axes, dtype)
    safe = jnp.where(norm > 0, norm, 1)
    # Scaled down at first: 1 / norm is zero where the norm is huge.
    shift = jnp.where(safe > 1, 2.0**-8, 1).astype(dtype)
    inverse = 1 / (safe * shift)
    parts = [(*pair, shift, inverse) for pair in zip(leaves, moves, strict=True)]
    return norm, _sum(parts, _component, axes, dtype)


def _scaled_square(leaf: jax.Array, scale: jax.Array) -> jax.Array:
    squares = [jnp.square(part * scale.astype(part.dtype)) for part in _parts(leaf)]
    return sum(squares[1:], squares[0])


def _component(
    leaf: jax.Array, move: jax.Array, shift: jax.Array, inverse: jax.Array
) -> jax.Array:
    products = [
        part * shift.astype(part.dtype) * inverse.astype(part.dtype) * along
        for part, along in zip(_parts(leaf), _parts(move), strict=True)
    ]
    return sum(products[1:], products[0])


def _parts(leaf: jax.Array) -> list[jax.Array]:
    wide = leaf.astype(accumulator_dtype(leaf.dtype))
    return [wide.real, wide.imag] if jnp.iscomplexobj(wide) else [wide]


def _sum(parts: list[Any], fn: Any, axes: Axes, dtype: Any) -> jax.Array:
    """Sum ``fn(*part)`` over all parts, elements and devices."""
    total: jax.Array = reduce_over_mesh(
        lambda parts, axes: _sum_here(parts, fn, axes, dtype), parts, axes
    )
    return total


def _sum_here(parts: list[Any], fn: Any, axes: Axes, dtype: Any) -> jax.Array:
    over = [varying_axes(part, axes) for part in parts]
    used = tuple(axis for axis in axes if any(axis in own for own in over))
    total = jnp.zeros((), dtype)
    for part, own in zip(parts, over, strict=True):
        # A leaf that is replicated over an axis would be counted once per device of it.
        copies = math.prod(jax.lax.axis_size(axis) for axis in used if axis not in own)
        total += jnp.sum(fn(*part).astype(dtype)) / copies
    return jax.lax.psum(total, used) if used else total

"""Leaves and norms of parameter trees.

A tree may hold anything: floating arrays that are trained, integer tables, ``None``
where a partition took a leaf away, ``float0`` where JAX differentiated an integer. Only
the *inexact* leaves, floating or complex arrays, are arithmetic to this library; the
rest pass through untouched.
"""

from collections.abc import Callable, Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optloss.typing import Pairs, PyTree, Scalar


def is_inexact(leaf: object) -> TypeGuard[jax.Array]:
    """Tell whether ``leaf`` is a floating or complex array, or the shape of one."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def is_masked(node: object) -> bool:
    """Tell whether ``node`` stands in place of a leaf that was taken out of a tree."""
    return isinstance(node, optax.MaskedNode)


def is_float8(leaf: object) -> bool:
    """Tell whether ``leaf`` is floating, and too coarse to add an update to."""
    return is_inexact(leaf) and jnp.finfo(leaf.dtype).bits < 16


def map_inexact(fn: Callable[..., jax.Array], tree: PyTree, *rest: PyTree) -> PyTree:
    """Apply ``fn`` to the inexact leaves of ``tree`` (and what ``rest`` has there)."""
    return jax.tree.map(
        lambda leaf, *others: fn(leaf, *others) if is_inexact(leaf) else leaf,
        tree,
        *rest,
    )


def accumulator_dtype(dtype: DTypeLike) -> np.dtype[np.generic]:
    """Return the dtype sums over ``dtype`` are kept in: at least float32, same kind."""
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)  # which JAX does not promote float8 to by itself
    return jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))


def real_dtype(dtype: DTypeLike) -> np.dtype[np.generic]:
    """Return the dtype of the absolute values of ``dtype``."""
    return jnp.finfo(dtype).dtype


def norm_dtype(tree: PyTree) -> np.dtype[np.generic]:
    """Return the dtype of a norm over ``tree``: float64 if a leaf is, else float32."""
    dtypes = [real_dtype(leaf.dtype) for leaf in inexact_leaves(tree)]
    # A float64 array of NumPy's is float32 to a JAX that has no 64 bits.
    return jax.dtypes.canonicalize_dtype(
        jnp.float64 if jnp.float64 in dtypes else jnp.float32
    )


def inexact_leaves(tree: PyTree) -> list[jax.Array]:
    """Return the floating and complex leaves of ``tree`` in tree order."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]


def children(node: PyTree) -> dict[str, PyTree]:
    """Return the children of ``node`` by their names in it."""
    pairs = jax.tree.leaves_with_path(node, is_leaf=lambda n: n is not node)
    return {jax.tree_util.keystr(path, simple=True): child for path, child in pairs}


def own_copy(leaf: ArrayLike | np.generic) -> jax.Array:
    """Return ``leaf`` as an array of its own whose type is not weak."""
    leaf = jnp.array(leaf, copy=True)
    return jax.lax.convert_element_type(leaf, leaf.dtype)


def own_copies(leaves: list[PyTree]) -> list[PyTree]:
    """Return copies of the arrays among ``leaves``, none of which share a buffer.

    The list is emptied on the way: no more than one leaf is held twice.
    """
    copies = []
    leaves.reverse()
    while leaves:
        leaf = leaves.pop()
        abstract = not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float))
        copies.append(leaf if abstract else own_copy(leaf))
    return copies


def to_float32(tree: PyTree) -> PyTree:
    """Return ``tree`` with its half-precision leaves in float32."""
    return map_inexact(lambda leaf: leaf.astype(accumulator_dtype(leaf.dtype)), tree)


def scale_leaves(tree: PyTree, factor: Scalar) -> PyTree:
    """Multiply the inexact leaves of ``tree`` by a real ``factor``, keeping dtypes.

    A factor of 1 returns them bit for bit.
    """

    def scale(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        wide = leaf.astype(accumulator_dtype(leaf.dtype))
        by = jnp.asarray(factor, real_dtype(wide.dtype))
        # Times a complex 1, an infinite part would make the other part NaN.
        parts = jnp.iscomplexobj(wide)
        scaled = jax.lax.complex(wide.real * by, wide.imag * by) if parts else wide * by
        # A product would flush subnormal numbers to zero and quieten NaNs.
        return jnp.where(factor == 1, leaf, scaled.astype(leaf.dtype))

    return map_inexact(scale, tree)


def select_leaves(tree: PyTree, selected: Sequence[bool]) -> PyTree:
    """Return ``tree`` with ``optax.MaskedNode()`` in place of what is not selected."""
    leaves, structure = jax.tree.flatten(tree)
    kept = [
        leaf if wanted else optax.MaskedNode()
        for leaf, wanted in zip(leaves, selected, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def merge_leaves(tree: PyTree, frozen: PyTree, selected: Sequence[bool]) -> PyTree:
    """Return ``frozen`` with the leaves of ``tree`` where ``selected`` says so."""
    leaves, structure = jax.tree.flatten(frozen)
    trained = iter(jax.tree.leaves(tree))
    merged = [
        next(trained) if wanted else leaf
        for leaf, wanted in zip(leaves, selected, strict=True)
    ]
    return jax.tree.unflatten(structure, merged)


def negative_zeros(shapes: PyTree, like: PyTree) -> PyTree:
    """Return updates of the given ``shapes`` that leave every parameter bit for bit."""

    def zero(shape: PyTree, leaf: PyTree) -> PyTree:
        if not is_inexact(shape):
            return leaf
        return -jnp.zeros_like(leaf, jax.dtypes.canonicalize_dtype(shape.dtype))

    return jax.tree.map(zero, shapes, like)


def increment(step: jax.Array) -> jax.Array:
    """Return ``step + 1``, or ``step`` where that would be too large for its dtype."""
    return jnp.asarray(optax.safe_increment(step))


def keep_dtypes(new: PyTree, old: PyTree) -> PyTree:
    """Return the state ``new`` in the dtypes of ``old``; random keys stay."""

    def keep(leaf: jax.Array, before: object) -> jax.Array:
        dtype = getattr(before, "dtype", None)
        if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
            return leaf
        return jax.lax.convert_element_type(leaf, dtype)

    return jax.tree.map(keep, new, old)


def inexact_only(tree: PyTree) -> PyTree:
    """Return ``tree`` with ``optax.MaskedNode()`` in place of what is not inexact."""
    return select_leaves(tree, [is_inexact(leaf) for leaf in jax.tree.leaves(tree)])


def with_variables(updates: PyTree, params: PyTree) -> Pairs:
    """Return the inexact leaves of ``updates``, each with its parameter."""
    variables = jax.tree.leaves(jax.tree.map(lambda _, v: v, updates, params))
    pairs = zip(jax.tree.leaves(updates), variables, strict=True)
    return [(gradient, v) for gradient, v in pairs if is_inexact(gradient)]


def merge_inexact(new: PyTree, tree: PyTree) -> PyTree:
    """Return ``tree`` with the leaves of ``new`` in place of its inexact ones."""
    return merge_leaves(new, tree, [is_inexact(leaf) for leaf in jax.tree.leaves(tree)])


def is_transformation(value: object) -> TypeGuard[optax.GradientTransformation]:
    """Tell whether ``value`` is an instance with ``init`` and ``update``."""
    return not isinstance(value, type) and all(
        callable(getattr(value, name, None)) for name in ("init", "update")
    )

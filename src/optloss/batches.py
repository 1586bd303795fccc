"""The batch among a step's arguments, taken apart into slices of examples.

Which arrays hold examples, and along which axis, is told by ``in_axes``. A slice is
every n-th example, not a run of neighbours: where the examples are spread over the
devices of a mesh, each device then has its share of every slice, and no example moves.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import jax
import jax.numpy as jnp

from optloss.messages import argument_error, short_repr
from optloss.typing import PyTree

InAxes: TypeAlias = int | Sequence[PyTree] | None
Arguments: TypeAlias = tuple[tuple[PyTree, ...], dict[str, PyTree]]


class Leaf(NamedTuple):
    """One leaf of a step's arguments, and how it is split."""

    words: str  # its name, dtype and shape
    value: PyTree
    axis: int | None  # the axis of the examples; None: not split
    is_key: bool  # a single key, which is split into several; its axis is 0

    def stack(self, steps: int, keys: int) -> Self:
        """Return the leaf as slices, ``[n, *shape]`` as ``[n / steps, steps, *shape]``.

        A single key becomes an array of ``keys`` of them first.
        """
        if self.axis is None:
            return self
        array = jnp.asarray(self.value)
        array = jax.random.split(array, keys) if self.is_key else array
        before, behind = array.shape[: self.axis], array.shape[self.axis + 1 :]
        each = array.shape[self.axis] // steps
        return self._replace(value=array.reshape(*before, each, steps, *behind))

    def pick(self, i: jax.Array) -> PyTree:
        """Return slice ``i`` of what :meth:`stack` returned."""
        # A scan over slices along axis 0 would need a transposed copy of the batch.
        if self.axis is None:
            return self.value
        return jax.lax.dynamic_index_in_dim(
            self.value, i, self.axis + 1, keepdims=False
        )

    def batch_of_one(self, value: PyTree) -> PyTree:
        """Return one example of the leaf with an axis for examples; a key has none."""
        if self.axis is None or self.is_key:
            return value
        return jnp.expand_dims(value, self.axis)


class Batch(NamedTuple):
    """The arguments of a step, leaf by leaf."""

    structure: Any  # of args and kwargs
    leaves: list[Leaf]
    size: int | None  # examples; None where no array holds any
    words: str  # the first array that does


def check_in_axes(call: str, in_axes: InAxes) -> None:
    """Refuse what is no axis, no ``None`` and no tuple of trees of these."""
    single = not isinstance(in_axes, (tuple, list))
    axes = [in_axes] if single else jax.tree.leaves(in_axes)
    if not all(type(axis) is int or axis is None for axis in axes):
        raise argument_error(
            call,
            "in_axes",
            in_axes,
            "must be an int, None, or a tuple with one of these, or a tree of these, "
            "for each positional argument, as in jax.vmap.",
        )


def check_divides(call: str, argument: str, number: int, data: Batch) -> None:
    """Refuse a ``number`` that does not divide the examples."""
    if data.size is not None and data.size % number:
        raise argument_error(
            call,
            argument,
            number,
            f"does not divide the number of examples, {data.size}: {data.words}. "
            "Choose a divisor.",
        )


def take_apart(call: str, in_axes: InAxes, arguments: Arguments) -> Batch:
    """Return the batch among the ``args`` and ``kwargs`` of a step.

    A tuple of ``in_axes`` speaks of ``args``, and ``kwargs`` are split along axis 0.
    """
    found, structure = jax.tree.flatten_with_path(arguments, is_leaf=_is_none)
    axes = _axis_of_each(call, in_axes, arguments)
    leaves = [_leaf(call, *pair, axis) for pair, axis in zip(found, axes, strict=True)]
    sizes = [
        (leaf.value.shape[leaf.axis], leaf.words)
        for leaf in leaves
        if leaf.axis is not None and not leaf.is_key
    ]
    size, words = sizes[0] if sizes else (None, "")
    for other_size, other in sizes:
        if other_size != size:
            raise ValueError(
                f"{call}: the arrays to split differ in the number of examples, {size} "
                f"and {other_size}: {words} and {other}. Give None in in_axes to what "
                "is no batch."
            )
    return Batch(structure, leaves, size, words)


def _axis_of_each(call: str, in_axes: InAxes, arguments: Arguments) -> list[int | None]:
    prefix = (tuple(in_axes), 0) if isinstance(in_axes, (tuple, list)) else in_axes
    try:
        axes = jax.tree.broadcast(prefix, arguments, is_leaf=_is_none)
    except ValueError as error:
        raise argument_error(
            call,
            "in_axes",
            in_axes,
            f"does not fit the {len(arguments[0])} positional arguments after params "
            "and model_state. Give an axis or None, or a tree of these, for each.",
        ) from error
    return jax.tree.leaves(axes, is_leaf=_is_none)


def _leaf(call: str, path: tuple[Any, ...], value: PyTree, axis: int | None) -> Leaf:
    side, *within = path
    name = ("args", "kwargs")[side.idx] + jax.tree_util.keystr(tuple(within))
    words, ndim = f"{name} is {short_repr(value)}", getattr(value, "ndim", 0)
    if axis is None or ndim == 0:
        is_key = axis is not None and _is_key(value)
        return Leaf(words, value, 0 if is_key else None, is_key)
    if not -ndim <= axis < ndim:
        raise ValueError(f"{call}: {words}, which has no axis {axis}. Change in_axes.")
    return Leaf(words, value, axis % ndim, is_key=False)


def _is_key(value: object) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _is_none(node: object) -> bool:
    return node is None

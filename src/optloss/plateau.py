"""The factor that ``optax.contrib.reduce_on_plateau`` puts on a learning rate.

It lies in the state of whatever optimizer has one inside, so what an update moved by is
the rate times this factor.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax.contrib import ReduceLROnPlateauState
from optax.transforms import PartitionState

from optloss.typing import PyTree


class OwnRateState(NamedTuple):
    """The state of an optimizer among others that keeps a rate of its own."""

    inner: PyTree


def plateau_scale(state: PyTree) -> jax.Array | None:
    """Return the factor of ``optax.contrib.reduce_on_plateau`` inside an optimizer.

    It is 1 where the optimizers that ``state`` is of have different ones, and ``None``
    where none has any.
    """
    factors = _plateau_factors(state)
    known = [factor for factor in factors if factor is not None]
    if not known:
        return None
    first = known[0]
    if len(known) < len(factors):
        factors = [1.0 if factor is None else factor for factor in factors]
    same = functools.reduce(operator.and_, [first == factor for factor in factors])
    return jnp.where(same, first, 1)


def _plateau_factors(state: PyTree) -> list[Any]:
    """Return, for each optimizer of a partition, the product of its scales."""
    kinds = (PartitionState, ReduceLROnPlateauState, OwnRateState)
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    own = [node for node in found if isinstance(node, ReduceLROnPlateauState)]
    scales: list[Any] = [node.scale for node in own]
    outer = functools.reduce(operator.mul, scales) if scales else None
    inner = [
        factor
        for node in found
        if isinstance(node, PartitionState)
        for member in node.inner_states.values()
        if not isinstance(getattr(member, "inner_state", None), OwnRateState)
        for factor in _plateau_factors(member)
    ]
    if outer is None:
        return inner or [None]
    return [outer if one is None else outer * one for one in inner] or [outer]

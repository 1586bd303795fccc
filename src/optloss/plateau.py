"""The factor that ``optax.contrib.reduce_on_plateau`` puts on a learning rate.

It lies in the state of whatever optimizer has one inside, so what an update moved by is
the rate times this factor.
"""

import functools
import math
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
    found = _plateau_scales(state)
    if not any(found):
        return None
    factors = [math.prod(scales) for scales in found]
    same = functools.reduce(operator.and_, [one == factors[0] for one in factors])
    return jnp.where(same, factors[0], 1)


def _plateau_scales(state: PyTree) -> list[list[Any]]:
    """Return, for each optimizer of a partition, what its rate is multiplied by."""
    kinds = (PartitionState, ReduceLROnPlateauState, OwnRateState)
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    outer = [node.scale for node in found if isinstance(node, ReduceLROnPlateauState)]
    inner = [
        scales
        for node in found
        if isinstance(node, PartitionState)
        for member in node.inner_states.values()
        if not isinstance(getattr(member, "inner_state", None), OwnRateState)
        for scales in _plateau_scales(member)
    ]
    return [outer + scales for scales in inner] or [outer]

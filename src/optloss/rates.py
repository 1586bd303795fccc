"""The base rate of a run, read and set in the middle of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from optloss.donation import clear_if_deleted
from optloss.mesh import put_like
from optloss.messages import (
    argument_error,
    check_at_least_zero,
    listing,
    nearest,
    quoted,
    refusal,
    short_repr,
)
from optloss.plateau import OwnRateState
from optloss.transforms.learning_rate import LearningRateState
from optloss.trees import own_copy
from optloss.typing import PyTree, Scalar

T = TypeVar("T")


def set_learning_rate(state: T, value: Scalar | Mapping[str, Scalar]) -> T:
    """Return ``state`` with another learning rate (before decay, where there is one).

    Nothing is compiled again: the rate is a scalar in the state, not a constant of the
    program.

    Args:
        state: A ``TrainOpState``, the state of :func:`make_optimizer`, or any tree that
            holds the state of one :func:`inject_learning_rate` or
            :func:`scale_by_learning_rate`.
        value: The new rate, a real number or 0-d array; may be traced. With groups it
            sets every base rate; a mapping from key to number sets some.

    Returns:
        A tree of the same structure, dtypes and placement. Schedules and the rates of
        instances stay as they are.

    Raises:
        ValueError: If ``value`` is no such number, the state holds no base rate (the
            optimizer was an instance, or the rate a schedule) or several without keys,
            or a key of a mapping has none.

    Example:
        >>> import jax.numpy as jnp
        >>> from optloss import make_optimizer, scale_by_learning_rate
        >>> state = scale_by_learning_rate(0.1).init(jnp.zeros(2))
        >>> print(set_learning_rate(state, 0.01).base)
        0.01
        >>> tx = make_optimizer({"head/*": 0.1, "**": 0.01}, "adam")
        >>> state = tx.init({"body": jnp.zeros(2), "head": {"bias": jnp.zeros(2)}})
        >>> state = set_learning_rate(state, {"head/*": 0.2})
        >>> print(get_learning_rate(state)["head/*"])
        0.2

    See also:
        :func:`get_learning_rate`.
    """
    nodes, structure = jax.tree.flatten(state, is_leaf=_stops)
    bases = _bases("set_learning_rate", state, nodes)
    if isinstance(value, Mapping):
        _check_keys(value, bases)
        named = {f"value[{key!r}]": rate for key, rate in value.items()}
        check_at_least_zero("set_learning_rate", **named)
        new: dict[str | None, Scalar] = dict(value.items())
    else:
        check_at_least_zero("set_learning_rate", value=value)
        new = dict.fromkeys(bases, value)
    for i, node in enumerate(nodes):
        if isinstance(node, LearningRateState):
            nodes[i] = node._replace(base=_replaced(node.base, new))
    return jax.tree.unflatten(structure, nodes)


def get_learning_rate(state: PyTree) -> jax.Array | Any:
    """Return the learning rate in ``state`` (before decay, where there is one).

    Args:
        state: As for :func:`set_learning_rate`; its arrays may be traced.

    Returns:
        A float scalar ``[]``, or with ``learning_rate`` as a mapping a dict of such
        scalars by its keys, schedules left out. They are arrays of their own, which a
        donated step does not take.

    Raises:
        ValueError: If the state holds no base rate (the optimizer was an instance, or
            the rate a schedule) or several without keys.

    Example:
        >>> import jax.numpy as jnp
        >>> from optloss import make_optimizer
        >>> state = make_optimizer(0.1, "adam").init(jnp.zeros(2))
        >>> print(get_learning_rate(state))
        0.1

    See also:
        :func:`set_learning_rate`; the summary ``learning_rate``, which is the rate
        after decay.
    """
    nodes = jax.tree.leaves(state, is_leaf=_stops)
    bases = _bases("get_learning_rate", state, nodes)
    with clear_if_deleted("get_learning_rate(state)", state):
        copies = {key: own_copy(base) for key, base in bases.items()}
    return copies.get(None, copies)


def used_rates(state: PyTree) -> dict[str, jax.Array]:
    """Return the rates of the latest update of an optimizer, by their tags."""
    if isinstance(state, LearningRateState):
        return state.measurements()
    found: dict[str, jax.Array] = {}
    for node in jax.tree.leaves(state, is_leaf=_stops):
        if isinstance(node, LearningRateState) and isinstance(node.rate, dict):
            found |= node.measurements()
    return found


def _stops(node: PyTree) -> bool:
    return isinstance(node, (LearningRateState, OwnRateState))


def _bases(call: str, state: PyTree, nodes: list[PyTree]) -> dict[str | None, Scalar]:
    """Return the base rates by key; one that is alone has the key ``None``."""
    given = f"{call}({short_repr(type(state))})"
    found: dict[str | None, Scalar] = {}
    places = [node for node in nodes if isinstance(node, LearningRateState)]
    known = [node.base for node in places if node.base is not None]
    for base in known:
        found.update(base.items() if isinstance(base, dict) else [(None, base)])
    if not found or (None in found and len(known) < len(places)):
        cure = (
            "An optimizer given as an instance keeps its own rate, and a schedule has "
            "none: give a number as learning_rate, and the optimizer by name or as a "
            "function; a rate that decays by learning_rate_decay_fn. What a schedule "
            "gave the latest update is get_summaries(state)['learning_rate']."
        )
        if callable(state):
            cure = "An op is no state: pass the one that it returned, or op.state."
        raise refusal(given, f"the state holds no base rate. {cure}")
    if None in found and len(places) > 1:
        raise refusal(
            given,
            f"the state holds {len(places)} base rates. Set them one by one in their "
            "parts of the state.",
        )
    return found


def _check_keys(value: Mapping[str, Scalar], bases: dict[str | None, Scalar]) -> None:
    if None in bases:
        problem = "the state holds one learning rate, without a key. Give a number."
        raise argument_error("set_learning_rate", "value", value, problem)
    names = [key for key in bases if key is not None]
    for key in value:
        if key not in names:
            close = nearest(str(key), names, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise argument_error(
                "set_learning_rate",
                "value",
                value,
                f"the state holds no base rate for {quoted(key)}: schedules and "
                f"instances keep their own. It holds {listing(names)}.{hint}",
            )


def _replaced(base: PyTree, new: Mapping[str | None, Scalar]) -> PyTree:
    if isinstance(base, dict):
        changed = {key: _beside(base[key], new[key]) for key in base if key in new}
        return base | changed
    return base if base is None else _beside(base, new[None])


def _beside(old: PyTree, value: Scalar) -> jax.Array:
    if hasattr(old, "get_value"):  # the Variable that an nnx.Optimizer wraps it in
        return old.replace(_beside(old.get_value(), value))
    return put_like(jnp.array(value, old.dtype, copy=True), old)

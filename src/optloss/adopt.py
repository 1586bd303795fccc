"""A state of another op made into one of this op: what fits is kept, the rest is fresh.

A new node takes over from the old node of its type, the first of a type from the first,
the second from the second, each within its stage and its group.

A count and the moments beside it belong together. So a node is kept whole or not at
all, with one exception: parameters that the old run did not train start afresh in it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optloss.mesh import is_traced, put_like
from optloss.messages import argument_error, listing
from optloss.names import leaf_names
from optloss.state_nodes import Node, Place, Reader, node_types, numbered
from optloss.trees import own_copy
from optloss.typing import PyTree

Entry = tuple[str, str]  # field and parameter's name


def carry_over(
    old_opt_state: PyTree, new_opt_state: PyTree
) -> tuple[PyTree, list[str], list[str]]:
    """Return ``new_opt_state`` with all of ``old_opt_state`` that fits it.

    For a chain that is changed in mid-run: a layer unfrozen, a clip added, another
    optimizer. Moments are matched by the parameter's name and shape, packed or not. A
    count stays with its moments: if an optimizer's moments do not fit, it starts
    afresh as a whole.

    Args:
        old_opt_state: A state of :func:`make_optimizer` or of any optax chain, or the
            nested dicts and lists that a checkpointer made of one.
        new_opt_state: What ``init`` of the new chain returned.

    Returns:
        The state, in the structure of ``new_opt_state`` and without a buffer of
        either; the names of the leaves that were kept, and of those that are fresh.

    Raises:
        ValueError: If the old state is packed and does not say which parameters are.

    Note:
        The base learning rate is kept only under the same optimizer. A ``UserWarning``
        says which parameters are newly trained under a count that has moved on: with
        Adam's bias correction their first steps are up to six times too long.

    Example:
        >>> import jax.numpy as jnp, optloss
        >>> params = {"w": jnp.ones(2)}
        >>> old = optloss.make_optimizer(0.1, "adam")
        >>> _, state = old.update(params, old.init(params), params)
        >>> new = optloss.make_optimizer(0.1, "adam", clip_gradients=1.0)
        >>> state, kept, fresh = carry_over(state, new.init(params))
        >>> kept[-2:], fresh[0]
        (['optimizer/inner/0/mu/w', 'optimizer/inner/0/nu/w'], 'clip/step')

    See also:
        :meth:`TrainOp.adopt`, for the state of a training op.
    """
    return carry("carry_over", old_opt_state, new_opt_state, set())


def carry(
    call: str, old: PyTree, new: PyTree, containers: set[type]
) -> tuple[PyTree, list[str], list[str]]:
    """Do what :func:`carry_over` says, in the words of ``call``.

    ``containers`` are the named tuples among the parameters' own containers.
    """
    old_leaves, old_tree = numbered(old)
    new_leaves, new_tree = numbered(new)
    kinds: set[frozenset[str]] = set()
    if not node_types(old_tree) - containers:
        kinds = {frozenset(kind._fields) for kind in node_types(new_tree) - containers}
    before, after = (
        list(Reader(call, leaves, kinds, containers).nodes(tree))
        for leaves, tree in ((old_leaves, old_tree), (new_leaves, new_tree))
    )
    kept: dict[Place, Any] = {}
    names: tuple[list[str], list[str]] = [], []
    for node, olds in zip(after, _candidates(before, after), strict=True):
        taken = _taken(node, olds, old_leaves)
        for entry, place in node.entries.items():
            name = "/".join(filter(None, (node.path, *entry)))
            names[entry not in taken].append(name)
            if entry in taken:
                kept[place] = _read(old_leaves, taken[entry])
        _warn_of_newly_trained(call, node, taken, old_leaves)
    made = _written(new_leaves, kept, [p for n in after for p in n.entries.values()])
    return jax.tree.unflatten(jax.tree.structure(new), made), *names


def adopt_state(init: Callable[..., Any], old: Any, params: PyTree) -> Any:
    """Return the state of ``init`` with all of the state ``old`` that fits it."""
    call = "train_op.adopt"
    fields = old if isinstance(old, Mapping) else getattr(old, "_asdict", dict)()
    if not {"params", "opt_state"} <= set(fields):
        raise argument_error(
            call,
            "old_state",
            old,
            "must be a TrainOpState, or the dict with its fields that a checkpointer "
            "made of one. For the state of a chain alone there is "
            "optloss.carry_over(old_opt_state, state.opt_state).",
        )
    params = _adopted_params(fields["params"], params)
    fresh = init(params, fields.get("model_state"))
    containers = node_types(params)
    opt_state, *_ = carry(call, fields["opt_state"], fresh.opt_state, containers)
    average, old_average = fresh.average, fields.get("average")
    if average is not None and old_average is not None:
        average, *_ = carry(call, old_average, average, containers)
    step, old_step = fresh.step, fields.get("step")
    if step is not None and old_step is not None:
        step = _beside(old_step, step)
    return fresh._replace(step=step, opt_state=opt_state, average=average)


def _adopted_params(old: PyTree, params: PyTree) -> PyTree:
    """Return ``params`` with the values of ``old`` under the same name and shape."""
    if params is None:
        return old
    known = dict(zip(leaf_names(old), jax.tree.leaves(old), strict=True))
    leaves, structure = jax.tree.flatten(params)
    for i, (name, leaf) in enumerate(zip(leaf_names(params), leaves, strict=True)):
        if name in known and jnp.shape(known[name]) == jnp.shape(leaf):
            leaves[i] = known[name]
    return jax.tree.unflatten(structure, leaves)


# Matching


def _candidates(before: list[Node], after: list[Node]) -> Iterator[list[Node]]:
    """Yield, for each new node, the old nodes it may take over from."""
    places = _ordinals(before)
    for node, ordinal in zip(after, _ordinals(after), strict=True):
        yield [
            old
            for old, place in zip(before, places, strict=True)
            if old.kind == node.kind
            and place == ordinal
            and (old.stage == node.stage or not (old.stage and node.stage))
        ]


def _ordinals(nodes: list[Node]) -> list[int]:
    """Return how many of the same kind, stage and group stand in front of each."""
    seen: dict[Any, int] = {}
    found = []
    for node in nodes:
        key = node.kind, node.stage, node.group
        found.append(seen.get(key, 0))
        seen[key] = found[-1] + 1
    return found


def _taken(node: Node, olds: list[Node], leaves: list[Any]) -> dict[Entry, Place]:
    """Return what ``node`` takes over, from groups that have the same counts."""
    found = [(old, _matches(node, old)) for old in olds if _same_optimizer(node, old)]
    found.sort(key=lambda pair: (-len(pair[1]), pair[0].group != node.group))
    if not found:
        return {}
    first = found[0][0]
    taken: dict[Entry, Place] = {}
    for old, matches in found:
        if old is first or _same_scalars(first, old, leaves):
            taken = matches | taken
    return taken


def _same_optimizer(node: Node, old: Node) -> bool:
    """Tell whether a base learning rate in ``old`` may go on in ``node``."""
    ours, theirs = ({field for field, _ in side.entries} for side in (node, old))
    return "base" not in ours or (ours == theirs and node.below == old.below)


def _matches(node: Node, old: Node) -> dict[Entry, Place]:
    ours, theirs = node.names, old.names
    if not _fit(ours.get("", {}), theirs.get("", {})):
        return {}
    alike = [name for name in ours if name in theirs and _fit(ours[name], theirs[name])]
    if any(ours) and not any(alike):
        return {}
    names = {*alike, ""} & set(ours)
    return {(field, n): place for n in names for field, place in theirs[n].items()}


def _fit(ours: Mapping[str, Place], theirs: Mapping[str, Place]) -> bool:
    shapes = [{field: p.shape for field, p in side.items()} for side in (ours, theirs)]
    return shapes[0] == shapes[1]


def _same_scalars(one: Node, other: Node, leaves: list[Any]) -> bool:
    for field, place in one.names.get("", {}).items():
        values = leaves[place.leaf], leaves[other.entries[field, ""].leaf]
        if any(map(is_traced, values)) or not np.array_equal(*values):
            return False
    return True


def _warn_of_newly_trained(
    call: str, node: Node, taken: Mapping[Entry, Place], leaves: list[Any]
) -> None:
    """Warn of parameters whose moments start at 0 under a count that does not."""
    counts = [taken[f, n] for f, n in taken if f in ("count", "step") and not n]
    new = {name for _, name in node.entries if name} - {name for _, name in taken}
    moments = {field for field, name in node.entries if name}
    if not (counts and new and len(moments) > 1):
        return
    count = leaves[counts[0].leaf]
    if is_traced(count) or np.any(np.asarray(count) > 0):
        warnings.warn(
            f"{call}: {listing(new)}, newly trained, start with fresh moments under "
            f"the count of {node.path!r}, which has moved on. Where it corrects a "
            "bias, as Adam's does, their first steps are up to six times too long: "
            "start them at a lower rate, with learning_rate_multipliers for example.",
            UserWarning,
            stacklevel=4,
        )


# Arrays


def _read(leaves: list[Any], place: Place) -> Any:
    leaf = leaves[place.leaf]
    if place.start is None:
        return leaf
    end = place.start + math.prod(place.shape)
    return leaf[place.start : end].reshape(place.shape)


def _written(
    leaves: list[Any], kept: Mapping[Place, Any], places: Iterable[Place]
) -> list[Any]:
    """Return ``leaves`` with what is kept in its place, all of them copies."""
    made = list(leaves)
    packed: dict[int, list[jax.Array]] = {}
    for place in places:
        value = kept[place] if place in kept else _read(leaves, place)
        if place.start is None:
            made[place.leaf] = value
        else:
            packed.setdefault(place.leaf, []).append(jnp.ravel(value))
    for index, pieces in packed.items():
        made[index] = jnp.concatenate(pieces, dtype=leaves[index].dtype)
    return [_beside(new, old) for new, old in zip(made, leaves, strict=True)]


def _beside(new: Any, fresh: Any) -> Any:
    copy = own_copy(new)
    dtype = getattr(fresh, "dtype", copy.dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        copy = copy.astype(dtype)  # a NumPy count may have 64 bits
    return put_like(copy, fresh)

"""The groups of a state, each an optimizer with a part of the parameters, packed.

Which part is a group's own is read off its moments, which mirror it.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
from optax.transforms import PartitionState

from optloss.fast.packing import Layout, layout_of, pack
from optloss.messages import argument_error, listing
from optloss.names import leaf_names
from optloss.trees import is_inexact, select_leaves
from optloss.typing import PyTree


class Group(NamedTuple):
    """One optimizer of several."""

    key: str
    members: list[bool]  # which of the trained leaves it moves


def pack_groups(
    optimizer: PyTree, trained: PyTree, size: int, unpacked: Sequence[str]
) -> tuple[PyTree, Layout] | None:
    """Return the state with its groups packed, and where; ``None`` without groups."""
    groups = _groups_of(optimizer, trained, size, unpacked)
    if not groups:
        return None
    parts = [select_leaves(trained, group.members) for group in groups]
    layouts = [layout_of(part, size) for part in parts]
    turn = iter(zip(parts, layouts, strict=True))

    def packed(key: str, state: PyTree) -> PyTree:
        part, layout = next(turn)
        return state if key in unpacked else pack_moments(state, part, layout)

    optimizer = _map_groups(packed, optimizer, unpacked)
    in_order = sorted(
        (group.members.index(True), i)
        for i, group in enumerate(groups)
        if group.key not in unpacked and any(group.members)
    )
    vectors = [layouts[i].items() for _, i in in_order]
    return optimizer, {key: slots for some in vectors for key, slots in some}


def pack_moments(state: PyTree, params: PyTree, layout: Layout) -> PyTree:
    """Return ``state`` with every tree that mirrors ``params`` packed."""
    mirrors = mirrors_of(params)
    return jax.tree.map(
        lambda node: pack(node, layout) if mirrors(node) else node,
        state,
        is_leaf=mirrors,
    )


def mirrors_of(params: PyTree) -> Callable[[PyTree], bool]:
    """Return a function that tells whether a tree has the shapes of ``params``."""
    shapes = _shapes_of(params)
    return lambda node: _shapes_of(node) == shapes


def _shapes_of(tree: PyTree) -> tuple[Hashable, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, *(is_inexact(leaf) and leaf.shape for leaf in leaves)


def _groups_of(
    optimizer: PyTree, trained: PyTree, size: int, unpacked: Sequence[str]
) -> list[Group]:
    """Return the groups in the order in which :func:`_map_groups` meets them."""
    found: list[Group] = []

    def look(key: str, state: PyTree) -> PyTree:
        found.append(Group(key, _members(state, trained)))
        return state

    _map_groups(look, optimizer, unpacked)
    keys = [group.key for group in found]
    if strangers := set(unpacked) - set(keys):
        known = listing(keys) or "none"
        problem = f"the state has no group {listing(strangers)} but {known}."
        raise argument_error("pack_state", "size", size, problem)
    silent = [i for i, group in enumerate(found) if not any(group.members)]
    if len(silent) > 1 and not {keys[i] for i in silent} <= set(unpacked):
        raise argument_error(
            "pack_state",
            "size",
            size,
            f"the groups {listing(keys[i] for i in silent)} have no moments of the "
            "shapes of these parameters, so which are theirs is not known. Pass the "
            "params and variables of the run; if its optimizers keep no moments, use "
            "carry_over or train_op.adopt of the run that is to go on.",
        )
    for i in silent:  # all that is no other's
        others = zip(*(group.members for group in found), strict=True)
        found[i] = found[i]._replace(members=[not any(column) for column in others])
    return found


def _members(state: PyTree, trained: PyTree) -> list[bool]:
    """Return which leaves of ``trained`` the moments in ``state`` belong to."""
    names = leaf_names(trained)

    def members(node: PyTree) -> list[bool]:
        found = set(leaf_names(node))
        return [name in found for name in names]

    def mirrors(node: PyTree) -> bool:
        return mirrors_of(select_leaves(trained, members(node)))(node)

    nodes = jax.tree.leaves(state, is_leaf=mirrors)
    parts = [members(node) for node in nodes if mirrors(node)]
    return [any(column) for column in zip(*parts, strict=True)] or [False] * len(names)


def _map_groups(
    fn: Callable[[str, PyTree], PyTree], optimizer: PyTree, whole: Sequence[str]
) -> PyTree:
    """Apply ``fn(key, state)`` to each optimizer, of those at each of several rates.

    What is inside of those in ``whole`` is not looked at: an optimizer may be made of
    groups itself.
    """

    def inside(key: str, state: PyTree) -> PyTree:
        nodes = jax.tree.leaves(state, is_leaf=_is_partition)
        if key in whole or not any(map(_is_partition, nodes)):
            return fn(key, state)
        return _map_groups(fn, state, whole)

    def mapped(node: PyTree) -> PyTree:
        if not _is_partition(node):
            return node
        return node._replace(
            inner_states={key: inside(key, s) for key, s in node.inner_states.items()}
        )

    return jax.tree.map(mapped, optimizer, is_leaf=_is_partition)


def _is_partition(node: object) -> bool:
    return isinstance(node, PartitionState)

"""The nodes of a state: the named tuples that transforms keep, and what is in them.

A node holds scalars, such as a count, and trees that mirror the parameters, such as
moments. Each array is addressed by node, field and parameter, and whether it lies by
itself or in a packed vector.

Checkpointers that are given no target return nested dicts and lists. There, a dict is
the node whose fields are its keys, and a tuple is whatever has the keys 0, 1, ....
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optloss.fast.packing import Layout, is_packed, read_table
from optloss.mesh import is_traced
from optloss.names import leaf_names
from optloss.trees import children, is_masked
from optloss.typing import PyTree

Kind = type | frozenset[str] | str


class Place(NamedTuple):
    """Where an array is: a leaf of the state's tree, or a slice of a packed one."""

    leaf: int
    shape: tuple[int, ...]
    start: int | None = None  # None for a leaf by itself


class Node(NamedTuple):
    """A named tuple of a state: its scalars, and its trees over the parameters."""

    kind: Kind  # its type, or its fields where one side has no types
    path: str
    stage: str
    group: tuple[str, ...]
    entries: dict[tuple[str, str], Place]  # by field and name within it, "" for alone
    below: tuple[Kind, ...]  # the kinds of all nodes inside

    @property
    def names(self) -> dict[str, dict[str, Place]]:
        """The entries by name, and in it by field."""
        by_name: dict[str, dict[str, Place]] = {}
        for (field, name), place in self.entries.items():
            by_name.setdefault(name, {})[field] = place
        return by_name


def numbered(tree: PyTree) -> tuple[list[PyTree], PyTree]:
    """Return the leaves of ``tree``, and it with their numbers in their places."""
    leaves, structure = jax.tree.flatten(tree)
    return leaves, jax.tree.unflatten(structure, range(len(leaves)))


def _is_named_tuple(node: object) -> bool:
    return (
        isinstance(node, tuple)
        and hasattr(node, "_fields")
        and not (is_packed(node) or is_masked(node))
    )


def node_types(tree: PyTree) -> set[Any]:
    """Return the types of the nodes in ``tree``."""
    found: set[Any] = {type(tree)} if _is_named_tuple(tree) else set()
    if not jax.tree_util.all_leaves([tree]):
        found = found.union(*map(node_types, children(tree).values()))
    return found - {optax.EmptyState}


class Reader(NamedTuple):
    """How to read the numbered tree of one state."""

    call: str
    leaves: list[PyTree]
    kinds: set[frozenset[str]]  # the fields of nodes, where a side has no types
    containers: set[Any]

    def fields(self, node: PyTree) -> dict[str, PyTree] | None:
        """Return the fields of a node, ``None`` of what is none."""
        if _is_named_tuple(node):
            return None if type(node) in self.containers else children(node)
        if isinstance(node, Mapping) and frozenset(map(str, node)) in self.kinds:
            return children(node)
        return None

    def holds_nodes(self, tree: PyTree) -> bool:
        """Tell whether a node is anywhere in ``tree``."""
        if self.fields(tree) is not None:
            return True
        if jax.tree_util.all_leaves([tree]) or is_packed(tree):
            return False
        return any(map(self.holds_nodes, children(tree).values()))

    def nodes(
        self,
        tree: PyTree,
        path: str = "",
        stage: str = "",
        group: tuple[str, ...] = (),
        table: Layout | None = None,
    ) -> Iterator[Node]:
        """Yield the nodes of ``tree``, an outer one before those inside."""
        fields = self.fields(tree)
        if fields is None and not self.holds_nodes(tree):
            entries = self.entries("", tree, table)
            if entries:
                yield Node("values", path, stage, group, entries, ())
            return
        is_chain = False
        if fields is not None and {"noise", "clip", "optimizer"} <= set(fields):
            is_chain = True
            table = self.table(fields.pop("packed", None))
        of_groups = fields is None and isinstance(tree, Mapping) and not _is_tuple(tree)
        inside: list[Node] = []
        entries = {}
        for key, child in (fields or children(tree)).items():
            if fields is not None and not self.holds_nodes(child):
                entries |= self.entries(key, child, table)
                continue
            inside += self.nodes(
                child,
                f"{path}/{key}" if path else key,
                key if is_chain else stage,
                (*group, key) if of_groups else group,
                table,
            )
        # A tree without types has nothing where another has an EmptyState.
        is_told = not (self.kinds and type(tree) is optax.EmptyState)
        if fields is not None and is_told:
            kind = frozenset(children(tree)) if self.kinds else type(tree)
            below = tuple(node.kind for node in inside)
            yield Node(kind, path, stage, group, entries, below)
        yield from inside

    def table(self, index: PyTree) -> Layout | None:
        """Return what the table of packed names says."""
        if not jax.tree_util.all_leaves([index]):
            return None
        table = self.leaves[index]
        if is_traced(table):
            raise ValueError(
                f"{self.call}: which parameters are packed is read from the state, so "
                "a packed state cannot be traced here. Call it outside of jit."
            )
        return read_table(table)

    def entries(
        self, field: str, value: PyTree, table: Layout | None
    ) -> dict[tuple[str, str], Place]:
        """Return where the arrays of a field are, packed ones each by itself."""
        found = {}
        nodes, structure = jax.tree.flatten(value, is_leaf=is_packed)
        names = leaf_names(jax.tree.unflatten(structure, range(len(nodes))))
        for name, node in zip(names, nodes, strict=True):
            if not is_packed(node):
                found[field, name] = Place(node, np.shape(self.leaves[node]))
                continue
            for inner, place in self.unpacked(node, table):
                found[field, "/".join(filter(None, (name, inner)))] = place
        return found

    def unpacked(
        self, packed: PyTree, table: Layout | None
    ) -> Iterator[tuple[str, Place]]:
        """Yield name and place of what lies in a packed tree."""
        vectors, large = children(packed)["vectors"], children(packed)["large"]
        for key, index in vectors.items():
            slots = None if table is None else table.get(key)
            size = np.size(self.leaves[index])
            if slots is None or sum(slot.size for slot in slots) != size:
                raise ValueError(
                    f"{self.call}: the state holds packed parameters without their "
                    "names, so whose moments they are is not known. Unpack it first "
                    "with unpack_state, where it was packed."
                )
            start = 0
            for slot in slots:
                yield slot.name, Place(index, slot.shape, start)
                start += slot.size
        for name, index in zip(leaf_names(large), jax.tree.leaves(large), strict=True):
            yield name, Place(index, np.shape(self.leaves[index]))


def _is_tuple(node: Mapping[str, PyTree]) -> bool:
    return [str(key) for key in node] == [str(i) for i in range(len(node))]

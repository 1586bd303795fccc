"""A state of a run without packing turned into one of a run with it, and back.

Both directions are told how the state was, or is to be, packed. What does not fit the
state is refused: a vector cut at other places would give each parameter the moments of
its neighbours, without a word.
"""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp

from optloss.fast.packed_groups import mirrors_of, pack_groups, pack_moments
from optloss.fast.packing import (
    Layout,
    PackedTree,
    layout_of,
    pack,
    read_table,
    table_of,
    unpack,
)
from optloss.mesh import is_traced
from optloss.messages import argument_error, check_int, listing
from optloss.names import as_patterns, leaf_names, select, text_of
from optloss.trees import select_leaves
from optloss.typing import Pattern, PyTree, Variables


def unpack_state(
    state: PyTree, params: PyTree, size: int, *, variables: Variables = None
) -> PyTree:
    """Return the state of a run with ``pack_small_leaves=size`` as it is without.

    Args:
        state: A ``TrainOpState`` or the state of :func:`make_optimizer`.
        params: The parameters of the run; shapes are enough.
        size: The ``pack_small_leaves`` the state was made with.
        variables: The ``variables`` it was made with.

    Returns:
        The same state with ordinary leaves in place of packed vectors.

    Raises:
        ValueError: If ``size`` is no int >= 0, or the state was packed at another size,
            with other ``variables`` or for other parameters.

    Example:
        >>> import jax, jax.numpy as jnp, optloss
        >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
        >>> packed = optloss.make_optimizer(0.1, "adam", pack_small_leaves=4)
        >>> plain = optloss.make_optimizer(0.1, "adam")
        >>> state = unpack_state(packed.init(params), params, 4)
        >>> jax.tree.structure(state) == jax.tree.structure(plain.init(params))
        True

    See also:
        :func:`pack_state`, the other way; :func:`carry_over`, which does without being
        told.
    """
    trained, layout = _trained("unpack_state", state, params, size, variables)

    tables: list[Layout] = []

    def unpacked(node: PyTree) -> PyTree:
        if _has_table(node):
            if node.packed is not None and not is_traced(node.packed):
                tables.append(read_table(node.packed))
                # Groups may have left some leaves unpacked.
                if not _names_and_shapes(tables[0]) <= _names_and_shapes(layout):
                    raise _packed_otherwise(size, layout)
            inside = node._replace(packed=None)
            return jax.tree.map(
                unpacked, inside, is_leaf=lambda n: n is not inside and _is_special(n)
            )
        if not isinstance(node, PackedTree):
            return node
        part, its = trained, layout
        if tables:
            part, its = _part_of(node, trained, tables[0], size)
        wanted = jax.eval_shape(lambda tree: pack(tree, its), part)
        if _named(node) != _named(wanted):
            raise _packed_otherwise(size, its)
        return unpack(node, part, its)

    return jax.tree.map(unpacked, state, is_leaf=_is_special)


def pack_state(
    state: PyTree,
    params: PyTree,
    size: int,
    *,
    variables: Variables = None,
    unpacked_groups: Pattern | Collection[Pattern] = (),
) -> PyTree:
    """Return the state of a run without packing as it is with it.

    Args:
        state: A ``TrainOpState`` or the state of :func:`make_optimizer`.
        params: The parameters of the run; shapes are enough.
        size: The ``pack_small_leaves`` of the run that is to go on from it.
        variables: The ``variables`` it was made with.
        unpacked_groups: Of several optimizers, the keys of those that look at whole
            leaves, as Muon does: they are never packed, and the state does not tell.

    Returns:
        The same state with every tree that mirrors the trained parameters, or a group
        of them, packed. The ``params`` of a ``TrainOpState`` stay as they are.

    Raises:
        ValueError: If ``size`` is no int >= 0, the state is none of these, it is packed
            already or of other parameters, it has no group of such a key, or it has
            several groups without moments, whose parameters it does not tell.

    Example:
        >>> import jax, jax.numpy as jnp, optloss
        >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
        >>> packed = optloss.make_optimizer(0.1, "adam", pack_small_leaves=4)
        >>> plain = optloss.make_optimizer(0.1, "adam")
        >>> state = pack_state(plain.init(params), params, 4)
        >>> jax.tree.structure(state) == jax.tree.structure(packed.init(params))
        True

    See also:
        :func:`unpack_state`, the other way; :func:`carry_over`, which does without
        being told.
    """
    trained, layout = _trained("pack_state", state, params, size, variables)
    keys = as_patterns("pack_state", "unpacked_groups", unpacked_groups)
    stays = list(map(text_of, keys))
    if not size:
        return state

    def packed(node: PyTree) -> PyTree:
        if isinstance(node, PackedTree) or getattr(node, "packed", None) is not None:
            problem = "the state is packed already."
            raise argument_error("pack_state", "size", size, problem)
        if not _has_table(node):
            return node
        grouped = pack_groups(node.optimizer, trained, size, stays)
        if grouped is not None:
            optimizer, lies = grouped
            return node._replace(optimizer=optimizer, packed=table_of(lies))
        _check_mirrored(node.optimizer, trained, size)
        return pack_moments(node, trained, layout)._replace(packed=table_of(layout))

    if not any(map(_is_special, jax.tree.leaves(state, is_leaf=_is_special))):
        problem = "must be a TrainOpState, or hold the state of a make_optimizer."
        raise argument_error("pack_state", "state", state, problem)
    return jax.tree.map(packed, state, is_leaf=_is_special)


def unpack_moments(
    moments: PyTree, trained: PyTree, table: Layout, size: int
) -> PyTree:
    """Return ``moments`` of ``trained``, or of a group of them, unpacked if need be."""
    if not isinstance(moments, PackedTree):
        return moments
    return unpack(moments, *_part_of(moments, trained, table, size))


def _part_of(
    packed: PackedTree, trained: PyTree, table: Layout, size: int
) -> tuple[PyTree, Layout]:
    """Return the part of ``trained`` that ``packed`` mirrors, and its layout.

    It is all of it where there is one optimizer. A group has a part alone.
    """
    slots = [slot for key in packed.vectors for slot in table.get(key, ())]
    names = {slot.name for slot in slots} | set(leaf_names(packed.large))
    part = select_leaves(trained, [name in names for name in leaf_names(trained)])
    return part, layout_of(part, size)


def _has_table(node: object) -> bool:
    return {"optimizer", "packed"} <= set(getattr(node, "_fields", ()))


def _is_special(node: object) -> bool:
    return isinstance(node, PackedTree) or _has_table(node)


# Refusals


def _trained(
    call: str, state: PyTree, params: PyTree, size: int, variables: Variables
) -> tuple[PyTree, Layout]:
    check_int(call, "size", size, 0, "an int >= 0: the largest size of a packed leaf.")
    if hasattr(state, "opt_state") and _named(state.params) != _named(params):
        raise argument_error(
            call,
            "size",
            size,
            "the params given are not those of the state, in names or shapes. Pass "
            "state.params.",
        )
    trained = select_leaves(params, select(call, variables, params))
    return trained, layout_of(trained, size) if size else {}


def _named(tree: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    shapes = (tuple(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))
    return list(zip(leaf_names(tree), shapes, strict=True))


def _check_mirrored(optimizer: PyTree, trained: PyTree, size: int) -> None:
    """Refuse moments none of which has the shapes of the parameters."""
    mirrors = mirrors_of(trained)
    nodes = jax.tree.leaves(optimizer, is_leaf=mirrors)
    if not any(map(mirrors, nodes)) and any(jnp.ndim(node) for node in nodes):
        raise argument_error(
            "pack_state",
            "size",
            size,
            "no moments in this state have the names and shapes of the trained "
            "parameters. Pass the params and variables it was made with.",
        )


def _names_and_shapes(layout: Layout) -> set[tuple[str, tuple[int, ...]]]:
    return {(slot.name, slot.shape) for slots in layout.values() for slot in slots}


def _packed_otherwise(size: int, layout: Layout) -> ValueError:
    names = [slot.name for slots in layout.values() for slot in slots]
    return argument_error(
        "unpack_state",
        "size",
        size,
        "the state was packed otherwise: this size, params and variables would pack "
        f"{listing(names) or 'nothing'}. Pass those it was made with.",
    )

"""Whose a state is: compared, by structure and shapes, with what its op would start.

A state of another op often runs on in silence: a clip that was removed reports its last
values for ever, moments of another shape are broadcast. Dtypes and weak types are not
compared, nor where arrays lie: parameters may turn to bfloat16 in mid-run, and a
restored state may be of NumPy's arrays. Under ``vmap`` and ``shard_map`` the shapes are
those that the traced code sees, of the state and of the parameters alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.messages import short_repr
from optloss.stages import ChainState
from optloss.trees import children, is_masked
from optloss.typing import PyTree

ABSENT = object()


class Difference(NamedTuple):
    """The first place where two trees are not alike."""

    path: str
    found: PyTree
    wanted: PyTree


def check_state(
    call: str,
    state: PyTree,
    start: Callable[[PyTree], PyTree],
    params: PyTree,
    cure: str,
) -> None:
    """Refuse ``state`` unless it is alike to what ``start`` makes of ``params``.

    A ``start`` that cannot be traced, or makes something else each time, tells nothing.
    """
    try:
        found, expected = parts(state), parts(jax.eval_shape(start, params))
        if difference(found, expected) is None:
            return
        # A function of its own: of one that it knows JAX tells what it told before.
        again = parts(jax.eval_shape(lambda tree: start(tree), params))
        if difference(expected, again) is not None:
            return
    except Exception:  # an optimizer of the user's own may fail in any way
        return
    for part in {**expected, **found}:
        check_part(call, part, found.get(part), expected.get(part), cure)


def check_part(call: str, part: str, found: PyTree, wanted: PyTree, cure: str) -> None:
    """Refuse a part of a state that is not alike to the one wanted."""
    at = difference(found, wanted)
    if at is not None:
        where = f", {at.path!r}" if at.path else ""
        raise part_error(
            call, part + where, _in_words(at.found), _in_words(at.wanted), cure
        )


def part_error(call: str, part: str, found: str, wanted: str, cure: str) -> ValueError:
    """Return the error that refuses a state because of one of its parts."""
    return ValueError(
        f"{call}: this is the state of another op. Its {part}: {found}; here: {wanted}."
        f" {cure}".rstrip()
    )


def parts(state: PyTree) -> dict[str, PyTree]:
    """Return the parts of a chain's state by name, a guard in front."""
    if isinstance(state, ChainState):
        # Only whether there is packing: the table is as long as the names in it.
        packing = None if state.packed is None else ()
        return {"packing": packing, **state._replace(packed=None)._asdict()}
    if hasattr(state, "inner"):
        return {"guard": state._replace(inner=()), **parts(state.inner)}
    return {"chain": state}


def difference(found: PyTree, wanted: PyTree, path: str = "") -> Difference | None:
    """Return the first place where two trees differ in structure or shapes."""
    here = Difference(path, found, wanted)
    if found is ABSENT or wanted is ABSENT:
        return here
    if _is_array(found) and _is_array(wanted):
        return None if jnp.shape(found) == jnp.shape(wanted) else here
    if type(found) is not type(wanted):
        return here
    ours, theirs = children(found), children(wanted)
    for key in {**theirs, **ours}:
        below = f"{path}/{key}" if path else key
        at = difference(ours.get(key, ABSENT), theirs.get(key, ABSENT), below)
        if at is not None:
            return at
    return None


def _is_array(node: object) -> bool:
    return jax.tree_util.all_leaves([node])


def _in_words(node: PyTree) -> str:
    if node is ABSENT or node is None or isinstance(node, optax.EmptyState):
        return "none"
    if is_masked(node):
        return "not trained"
    return short_repr(node) if _is_array(node) else type(node).__name__

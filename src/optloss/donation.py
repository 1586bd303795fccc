"""Donation: a compiled step takes the buffers of the state it is given.

So they must not be anybody else's, and whoever uses the state again is told so.
"""

import contextlib
from collections.abc import Generator

import jax

from optloss.mesh import is_deleted, is_traced
from optloss.trees import own_copy
from optloss.typing import PyTree


def copies_of_donated(state: PyTree, arguments: PyTree) -> PyTree:
    """Return ``arguments`` with copies in place of arrays that are in ``state``."""
    donated = set(map(id, jax.tree.leaves(state)))

    def own(leaf: PyTree) -> PyTree:
        is_array = isinstance(leaf, jax.Array) and not is_traced(leaf)
        return own_copy(leaf) if is_array and id(leaf) in donated else leaf

    return jax.tree.map(own, arguments)


@contextlib.contextmanager
def clear_if_deleted(call: str, state: PyTree) -> Generator[None, None, None]:
    """Say of a ``state`` whose buffers are gone what became of them."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "deleted" in str(error) and any(map(is_deleted, jax.tree.leaves(state))):
            raise ValueError(
                f"{call}: this state was given to an earlier call, which donated its "
                "buffers. Go on from the state that call returned, or build the op "
                "with donate=False."
            ) from error
        raise

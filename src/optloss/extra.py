"""The extra arguments of an update: each transform gets those that it takes.

A training step knows more than the gradient: the ``step``, the loss as ``value``, its
gradient as ``grad``, and the loss as a function, ``value_fn``. Some transforms of optax
take some of these, and some fail if they are given one more. What is handed over is
told by the signature of the outermost ``update``; from there optax's own wrappers
forward by their rules.
"""

import functools
import inspect
from collections.abc import Callable, Mapping

import jax
import optax

from optloss.trees import is_inexact, is_masked, select_leaves
from optloss.typing import PyTree

Update = Callable[..., tuple[PyTree, PyTree]]

# They hand what they do not name to `value_fn`, whatever it is.
LINE_SEARCHES = ("scale_by_backtracking_linesearch.", "scale_by_zoom_linesearch.")


def by_signature(
    transform: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Return ``transform`` with an ``update`` that takes any extra argument."""

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        return transform.update(
            updates, state, params, **taken(transform.update, extra)
        )

    return optax.GradientTransformationExtraArgs(transform.init, update)


def taken(update: Update, extra: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return those of ``extra`` that ``update`` names, all if it has ``**kwargs``."""
    try:
        parameters = inspect.signature(update).parameters
    except (TypeError, ValueError):  # a callable that tells no signature
        return dict(extra)
    names = set(parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names |= set(extra)
        if getattr(update, "__qualname__", "").startswith(LINE_SEARCHES):
            names -= {"step"}
    return {name: value for name, value in extra.items() if name in names}


def fill_masked(trained: PyTree, params: PyTree) -> PyTree:
    """Return ``params`` with the leaves that ``trained`` has, in their own dtypes.

    ``trained`` is a tree like ``params`` with ``optax.MaskedNode()`` in some places.
    """

    def choose(leaf: PyTree, current: PyTree) -> PyTree:
        if is_masked(leaf):
            return current
        return leaf.astype(current.dtype) if is_inexact(leaf) else leaf

    return jax.tree.map(choose, trained, params, is_leaf=is_masked)


def about_trained(
    extra: Mapping[str, PyTree], selected: list[bool], params: PyTree
) -> dict[str, PyTree]:
    """Return extra arguments about all parameters as ones about those trained."""
    made = dict(extra)
    if extra.get("grad") is not None:
        made["grad"] = select_leaves(extra["grad"], selected)
    if extra.get("value_fn") is not None:
        given = extra["value_fn"]

        def value_fn(trained: PyTree, **others: PyTree) -> jax.Array:
            return given(fill_masked(trained, params), **others)

        made["value_fn"] = functools.update_wrapper(value_fn, given)
    return made

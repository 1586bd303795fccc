"""Calling the loss and the update ops, and checking what they return."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optloss.messages import quoted, refusal, short_repr, signature_of
from optloss.names import leaf_names
from optloss.trees import keep_dtypes
from optloss.typing import Loss, PyTree, UpdateOp


class Outcome(NamedTuple):
    """What the loss returned, taken apart."""

    loss: PyTree  # float []; None if apply_gradients was given none
    model_state: PyTree
    aux: PyTree


def call_loss(
    loss: Loss,
    params: PyTree,
    model_state: PyTree,
    ops_follow: bool,
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
) -> Outcome:
    """Call the loss as the contract says, and refuse a result that does not fit it.

    ``ops_follow`` tells that update ops are given, to which a loss may leave the state.
    """
    arguments = (params, *args) if model_state is None else (params, model_state, *args)
    _check_arguments(loss, arguments, kwargs, model_state is not None)
    result = loss(*arguments, **kwargs)
    value, *rest = result if type(result) is tuple and result else (result,)
    if model_state is None:
        if len(rest) > 1:
            raise refusal(
                "optimize_loss",
                f"the loss returned {len(rest) + 1} results. Without a model_state it "
                "returns loss or (loss, aux); if it has one, pass it: "
                "train_op.init(params, model_state).",
            )
    elif 1 <= len(rest) <= 2:
        new, *rest = rest
        model_state = like_before("the loss returned", new, model_state)
    elif rest or not ops_follow:
        raise refusal(
            "optimize_loss",
            f"the loss returned {len(rest) + 1} result{'s' if rest else ''}. With a "
            "model_state it returns (loss, new_model_state) or (loss, new_model_state, "
            "aux).",
        )
    aux = rest[0] if rest else None
    return Outcome(real_scalar("optimize_loss", value), model_state, aux)


def _check_arguments(
    loss: Loss,
    arguments: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
    stateful: bool,
) -> None:
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments, **kwargs)
    except TypeError as error:
        given = "params, model_state" if stateful else "params"
        count = len(arguments) - (2 if stateful else 1)
        advice = (
            "If it takes no model_state, call train_op.init(params) without one."
            if stateful
            else "If it takes a model_state, pass it: train_op.init(params, "
            "model_state)."
        )
        raise refusal(
            "optimize_loss",
            f"the loss {short_repr(loss)}{signature_of(loss)} cannot be called with "
            f"({given}) and {count} argument{'s' if count != 1 else ''} more: {error}. "
            f"{advice}",
        ) from error


def real_scalar(call: str, loss: PyTree) -> jax.Array:
    """Return the loss, a real floating scalar, as an array."""
    if isinstance(loss, float):
        loss = jnp.asarray(loss, jnp.float32)
    dtype = getattr(loss, "dtype", None)
    if dtype is None or loss.shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise refusal(
            call,
            f"the loss must be a real floating scalar, got {short_repr(loss)}. "
            f"{_cure(loss)}",
        )
    return jnp.asarray(loss)


def _cure(loss: PyTree) -> str:
    dtype = getattr(loss, "dtype", None)
    if loss is None:
        return "Does the function end without a return?"
    if isinstance(loss, (dict, list)):
        return "Return (loss, aux), with what is only looked at as aux."
    if dtype is None and not isinstance(loss, complex):
        return "Return a scalar that is computed from the parameters."
    if getattr(loss, "shape", ()) != ():
        return "Reduce it first, for example with loss.mean()."
    if jnp.iscomplexobj(loss):
        return "Return a real number of it, such as loss.real or abs(loss)."
    return "Convert what it is computed from, for example with x.astype(jnp.float32)."


def run_projection(projection: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """Return ``projection(params)`` in the dtypes of ``params``."""
    made = projection(params)
    who = f"optimize_loss(projection={short_repr(projection)})"
    structure: Any = jax.tree.structure(made)
    if structure != jax.tree.structure(params):
        raise refusal(
            who,
            f"it returned {structure}, not the structure of the trained parameters, "
            f"{jax.tree.structure(params)}.",
        )
    for name, new, old in zip(
        leaf_names(params), *map(jax.tree.leaves, (made, params)), strict=True
    ):
        if jnp.shape(new) != jnp.shape(old):
            raise refusal(
                who,
                f"it returned {short_repr(new)} for {quoted(name)}, which is "
                f"{short_repr(old)}. Keep the shape.",
            )
    return keep_dtypes(made, params)


def run_update_ops(
    ops: Sequence[UpdateOp], model_state: PyTree, context: PyTree
) -> PyTree:
    """Return ``model_state`` after each of ``ops``, in order."""
    for op in ops:
        who = f"the update op {short_repr(op)} returned"
        model_state = like_before(who, op(model_state, context), model_state)
    return model_state


def like_before(
    who: str, new: PyTree, old: PyTree, call: str = "optimize_loss"
) -> PyTree:
    """Return ``new`` in strong types; refuse another structure, shape or dtype.

    ``who`` begins the message: "the loss returned", for example.
    """
    structure: Any = jax.tree.structure(new)
    expected: Any = jax.tree.structure(old)
    if structure != expected:
        raise refusal(
            call,
            f"{who} a model_state of another structure, {structure}, not "
            f"{expected}. Return all of it, changed or not.",
        )
    paths = jax.tree.leaves_with_path(old)
    for made, (path, kept) in zip(jax.tree.leaves(new), paths, strict=True):
        is_number = isinstance(made, (bool, int, float, complex))
        leaf = jnp.asarray(made) if is_number else made
        found = (getattr(leaf, "shape", None), getattr(leaf, "dtype", None))
        if found != (kept.shape, kept.dtype):
            where = f"model_state{jax.tree_util.keystr(path)}"
            raise refusal(
                call,
                f"{who} {short_repr(leaf)} for {where}, which is {short_repr(kept)}. "
                "Keep shapes and dtypes, for example with .astype(...).",
            )
    return keep_dtypes(new, old)

"""Optimizers as a rule for one leaf, and the slots that the rule reads and writes."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from optloss.messages import argument_error
from optloss.trees import accumulator_dtype, is_inexact, real_dtype, to_float32
from optloss.typing import PyTree, Scalar

Rule = Callable[..., tuple[jax.Array, ...]]


def elementwise(
    start: optax.TransformInitFn, rule: Rule, *, solver: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return the transform that applies ``rule(gradient, *slots) -> (update, *slots)``.

    ``start(params)`` gives the state, a NamedTuple of slots. If its first field is
    ``step``, that is counted, and handed to the rule as the last argument. A ``solver``
    is handed the parameter, too, after the slots, and named where it is missing.
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: object
    ) -> tuple[PyTree, PyTree]:
        del extra
        if solver and params is None:
            problem = (
                "must be given, to be solved for anew. Call update(g, state, params)."
            )
            raise argument_error(f"{solver}.update", "params", params, problem)
        others = [params] if solver else []
        step = [optax.safe_increment(state.step)] if "step" in state._fields else []
        updates, slots = _map_rule(
            lambda *row: rule(*row, *step), updates, state[len(step) :], others
        )
        return updates, type(state)(*step, *slots)

    return optax.GradientTransformationExtraArgs(start, update)


def slots(params: PyTree, value: Scalar, *, real: bool = False) -> PyTree:
    """Return a slot full of ``value`` beside each leaf, on the devices of the leaf."""

    def slot(leaf: object) -> jax.Array | optax.MaskedNode:
        if not is_inexact(leaf):
            return optax.MaskedNode()
        dtype = accumulator_dtype(leaf.dtype)
        return jnp.full_like(leaf, value, dtype=real_dtype(dtype) if real else dtype)

    return jax.tree.map(slot, params)


def scalar(like: jax.Array, value: Scalar) -> jax.Array:
    """Return the real number ``value`` in the precision of ``like``."""
    return jnp.asarray(value, real_dtype(like.dtype))


def square(gradient: jax.Array) -> jax.Array:
    """Return the squared absolute values, which are real."""
    if jnp.iscomplexobj(gradient):
        return jnp.square(gradient.real) + jnp.square(gradient.imag)
    return jnp.square(gradient)


def _map_rule(
    rule: Rule, updates: PyTree, slots: Sequence[PyTree], others: Sequence[PyTree]
) -> tuple[PyTree, list[PyTree]]:
    """Apply ``rule`` leaf by leaf. A slot that is ``None`` for all leaves stays so."""

    def apply(gradient: PyTree, *row: PyTree) -> tuple[PyTree, ...]:
        before = row[: len(slots)]
        if not is_inexact(gradient):
            return gradient, *before
        update, *after = rule(to_float32(gradient), *row)
        pairs = zip(before, after, strict=True)
        kept = (None if old is None else new.astype(old.dtype) for old, new in pairs)
        return update, *kept

    def column(i: int) -> PyTree:
        return jax.tree.map(lambda _, row: row[i], updates, rows, is_leaf=_is_absent)

    absent = jax.tree.map(lambda _: None, updates, is_leaf=_is_absent)
    trees = [absent if tree is None else tree for tree in (*slots, *others)]
    rows = jax.tree.map(apply, updates, *trees, is_leaf=_is_absent)
    kept = [None if old is None else column(i) for i, old in enumerate(slots, 1)]
    return column(0), kept


def _is_absent(node: object) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)

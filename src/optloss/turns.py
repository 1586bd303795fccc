"""One leaf after the other, because a processor's cache is small.

XLA's CPU runtime starts a kernel as soon as its operands are there. Of an optimizer
behind a clip, which waits for the norm, it runs the moments of all leaves and then the
parameters of all leaves; by then the first moments have left the cache, and come from
memory once more. In a branch of its own a leaf is updated in one go.

What belongs to a leaf is read off the traced update. Large arrays that no operation
brings together lie in parts that know nothing of each other, whatever the optimizer is.
One that takes a norm over all leaves is a single part, and stays as it is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    jaxpr_as_fun,
)

from optloss.norms import branch

LARGE = 2**17
"""Fewest elements of an array that is worth a branch."""


def surely(array: jax.Array) -> jax.Array:
    """Return ``True`` as XLA cannot know it: read off ``array``, which is not empty."""
    first = jnp.ravel(array)[0].real
    bits = jax.lax.bitcast_convert_type(first, f"uint{first.dtype.itemsize * 8}")
    always: jax.Array = jax.lax.population_count(bits) <= bits.dtype.itemsize * 8
    return always


def in_turn(fn: Callable[..., Any], before: Any, reader: jax.Array, *args: Any) -> Any:
    """Return ``fn(*args)``, on a single CPU one independent part after the other.

    Args:
        fn: A function from trees of arrays to a tree of arrays.
        before: A tree like the result: the arrays whose memory the result may take.
        reader: What else was computed from these, such as the loss: an array, not
            empty. The parts wait for it, so that nothing has to be kept for it.
        *args: Trees of arrays.

    Returns:
        What ``fn`` returns.
    """
    leaves = jax.tree.leaves(args)
    if not (any(_is_large(jax.typeof(leaf)) for leaf in leaves) and _on_one_cpu()):
        return fn(*args)
    closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr: Jaxpr = closed.jaxpr
    shared, parts = _split(jaxpr)
    kinds = jax.tree.flatten(jax.eval_shape(lambda tree: tree, before))
    if len(parts) < 2 or jaxpr.effects or jax.tree.flatten(result) != kinds:
        return fn(*args)
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, leaves, strict=True)
    made = _made(shared)
    values |= zip(made, _compute(jaxpr, shared, made, values), strict=True)
    pairs = zip(jaxpr.outvars, jax.tree.leaves(before), strict=True)
    old = {var: leaf for var, leaf in pairs if isinstance(var, Var)}
    for first, equations in parts.items():
        made = [var for var in _made(equations) if var in old]
        compute = functools.partial(_compute, jaxpr, equations, made, values)
        # A branch that returned anything else would have its result copied.
        keep = functools.partial(_look_up, made, old)
        live = surely(values[first]) & surely(reader)
        updated = branch(live, compute, keep)
        values |= zip(made, updated, strict=True)
    found = _look_up(jaxpr.outvars, values)
    return jax.tree.unflatten(jax.tree.structure(result), found)


def _on_one_cpu() -> bool:
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _is_large(kind: Any) -> bool:
    """Tell whether an array of this type is worth a branch."""
    return jnp.issubdtype(kind.dtype, jnp.inexact) and kind.size >= LARGE


def _split(jaxpr: Jaxpr) -> tuple[list[JaxprEqn], dict[Var, list[JaxprEqn]]]:
    """Return the equations that no large input enters, and those of each part.

    The parts are the connected components of the large inputs and of all that is
    computed from them, each under one of its inputs.
    """
    above = {v: v for v in (*jaxpr.constvars, *jaxpr.invars) if _is_large(v.aval)}

    def root(var: Var) -> Var:
        while above[var] is not var:
            var = above[var]
        return var

    for equation in jaxpr.eqns:
        roots = [root(var) for var in _variables(equation.invars) if var in above]
        if roots:
            above |= dict.fromkeys((*roots, *equation.outvars), roots[0])
    shared: list[JaxprEqn] = []
    parts: dict[Var, list[JaxprEqn]] = {}
    for equation in jaxpr.eqns:
        known = next((var for var in equation.outvars if var in above), None)
        own = shared if known is None else parts.setdefault(root(known), [])
        own.append(equation)
    return shared, parts


def _compute(
    jaxpr: Jaxpr, equations: list[JaxprEqn], wanted: list[Var], values: dict[Var, Any]
) -> list[Any]:
    """Return the ``wanted`` of what the equations make."""
    used = dict.fromkeys(v for e in equations for v in _variables(e.invars))
    made = set(_made(equations))
    needed = [var for var in used if var not in made]
    part = jaxpr.replace(constvars=[], invars=needed, outvars=wanted, eqns=equations)
    results: list[Any] = jaxpr_as_fun(ClosedJaxpr(part, []))(*_look_up(needed, values))
    return results


def _made(equations: list[JaxprEqn]) -> list[Var]:
    return [var for equation in equations for var in equation.outvars]


def _variables(atoms: Sequence[Var | Literal]) -> list[Var]:
    return [atom for atom in atoms if isinstance(atom, Var)]


def _look_up(atoms: Sequence[Var | Literal], values: dict[Var, Any]) -> list[Any]:
    return [values[atom] if isinstance(atom, Var) else atom.val for atom in atoms]

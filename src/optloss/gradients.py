"""Other ways to the gradient than one pass over the whole batch.

The training op differentiates its objective by a function like ``jax.value_and_grad``,
which it calls while tracing as ``value_and_grad(objective, has_aux=True)``, where

    objective(params, /, *args, model_state=None, **kwargs)

returns ``(loss, (model_state, aux))``. What ``value_and_grad`` returns takes the same
arguments and returns ``((loss, (model_state, aux)), gradients)``. ``params`` are the
trained parameters, ``args`` and ``kwargs`` what the step was called with, so that such
a function can split them, map over them or use them twice.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optloss.batches import Batch, InAxes, check_divides, check_in_axes, take_apart
from optloss.loss import like_before
from optloss.mesh import zeros_like
from optloss.messages import argument_error, check_int, listing, short_repr
from optloss.names import leaf_names
from optloss.trees import accumulator_dtype, is_inexact, keep_dtypes
from optloss.typing import Differentiate, Differentiated, Objective, PyTree
from optloss.typing import ValueAndGrad as ValueAndGrad


def accumulate_gradients(steps: int, *, in_axes: InAxes = 0) -> ValueAndGrad:
    r"""Compute the gradient in several passes, each over a slice of the batch.

    A pass holds the activations of its own slice only, so that a batch fits into memory
    whose activations do not. Noise, clip and optimizer run once, on the mean

    .. math:: g = \frac{1}{k} \sum_{j=0}^{k-1} \nabla L(\theta, B_j), \qquad
        B_j = \{x_i : i \bmod k = j\}

    with :math:`k` = ``steps``. For a loss that is a mean over the examples this is the
    gradient of the whole batch.

    Args:
        steps: Number of slices; it must divide the number of examples.
        in_axes: The axis of the examples, as in ``jax.vmap``: an int or ``None`` for
            all arguments, or a tuple with one of these, or a tree of these, for each
            positional argument of the loss after ``params`` and ``model_state``;
            keyword arguments are then split along axis 0. ``None`` gives an argument to
            each slice as it is.

    Returns:
        A function for ``optimize_loss(value_and_grad=...)``. Arrays ``[n, *shape]``
        reach the loss as ``[n / steps, *shape]``, scalars as they are. A scalar typed
        key (``jax.random.key``) is split into one for each slice; an array of keys is
        an array, and so is a raw uint32 key. A ``model_state`` goes from slice to
        slice. The loss is the mean over the slices; ``aux`` is stacked, ``[steps,
        ...]``. Gradients are summed in float32 (float64 for such parameters) and have
        the dtypes of the parameters.

    Raises:
        ValueError: If ``steps`` is not an int >= 1 or ``in_axes`` is no axis or tuple;
            when traced, if ``in_axes`` does not fit the arguments, arrays differ in the
            number of examples, or ``steps`` does not divide it.

    Note:
        What depends on the batch as a whole, such as a BatchNorm or a contrastive loss,
        sees one slice at a time. On a mesh the slices stay spread over the devices
        where the number of devices divides the examples of a slice.

    Example:
        >>> import jax.numpy as jnp
        >>> def objective(w, x, model_state=None):
        ...     return jnp.mean(w * x**2), (model_state, x)
        >>> value_and_grad = accumulate_gradients(2)(objective, has_aux=True)
        >>> (loss, (_, aux)), gradient = value_and_grad(
        ...     jnp.array(3.0), jnp.array([1.0, 2.0, 3.0, 4.0])
        ... )
        >>> print(loss, gradient)
        22.5 7.5
        >>> print(aux)
        [[1. 3.]
         [2. 4.]]

    See also:
        ``optax.MultiSteps``, which accumulates over several steps.
    """
    call = "accumulate_gradients"
    check_int(call, "steps", steps, 1, "an int >= 1, the number of slices.")
    check_in_axes(call, in_axes)
    gradient = functools.partial(_accumulated, steps)
    return BySlices(f"{call}({steps})", call, in_axes, gradient)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BySlices:
    """A function like ``jax.value_and_grad`` that looks at slices of the batch."""

    text: str  # the call that made it, without what changes no number
    call: str
    in_axes: InAxes
    gradient: Callable[[Differentiate, PyTree, PyTree, Batch], Differentiated]

    def __repr__(self) -> str:
        """Return the call that made it."""
        return self.text

    def __call__(
        self, objective: Objective, /, *, has_aux: Literal[True] = True
    ) -> Differentiate:
        """Return a function that returns the objective's results and its gradient."""
        differentiate = jax.value_and_grad(objective, has_aux=has_aux)

        def by_slices(
            params: PyTree, /, *args: Any, model_state: PyTree = None, **kwargs: Any
        ) -> Differentiated:
            batch = take_apart(self.call, self.in_axes, (args, kwargs))
            return self.gradient(differentiate, params, model_state, batch)

        return by_slices


def _accumulated(
    steps: int,
    differentiate: Differentiate,
    params: PyTree,
    model_state: PyTree,
    batch: Batch,
) -> Differentiated:
    check_divides("accumulate_gradients", "steps", steps, batch)
    stacks = [leaf.stack(steps, keys=steps) for leaf in batch.leaves]

    def one_slice(i: jax.Array, model_state: PyTree) -> Differentiated:
        values = [leaf.pick(i)[0] if leaf.is_key else leaf.pick(i) for leaf in stacks]
        args, kwargs = jax.tree.unflatten(batch.structure, values)
        return differentiate(params, *args, model_state=model_state, **kwargs)

    return mean_of_slices(one_slice, steps, params, model_state)


def mean_of_slices(
    one_slice: Callable[[jax.Array, PyTree], Differentiated],
    steps: int,
    params: PyTree,
    model_state: PyTree,
) -> Differentiated:
    """Return the mean over all slices, one after the other."""

    def add(carry: tuple[PyTree, PyTree], i: jax.Array) -> tuple[Any, Any]:
        sums, model_state = carry
        (loss, (model_state, aux)), gradients = one_slice(i, model_state)
        return (jax.tree.map(jnp.add, sums, gradients), model_state), (loss, aux)

    zeros = jax.tree.map(lambda p: zeros_like(p, accumulator_dtype(p.dtype)), params)
    (sums, model_state), (losses, aux) = jax.lax.scan(
        add, (zeros, model_state), jnp.arange(steps)
    )
    gradients = jax.tree.map(lambda g, p: (g / steps).astype(p.dtype), sums, params)
    return (jnp.mean(losses), (model_state, aux)), gradients


def check_result(
    value_and_grad: ValueAndGrad, result: Any, params: PyTree, model_state: PyTree
) -> Differentiated:
    """Return the ``result`` of a caller's own ``value_and_grad``, if it fits."""
    refuse = functools.partial(
        argument_error, "optimize_loss", "value_and_grad", value_and_grad
    )
    if not (_is_pair(result) and _is_pair(result[0]) and _is_pair(result[0][1])):
        raise refuse(
            f"returned {short_repr(result)}, not ((loss, (model_state, aux)), "
            "gradients), as jax.value_and_grad does of an objective with aux."
        )
    (loss, (new_state, aux)), gradients = result
    if not is_inexact(loss) or loss.shape != () or jnp.iscomplexobj(loss):
        raise refuse(f"returned the loss {short_repr(loss)}, which is no real scalar.")
    new_state = like_before("value_and_grad returned", new_state, model_state)
    if problem := _misfit(gradients, params):
        raise refuse(problem)
    loss, gradients = keep_dtypes((loss, gradients), (loss, params))
    return (loss, (new_state, aux)), gradients


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _misfit(gradients: PyTree, params: PyTree) -> str | None:
    """Return how the gradients differ from the parameters, None where they do not."""
    names, returned = leaf_names(params), leaf_names(gradients)
    if missing := set(names).difference(returned):
        return f"returned no gradient for {listing(missing)}."
    if surplus := set(returned).difference(names):
        return f"returned gradients for {listing(surplus)}, which are not trained."
    structure: Any = jax.tree.structure(gradients)
    if structure != jax.tree.structure(params):
        return f"returned gradients in {structure}, not {jax.tree.structure(params)}."
    leaves = zip(names, *map(jax.tree.leaves, (gradients, params)), strict=True)
    for name, gradient, parameter in leaves:
        found, expected = short_repr(gradient), short_repr(parameter)
        if found != expected:
            return (
                f"returned {found} as the gradient of {name!r}, which is {expected}. "
                "Keep shapes and dtypes."
            )
    return None


def check_keywords(loss: Callable[..., Any], keywords: Iterable[str] = ()) -> None:
    """Refuse a keyword ``model_state`` of the loss, which the objective has already."""
    try:
        own = inspect.signature(loss).parameters.get("model_state")
    except (TypeError, ValueError):
        own = None
    is_keyword = own is not None and own.kind is own.KEYWORD_ONLY
    if is_keyword or "model_state" in keywords:
        raise argument_error(
            "optimize_loss",
            "loss",
            loss,
            "has a keyword argument of its own named model_state. Rename it, or pass "
            "it by position.",
        )

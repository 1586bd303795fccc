"""The loss of one step as a function of the trained parameters, and its gradient."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optloss.extra import fill_masked
from optloss.gradients import ValueAndGrad, check_keywords, check_result
from optloss.loss import Outcome, call_loss, like_before, real_scalar
from optloss.loss_scale import scale_loss, unscale
from optloss.messages import argument_error, listing, quoted, refusal, short_repr
from optloss.names import leaf_names
from optloss.trees import is_inexact, map_inexact, merge_leaves
from optloss.typing import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A loss at the state and the arguments of one step."""

    loss: Callable[..., Any]
    params: PyTree
    model_state: PyTree
    selected: list[bool]  # which leaves of `params` are trained
    ops_follow: bool
    args: Sequence[PyTree]
    kwargs: Mapping[str, PyTree]

    def value_fn(self, trained: PyTree, step: PyTree = None) -> jax.Array:
        """Return the loss at other parameters, for line searches."""
        del step  # optax hands on all that a line search does not name
        params = fill_masked(trained, self.params)
        found = call_loss(
            self.loss, params, self.model_state, self.ops_follow, self.args, self.kwargs
        )
        return found.loss

    def gradient(
        self, trained: PyTree, value_and_grad: ValueAndGrad, scale: jax.Array | None
    ) -> tuple[Outcome, PyTree]:
        """Return what the loss returned, and its gradient, uphill and unscaled."""
        check_keywords(self.loss, self.kwargs)

        def objective(
            trained: PyTree, /, *args: PyTree, model_state: PyTree = None, **kw: PyTree
        ) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
            # Rebuilt in here, so that modules made of them belong to this trace.
            params = merge_leaves(trained, self.params, self.selected)
            model_state = jax.tree.map(lambda leaf: leaf, model_state)
            loss, model_state, aux = call_loss(
                self.loss, params, model_state, self.ops_follow, args, kw
            )
            scaled = loss if scale is None else scale_loss(scale, loss)
            return scaled, (model_state, aux)

        differentiate = value_and_grad(objective, has_aux=True)
        if not callable(differentiate):
            raise argument_error(
                "optimize_loss",
                "value_and_grad",
                value_and_grad,
                f"returned {short_repr(differentiate)}, no function of the parameters.",
            )
        result = differentiate(
            trained, *self.args, model_state=self.model_state, **self.kwargs
        )
        (loss, (model_state, aux)), gradients = check_result(
            value_and_grad, result, trained, self.model_state
        )
        if scale is not None:
            loss, gradients = unscale(scale, (loss, gradients))
        return Outcome(loss, model_state, aux), conjugate(gradients)


def conjugate(gradients: PyTree) -> PyTree:
    """Return JAX's gradient as one that points uphill for complex leaves, too."""
    return map_inexact(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradients)


# Gradients from elsewhere

APPLY = "train_op.apply_gradients"


def only_arrays(gradients: PyTree) -> PyTree:
    """Return a caller's tree without what a compiled function cannot be given."""
    arrays = (jax.Array, np.ndarray, np.generic, int, float, complex)
    return jax.tree.map(lambda g: g if isinstance(g, arrays) else None, gradients)


def given_gradients(gradients: PyTree, trained: PyTree) -> PyTree:
    """Return the gradients of what is ``trained``, found by name in a caller's tree."""
    leaves = jax.tree.leaves(gradients)
    known = dict(zip(leaf_names(gradients), leaves, strict=True))
    names = leaf_names(trained)
    missing = [name for name in names if name not in known]
    if missing:
        raise refusal(
            APPLY,
            f"gradients holds none for {listing(missing)}. Give one under the name of "
            "each trained parameter, or choose what is trained with variables=.",
        )
    parameters, structure = jax.tree.flatten(trained)
    for name, parameter in zip(names, parameters, strict=True):
        gradient = known[name]
        fits = (
            is_inexact(gradient)
            and jnp.shape(gradient) == parameter.shape
            and (jnp.iscomplexobj(parameter) or not jnp.iscomplexobj(gradient))
        )
        if not fits:
            raise refusal(
                APPLY,
                f"the gradient of {quoted(name)} is {short_repr(gradient)}; the "
                f"parameter is {short_repr(parameter)}.",
            )
    return jax.tree.unflatten(structure, [jnp.asarray(known[name]) for name in names])


def given_outcome(
    loss: PyTree, aux: PyTree, model_state: PyTree, old_model_state: PyTree
) -> Outcome:
    """Return what a caller says that the loss returned; the loss may be ``None``."""
    if loss is not None:
        loss = real_scalar(APPLY, loss)
    if model_state is None:
        return Outcome(loss, old_model_state, aux)
    model_state = like_before("it was given", model_state, old_model_state, APPLY)
    return Outcome(loss, model_state, aux)


def missing_argument(error: TypeError) -> Exception:
    """Return the error for a transform that needs what a gradient does not tell."""
    if "missing" not in str(error):
        return error
    return refusal(
        APPLY,
        f"a transform needs more than the gradient: {error}. Pass loss= for 'value'; "
        "'value_fn', the loss as a function, is known only to a step of the loss, "
        "train_op(state, ...).",
    )

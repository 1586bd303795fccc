"""``optimize_loss`` for Flax nnx: a training op that updates its model in place.

A model is taken apart once. The variables that ``wrt`` selects are the parameters;
everything else it holds, statistics of BatchNorm, random streams, counters, is the
``model_state`` that the loss carries from step to step. The compiled step works on
these two trees of arrays, and what it returns is written back to the variables.
"""

from collections.abc import Callable
from typing import Any

import jax

from optloss.messages import (
    argument_error,
    check_callable,
    refusal,
    short_repr,
    short_text,
)
from optloss.optimize import optimize_loss as optimize_pure_loss
from optloss.train_op import StepOutput, TrainOp, TrainOpState
from optloss.trees import own_copy
from optloss.typing import LearningRate, Optimizer, PyTree, Scalar

try:
    from flax import nnx
    from flax.nnx.filterlib import Filter
except ImportError as error:
    raise ImportError(
        "optloss.integrations.nnx needs flax. Install it: pip install 'optloss[flax]'"
    ) from error

Graph = nnx.GraphDef[nnx.Module]


class ModelTrainOp:
    """A compiled training step of one model, made by :func:`optimize_loss`.

    ``output = op(*args)`` makes a step and leaves the model trained by it. The model's
    variables are where the parameters are: what is written to them between two steps,
    pretrained weights for instance, is what the next step starts from. Its structure
    and its flags, such as those of ``model.train()``, are those it had when the op was
    made.

    Attributes:
        train_op: The :class:`~optloss.TrainOp` underneath, for its ``tx``, and its pure
            ``update`` over trees of arrays.
    """

    train_op: TrainOp

    def __init__(
        self, model: nnx.Module, train_op: TrainOp, slots: tuple[PyTree, PyTree]
    ) -> None:
        self.train_op = train_op
        self._variables = jax.tree.leaves(slots, is_leaf=_is_variable)
        self._state = train_op.init(*jax.tree.map(_read, slots, is_leaf=_is_variable))
        self._model = short_repr(type(model))
        self._write()

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> StepOutput:
        """Make one step with ``loss(model, *args, **kwargs)``."""
        self._state, output = self.train_op(self.state, *args, **kwargs)
        self._write()
        return output

    @property
    def state(self) -> TrainOpState:
        """The whole run as one tree of dicts and arrays, which is what to save."""
        held, structure = jax.tree.flatten(_trees(self._state))
        found = [_read(variable) for variable in self._variables]
        pairs = list(zip(found, held, strict=True))
        if any(new is not old for new, old in pairs):
            # Somebody wrote to the model. Copied, so that donation leaves theirs alone.
            kept = [new if new is old else own_copy(new) for new, old in pairs]
            params, model_state = jax.tree.unflatten(structure, kept)
            self._state = self._state._replace(params=params, model_state=model_state)
            self._write()
        return self._state

    def restore(self, state: TrainOpState) -> None:
        """Go on from ``state``, and write its parameters to the model.

        Args:
            state: What :attr:`state` was, or what a checkpoint made of it. It is
                copied.

        Raises:
            ValueError: If it is not the state of such a run.
        """
        expected: Any = jax.tree.structure(self._state)
        if expected != jax.tree.structure(state):
            problem = (
                f"it is not a state of this run, whose structure is {expected}. "
                "Restore into op.state."
            )
            raise argument_error("op.restore", "state", state, problem)
        self._state = jax.tree.map(own_copy, state)
        self._write()

    def describe(self) -> str:
        """Return the pipeline, and a table of what applies to which parameter."""
        return self.train_op.describe(self.state.params)

    def __repr__(self) -> str:
        """Return the pipeline in order, on one line."""
        return f"{self._model}: {self.train_op!r}"

    def _write(self) -> None:
        leaves = jax.tree.leaves(_trees(self._state))
        for variable, leaf in zip(self._variables, leaves, strict=True):
            variable.set_value(leaf)


def optimize_loss(
    model: nnx.Module,
    loss: Callable[..., Scalar | tuple[Scalar, PyTree]],
    global_step: int | jax.Array | None,
    learning_rate: LearningRate,
    optimizer: Optimizer,
    *options: Any,
    wrt: Filter = nnx.Param,
    **keywords: Any,
) -> ModelTrainOp:
    """Make a complete, compiled training step of a loss of an nnx model.

    As :func:`optloss.optimize_loss`, with a model for a first argument: the loss is
    given the model, and the model is updated in place.

    Args:
        model: An ``nnx.Module``. Variables it shares between two places are trained as
            one.
        loss: ``loss(model, *args, **kwargs)`` returns the loss, a real floating scalar,
            or ``(loss, aux)``. What it changes in the model, running statistics and
            random streams, is kept.
        global_step: As for :func:`optloss.optimize_loss`, like all that follows.
        learning_rate: As there.
        optimizer: As there.
        *options: The arguments behind ``optimizer``, in the order they have there.
        wrt: An nnx filter: which variables are the parameters. ``variables=`` selects
            among them by name.
        **keywords: The other arguments, by name. An update op works on the dict of all
            the variables that ``wrt`` leaves.

    Returns:
        A :class:`ModelTrainOp`. ``op(*args)`` makes one step and returns a
        :class:`~optloss.StepOutput`; ``op.state`` is what to save, and
        ``op.restore(state)`` goes on from it.

    Raises:
        ValueError: As :func:`optloss.optimize_loss`, names and patterns included.

    Note:
        The arrays in the model are donated to the next step: copy what is to outlive
        it, or pass ``donate=False``.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> def loss(model, x, y):
        ...     return jnp.mean((model(x) - y) ** 2)
        >>> op = optimize_loss(
        ...     model, loss, global_step=0, learning_rate=0.1, optimizer="adam"
        ... )
        >>> x, y = jnp.eye(2), jnp.array([[1.0], [2.0]])
        >>> for _ in range(200):
        ...     output = op(x, y)
        >>> print(f"{output.loss:.4f} at step {op.state.step}")
        0.0000 at step 200
        >>> print(jnp.round(model(x)[:, 0]))
        [1. 2.]

    See also:
        :func:`optloss.make_optimizer`, for an ``nnx.Optimizer`` in a loop of your own.
    """
    graphdef, params, rest = _checked_split(model, wrt)
    train_op = optimize_pure_loss(
        _pure(loss, graphdef, wrt),
        global_step,
        learning_rate,
        optimizer,
        *options,
        **keywords,
    )
    return ModelTrainOp(model, train_op, (_slots(params), _slots(rest)))


def _checked_split(model: nnx.Module, wrt: Filter) -> tuple[Graph, PyTree, PyTree]:
    if not isinstance(model, nnx.Module):
        problem = "must be an nnx.Module."
        raise argument_error("optimize_loss", "model", model, problem)
    try:
        return _split(model, wrt)
    except (TypeError, ValueError) as error:
        problem = f"must be an nnx filter, such as nnx.Param: {short_text(str(error))}"
        raise argument_error("optimize_loss", "wrt", wrt, problem) from error


def _split(model: nnx.Module, wrt: Filter) -> tuple[Graph, PyTree, PyTree]:
    parts: Any = nnx.split(model, wrt, ...)
    graphdef, params, rest = parts
    return graphdef, params, rest


def _trees(state: TrainOpState) -> tuple[PyTree, PyTree]:
    return state.params, state.model_state


def _pure(
    loss: Callable[..., PyTree], graphdef: Graph, wrt: Filter
) -> Callable[..., PyTree]:
    """Return ``loss`` as a function of trees of arrays."""
    wanted = "a function loss(model, *args)"
    check_callable("optimize_loss", "loss", loss, 1, wanted, more=True)

    def pure_loss(
        params: PyTree, model_state: PyTree, *args: PyTree, **kwargs: PyTree
    ) -> PyTree:
        model = nnx.merge(graphdef, params, model_state)
        result = loss(model, *args, **kwargs)
        parts = result if type(result) is tuple else (result,)
        if not 1 <= len(parts) <= 2:
            raise refusal(
                "optimize_loss",
                f"the loss returned {len(parts)} results. With an nnx model it returns "
                "loss or (loss, aux); what it changes in the model is kept.",
            )
        changed = nnx.to_pure_dict(_split(model, wrt)[2])
        return parts[0], changed, *parts[1:]

    return pure_loss


def _slots(state: PyTree) -> PyTree:
    """Return nested dicts of the variables themselves, not of their values."""
    return nnx.to_pure_dict(state, extract_fn=lambda variable: variable)


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)


def _read(variable: nnx.Variable[jax.Array]) -> jax.Array:
    return variable.get_value()

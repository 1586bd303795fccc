"""``optimize_loss`` for Flax nnx: a training op that updates its model in place.

The compiled step works on two trees of arrays: the parameters and, as ``model_state``,
everything else that the model holds. What it returns is written back to the variables.
So it is with nnx objects among the arguments of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from optloss.donation import clear_if_deleted, copies_of_donated
from optloss.loss_scale import LossScale
from optloss.messages import (
    argument_error,
    check_callable,
    refusal,
    short_repr,
    short_text,
)
from optloss.optimize import optimize_loss as optimize_pure_loss
from optloss.state_check import check_part
from optloss.train_op import StepOutput, TrainOpState
from optloss.trees import own_copy
from optloss.typing import (
    AxisName,
    Clip,
    DecayFn,
    LearningRate,
    Multipliers,
    NoiseScale,
    Optimizer,
    Params,
    PyTree,
    Schedule,
    Summaries,
    UpdateOp,
    ValueAndGrad,
    Variables,
)

try:
    from flax import nnx
    from flax.errors import TraceContextError
    from flax.nnx.filterlib import Filter, to_predicate
    from flax.traverse_util import unflatten_dict

    from optloss.integrations.nnx_graphs import (
        Graphs,
        Path,
        Slot,
        are_same,
        is_object,
        taken_apart,
        without_objects,
    )
    from optloss.integrations.nnx_step import Given, ModelLoss, PureTrainOp
except ImportError as error:
    raise ImportError(
        "optloss.integrations.nnx needs flax. Install it: pip install 'optloss[flax]'"
    ) from error


class ModelTrainOp:
    """A compiled training step of one model, made by :func:`optimize_loss`.

    ``output = op(*args)`` makes a step and leaves the model trained by it. The model's
    variables are where the parameters are: what is written to them between two steps,
    pretrained weights for instance, is what the next step starts from. Its flags are
    read at each call: after ``model.eval()`` the loss sees a model in evaluation mode,
    after ``model.train()`` one in training mode. Each combination of flags is compiled
    once.

    Other nnx objects may be arguments, alone or in containers: an ``nnx.Rngs``, an
    ``nnx.Metric``, another model. What the loss changes in them is kept. They are not
    differentiated, but for variables that the model shares.

    Attributes:
        train_op: The :class:`~optloss.TrainOp` underneath, for its ``tx``, and its pure
            ``update`` over trees of arrays, which takes no nnx objects.
    """

    def __init__(
        self, model: nnx.Module, train_op: PureTrainOp, slots: Sequence[Slot]
    ) -> None:
        self.train_op = train_op
        self._model = short_repr(type(model))
        self._slots = slots
        self._state = train_op.init(*self._read())
        self._write()

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> StepOutput:
        """Make one step with ``loss(model, *args, **kwargs)``.

        Raises:
            ValueError: If the model has other variables than when the op was made, the
                loss changes an nnx object that is not among the arguments, or the op is
                called inside a function that JAX traces.
        """
        self._check_writable()
        (args, kwargs), objects = without_objects((args, kwargs))
        found = self.train_op.graphs.find(objects)
        state = self.state
        values = [slot.get_raw_value() for slot in found.slots]
        if values and self.train_op.donate:
            # An object that shares an array with the state goes on with a copy.
            held, values = values, copies_of_donated(state, values)
            for slot, old, new in zip(found.slots, held, values, strict=True):
                if new is not old:
                    slot.set_raw_value(new)
        given = Given(found.graph, values)
        self._state, output = self.train_op(state, given, *args, **kwargs)
        self._write()
        aux, changed = output.aux
        for slot, value in zip(found.slots, changed, strict=True):
            if value is not None:
                slot.set_raw_value(value)
        return output._replace(aux=aux)

    @property
    def state(self) -> TrainOpState:
        """The whole run as one tree of dicts and arrays, which is what to save.

        The next step takes its arrays, unless the op was made with ``donate=False``:
        what is to be kept in memory is ``jax.tree.map(jnp.copy, op.state)``.
        """
        held, structure = jax.tree.flatten(_trees(self._state))
        values = self._read()
        leaves: list[jax.Array] = jax.tree.leaves(values)
        found: Any = jax.tree.structure(values)
        if found != structure:
            raise refusal(
                "op",
                "a variable of the model holds a tree of another structure than when "
                "the op was made. Write a tree of the same one, or make another op.",
            )
        if not are_same(leaves, held):
            # Somebody wrote to the model. Copied, so that donation leaves theirs alone.
            pairs = zip(leaves, held, strict=True)
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
        call = "op.restore(state)"
        expected: Any = jax.tree.structure(self._state)
        if expected != jax.tree.structure(state):
            cure = (
                "Restore a checkpoint into op.state; of the state of another op, "
                "op.train_op.adopt(state) makes one that fits."
            )
            if isinstance(state, TrainOpState):
                for name, kept in self._state._asdict().items():
                    check_part(call, name, getattr(state, name), kept, cure)
            problem = f"must be a TrainOpState of this run. {cure}"
            raise argument_error("op.restore", "state", state, problem)
        with clear_if_deleted(call, state):
            self._state = jax.tree.map(own_copy, state)
        self._write()

    def describe(self) -> str:
        """Return the pipeline, and a table of what applies to which parameter."""
        return self.train_op.describe(self.state.params)

    def __repr__(self) -> str:
        """Return the pipeline in order, on one line."""
        return f"{self._model}: {self.train_op!r}"

    def _check_writable(self) -> None:
        slot = self._slots[0]
        try:
            slot.set_raw_value(slot.get_raw_value())
        except TraceContextError as error:
            raise refusal(
                "op",
                "it was called inside a function that JAX traces, where it cannot "
                "write to its model. Call it outside, or use the pure "
                "op.train_op.update(state, ...) there, and op.restore(state) after it.",
            ) from error

    def _read(self) -> tuple[PyTree, PyTree]:
        values = [slot.get_raw_value() for slot in self._slots]
        return jax.tree.unflatten(self.train_op.structure, values)

    def _write(self) -> None:
        values = self.train_op.structure.flatten_up_to(_trees(self._state))
        for slot, value in zip(self._slots, values, strict=True):
            slot.set_raw_value(value)


def optimize_loss(
    model: nnx.Module,
    loss: ModelLoss,
    global_step: int | jax.Array | None,
    learning_rate: LearningRate,
    optimizer: Optimizer,
    gradient_noise_scale: NoiseScale = None,
    gradient_multipliers: Multipliers | None = None,
    clip_gradients: Clip = None,
    learning_rate_decay_fn: DecayFn | None = None,
    update_ops: Sequence[UpdateOp] | None = None,
    variables: Variables = None,
    name: str | None = None,
    summaries: Summaries | None = None,
    colocate_gradients_with_ops: bool = False,
    increment_global_step: bool = True,
    *,
    learning_rate_multipliers: Multipliers | None = None,
    histogram_every: int = 1,
    skip_nonfinite: bool = False,
    seed: int | jax.Array = 0,
    pack_small_leaves: int = 0,
    axis_name: AxisName = None,
    replica_axis_name: AxisName = None,
    donate: bool = True,
    skip_spikes: float | None = None,
    value_and_grad: ValueAndGrad = jax.value_and_grad,
    loss_scale: float | LossScale | None = None,
    projection: Callable[[Params], Params] | None = None,
    moving_average: float | Schedule | None = None,
    wrt: Filter = nnx.Param,
) -> ModelTrainOp:
    """Make a complete, compiled training step of a loss of an nnx model.

    As :func:`optloss.optimize_loss`, with a model for a first argument: the loss is
    given the model, and the model is updated in place.

    Args:
        model: An ``nnx.Module``. Variables it shares between two places are trained as
            one. A variable may hold a tree of arrays.
        loss: ``loss(model, *args, **kwargs)`` returns the loss, a real floating scalar,
            or ``(loss, aux)``. What it changes in the values of the model and of nnx
            objects among the arguments is kept: running statistics, random streams,
            metrics. A flag that it sets itself holds inside of the loss only.
        global_step: As for :func:`optloss.optimize_loss`, like all that follows but
            ``wrt``.
        learning_rate: As there.
        optimizer: As there.
        gradient_noise_scale: As there.
        gradient_multipliers: As there.
        clip_gradients: As there.
        learning_rate_decay_fn: As there.
        update_ops: As there. The ``model_state`` is the nested dict of all the
            variables that ``wrt`` leaves.
        variables: As there: names or patterns among the parameters that ``wrt``
            selects.
        name: As there.
        summaries: As there.
        colocate_gradients_with_ops: As there.
        increment_global_step: As there.
        learning_rate_multipliers: As there.
        histogram_every: As there.
        skip_nonfinite: As there. A skipped step keeps the nnx objects among its
            arguments as they were, too.
        seed: As there.
        pack_small_leaves: As there.
        axis_name: As there.
        replica_axis_name: As there.
        donate: As there.
        skip_spikes: As there.
        value_and_grad: As there. nnx objects among the arguments are not split; what
            the loss changes in them goes from slice to slice.
        loss_scale: As there.
        projection: As there.
        moving_average: As there.
        wrt: An nnx filter: which variables are the parameters.

    Returns:
        A :class:`ModelTrainOp`. ``op(*args)`` makes one step and returns a
        :class:`~optloss.StepOutput`; ``op.state`` is what to save, and
        ``op.restore(state)`` goes on from it.

    Raises:
        ValueError: As :func:`optloss.optimize_loss`, names and patterns included.

    Note:
        The arrays in the model are donated to the next step: copy what is to outlive
        it, or pass ``donate=False``. ``nnx.clone(model)`` shares them; a clone that is
        an argument of the next step is given arrays of its own. Arguments are not
        donated.

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

        A metric and a random stream as arguments, which the loss changes:

        >>> def noisy_loss(model, x, y, rngs, metric):
        ...     value = loss(model, x + 0.1 * rngs.normal(x.shape), y)
        ...     metric.update(values=value)
        ...     return value
        >>> op = optimize_loss(
        ...     model, noisy_loss, global_step=0, learning_rate=0.1, optimizer="adam"
        ... )
        >>> rngs, metric = nnx.Rngs(1), nnx.metrics.Average()
        >>> losses = [op(x, y, rngs, metric).loss for _ in range(3)]
        >>> print(rngs.default.count[...], bool(metric.compute() == sum(losses) / 3))
        3 True

    See also:
        :func:`optloss.make_optimizer`, for an ``nnx.Optimizer`` in a loop of your own.
    """
    given = dict(locals())
    del given["model"], given["wrt"]
    wanted = "a function loss(model, *args)"
    check_callable("optimize_loss", "loss", loss, 1, wanted, more=True)
    slots, structure = _slots(model, wrt)
    fields = vars(optimize_pure_loss(**given))
    pure = PureTrainOp(**fields, graphs=Graphs(model, slots), structure=structure)
    return ModelTrainOp(model, pure, slots)


def _slots(model: nnx.Module, wrt: Filter) -> tuple[list[Slot], Any]:
    """Return where the values of the model live, and how they make two trees."""
    if not isinstance(model, nnx.Module):
        problem = "must be an nnx.Module."
        raise argument_error("optimize_loss", "model", model, problem)
    trees: tuple[dict[Path, Slot], ...] = {}, {}
    _, found = taken_apart((model,))
    try:
        is_selected = to_predicate(wrt)
        for path, slot in found.items():
            trees[not is_selected(path[1:], slot)][path[1:]] = slot
    except (TypeError, ValueError) as error:
        problem = f"must be an nnx filter, such as nnx.Param: {short_text(str(error))}"
        raise argument_error("optimize_loss", "wrt", wrt, problem) from error
    return jax.tree.flatten(tuple(map(unflatten_dict, trees)), is_leaf=is_object)


def _trees(state: TrainOpState) -> tuple[PyTree, PyTree]:
    return state.params, state.model_state

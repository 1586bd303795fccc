"""The step of a model's loss over trees of arrays, as a training op makes it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from optloss.integrations.nnx_graphs import Graph, Graphs, without_objects
from optloss.loss import Outcome
from optloss.messages import refusal
from optloss.train_op import Moved, Step, TrainOp, TrainOpState
from optloss.typing import PyTree, Scalar

ModelLoss: TypeAlias = Callable[..., Scalar | tuple[Scalar, PyTree]]
"""``loss(model, *args, **kwargs) -> loss or (loss, aux)``."""


class Given(NamedTuple):
    """What a compiled step is given beside its arrays."""

    graph: Graph  # static
    values: list[PyTree]  # of the objects


class Carried(NamedTuple):
    """What the loss carries through a step: values that are no parameters."""

    variables: PyTree  # of the model, a dict
    objects: list[PyTree]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PureTrainOp(TrainOp):
    """The training op of a loss of a model, over trees of arrays."""

    graphs: Graphs = dataclasses.field(kw_only=True)
    structure: Any = dataclasses.field(kw_only=True)

    def _step(
        self, shardings: Any, state: TrainOpState, /, *args: Any, **kwargs: Any
    ) -> Step:
        """Make a step; where it is given a graph, its aux holds what changed, too."""
        has_graph = bool(args) and isinstance(args[0], Given)
        if has_graph:
            given, args = args[0], args[1:]
        elif without_objects((args, kwargs))[1]:
            problem = "takes no nnx objects, whose changes it cannot keep. Call the op."
            raise refusal("op.train_op", problem)
        else:
            given = Given(self.graphs.find([]).graph, [])
        loss = PureLoss(self.loss, given.graph, self.structure)
        op = dataclasses.replace(self, loss=loss)
        carried = Carried(state.model_state, given.values)
        state = state._replace(model_state=carried)
        step = super(PureTrainOp, op)._step
        state, output = step(shardings, state, *args, **kwargs)
        variables, objects = state.model_state
        if has_graph:
            changed = [v if i in loss.changed else None for i, v in enumerate(objects)]
            output = output._replace(aux=(output.aux, changed))
        return state._replace(model_state=variables), output

    def _moved(self, state: TrainOpState, outcome: Outcome, trained: PyTree) -> Moved:
        carried = outcome.model_state
        if not isinstance(carried, Carried):  # apply_gradients calls no loss
            return super()._moved(state, outcome, trained)
        outcome = outcome._replace(model_state=carried.variables)
        moved = super()._moved(state, outcome, trained)
        carried = carried._replace(variables=moved.model_state)
        return moved._replace(model_state=carried)


class PureLoss:
    """The loss of a model as a function of trees of arrays."""

    def __init__(self, loss: ModelLoss, graph: Graph, structure: Any) -> None:
        self._loss = loss
        self._graph = graph
        self._structure = structure
        self.changed: set[int] = set()  # places among the objects' values

    def __call__(
        self, params: PyTree, carried: Carried, *args: PyTree, **kwargs: PyTree
    ) -> PyTree:
        """Return the loss, what it carries on, and its aux if it has one."""
        own = self._structure.flatten_up_to((params, carried.variables))
        values = [*own, *carried.objects]
        result, after = self._graph.call(self._loss, values, (args, kwargs))
        parts = result if type(result) is tuple else (result,)
        if not 1 <= len(parts) <= 2:
            raise refusal(
                "optimize_loss",
                f"the loss returned {len(parts)} results. With an nnx model it returns "
                "loss or (loss, aux); what it changes in the model is kept.",
            )
        _, variables = jax.tree.unflatten(self._structure, after[: len(own)])
        objects = after[len(own) :]
        for place, pair in enumerate(zip(objects, carried.objects, strict=True)):
            leaves = zip(*map(jax.tree.leaves, pair), strict=False)
            if any(new is not old for new, old in leaves):
                self.changed.add(place)
        return parts[0], Carried(variables, objects), *parts[1:]

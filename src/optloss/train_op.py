"""The training op: one call makes the loss, the gradients and the whole update.

    state -> loss and gradients -> chain -> parameters -> update ops -> step + 1

It is compiled once: whatever may change from step to step, the learning rate and the
data included, is an argument of the compiled program and no constant in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optloss.adopt import adopt_state
from optloss.averages import AverageState, averaged, start_average, update_average
from optloss.chain import Chain
from optloss.compiled import CompiledStep
from optloss.describe import describe
from optloss.donation import clear_if_deleted
from optloss.evaluation import evaluation_params
from optloss.extra import fill_masked
from optloss.gradients import ValueAndGrad
from optloss.loss import Outcome, run_projection, run_update_ops
from optloss.mesh import shard_like, shard_state
from optloss.messages import argument_error, short_repr
from optloss.objective import (
    Objective,
    conjugate,
    given_gradients,
    given_outcome,
    missing_argument,
    only_arrays,
)
from optloss.replicas import shared_gradient
from optloss.stages import ChainState
from optloss.state_check import check_part, part_error
from optloss.summaries import Asked, step_summaries
from optloss.trees import increment, own_copy, select_leaves
from optloss.typing import AxisName, PyTree, Scalar, Schedule, UpdateContext


class TrainOpState(NamedTuple):
    """All that a training run is: what a checkpoint must hold."""

    step: jax.Array | None  # int32 [], or None where there is no counter
    params: Any
    model_state: Any  # None where the loss has none
    opt_state: Any
    average: AverageState | None = None  # None without moving_average


class StepOutput(NamedTuple):
    """What one step reports."""

    loss: Any  # float [], before the update; None if apply_gradients was given none
    aux: Any
    summaries: dict[str, jax.Array | Any]  # by tag; a Histogram under some


class Moved(NamedTuple):
    """What an update has moved, besides the state of the chain."""

    trained: PyTree
    average: AverageState | None
    model_state: PyTree


ADOPT = "train_op.adopt(state) makes one of it, with all that fits."
Step: TypeAlias = tuple[TrainOpState, StepOutput]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainOp:
    """A compiled training step, made by :func:`optimize_loss`.

    ``state = train_op.init(params)`` starts a run and
    ``state, output = train_op(state, *args)`` makes one step of it.

    Example:
        >>> import jax.numpy as jnp, optloss
        >>> train_op = optloss.optimize_loss(
        ...     lambda w, x: jnp.abs(w * x),
        ...     global_step=0, learning_rate=0.1, optimizer="SGD",
        ... )
        >>> state = train_op.init(jnp.array(10.0))
        >>> state, output = train_op(state, 5.0)
        >>> print(state.params, state.step, output.loss)
        9.5 1 50.0
    """

    loss: Callable[..., Any]
    chain: Chain
    global_step: Any
    update_ops: Sequence[Callable[..., Any]] | None
    asked: Asked
    colocate_gradients_with_ops: bool
    increment_global_step: bool
    replica_axis_name: AxisName
    donate: bool
    value_and_grad: ValueAndGrad
    projection: Callable[[PyTree], PyTree] | None
    moving_average: float | Schedule | None

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The chain alone, as :func:`make_optimizer` makes it."""
        return self.chain.transform()

    @property
    def name(self) -> str:
        """The prefix of the summaries' tags."""
        return self.asked.name

    def __repr__(self) -> str:
        """Return the pipeline in order, on one line."""
        gradient = "gradient"
        if self.value_and_grad is not jax.value_and_grad:
            gradient += f" by {short_repr(self.value_and_grad)}"
        if self.chain.start.loss_scale is not None:
            gradient += f" at {self.chain.start.loss_scale.text}"
        texts = [gradient, *self.chain.start.texts]
        if self.projection is not None:
            texts.append(short_repr(self.projection))
        if self.moving_average is not None:
            texts.append(f"moving_average({short_repr(self.moving_average)})")
        if self.global_step is not None and self.increment_global_step:
            texts.append("step + 1")
        line = " -> ".join(texts) + self.chain.start.skips
        return f"{self.name}: {line}" if self.name else line

    def describe(self, params: Any) -> str:
        """Return the pipeline, and a table of what applies to which parameter.

        Args:
            params: The parameters, or their shapes from ``jax.eval_shape``: nothing is
                allocated.

        Returns:
            Lines as wide as the terminal, or 100 columns where there is none, with a
            row a parameter that gives its name, shape, dtype, whether it is trained and
            its multipliers. Rows of like layers are folded.

        Raises:
            ValueError: As :meth:`init`, for names and patterns that match nothing.

        Example:
            >>> import jax.numpy as jnp, optloss
            >>> train_op = optloss.optimize_loss(
            ...     lambda p: p["w"].sum(), global_step=0, learning_rate=0.1,
            ...     optimizer="adam", clip_gradients=1.0,
            ... )
            >>> print(train_op.describe({"w": jnp.ones((2, 3))}).splitlines()[0])
            OptimizeLoss: gradient -> clip_by_global_norm(1.0) -> optax.adam at 0.1 ->
                step + 1
        """
        return describe(self.chain, repr(self), params)

    def init(self, params: Any, model_state: Any = None) -> TrainOpState:
        """Return the state of a run that starts from ``params``.

        Args:
            params: A tree of arrays ``[*shape]``: dicts, lists, Flax or Equinox
                modules.
            model_state: What the loss carries from step to step beside the parameters,
                such as the statistics of a BatchNorm; ``None`` for a loss without.

        Returns:
            A state that shares no buffer with the arguments, so that donating it never
            eats the caller's arrays. Moments get their parameter's sharding. May be
            traced: under ``jit``, ``vmap`` and ``eval_shape``.

        Raises:
            ValueError: If a leaf is no array, nothing is trained, a name or pattern
                matches nothing, or there are update ops and no ``model_state``.
        """
        if self.update_ops and model_state is None:
            raise ValueError(
                f"train_op.init(model_state=None): the {len(self.update_ops)} "
                "update_ops need a model_state to work on. Pass it: "
                "init(params, model_state)."
            )
        opt_state = self.chain.start.init(params)
        params, model_state = jax.tree.map(own_copy, (params, model_state))
        trained = self.chain.start.trained(params)
        if not jax.tree.leaves(trained):
            problem = "it holds no floating array, so there is nothing to train."
            raise argument_error("train_op.init", "params", params, problem)
        step = None
        if self.global_step is not None:
            step = jnp.array(self.global_step, jnp.int32, copy=True)
        average = None
        if self.moving_average is not None:
            average = start_average(trained)
        state = TrainOpState(step, params, model_state, opt_state, average)
        return shard_state(state, params)

    def adopt(self, old_state: Any, params: Any = None) -> TrainOpState:
        """Return a state of this op that goes on from the state of another op.

        For a run that is changed on the way: a layer unfrozen or added, a stage more or
        less, another optimizer, packed or not. Kept is what the old state has under the
        same name and shape: parameters, model_state, step, moments by parameter, noise,
        statistics of a clip of the same kind, counters. The rest is fresh.

        Args:
            old_state: A :class:`TrainOpState`, or the nested dicts that a checkpointer
                made of one.
            params: Parameters that are new, or in another container. Those of the old
                state's names and shapes take their values from it.

        Returns:
            A state that shares no buffer with the arguments.

        Raises:
            ValueError: If ``old_state`` is no such state, or is packed and does not say
                which parameters are; as :meth:`init`.

        Note:
            A ``UserWarning`` says which parameters are newly trained under a count that
            has moved on: with Adam's bias correction their first steps are up to six
            times too long.

        Example:
            >>> import jax.numpy as jnp, optloss
            >>> def op(**options):
            ...     return optloss.optimize_loss(
            ...         lambda p: jnp.sum(p["w"] ** 2),
            ...         global_step=0, learning_rate=0.1, optimizer="adam", **options
            ...     )
            >>> state, _ = op()(op().init({"w": jnp.ones(2)}))
            >>> state = op(clip_gradients=1.0).adopt(state)
            >>> print(state.step, state.opt_state.optimizer.inner[0].count)
            1 1

        See also:
            :func:`carry_over`, for the state of a chain.
        """
        state: TrainOpState = adopt_state(self.init, old_state, params)
        return shard_state(state, state.params)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainOp:
        """Return the op itself: it never changes."""
        return self

    def __call__(self, state: TrainOpState, *args: Any, **kwargs: Any) -> Step:
        """Make one step, compiled; the buffers of ``state`` are donated.

        Arrays of ``state`` may also be among the arguments: they are copied before.
        """
        state = _checked("train_op", state)
        with clear_if_deleted("train_op(state)", state):
            return self._compiled(state, *args, **kwargs)

    @functools.cached_property
    def _compiled(self) -> CompiledStep:
        return CompiledStep(self._step, self.donate)

    def update(self, state: TrainOpState, *args: Any, **kwargs: Any) -> Step:
        """Make one step, pure and not compiled: for ``lax.scan`` or a ``jit`` of yours.

        Args:
            state: What :meth:`init` or the step before returned.
            *args: Passed on to the loss, all traced.
            **kwargs: Passed on to the loss, all traced.

        Returns:
            The new state and a :class:`StepOutput`.

        Raises:
            ValueError: If ``state`` is no state, or the loss returns something else
                than the contract of :func:`optimize_loss` says.
        """
        state = _checked("train_op", state)
        with clear_if_deleted("train_op.update(state)", state):
            return self._step(None, state, *args, **kwargs)

    def apply_gradients(
        self,
        state: TrainOpState,
        gradients: PyTree,
        *,
        loss: Scalar | None = None,
        aux: PyTree = None,
        model_state: PyTree = None,
    ) -> Step:
        """Make one step, compiled, from gradients that come from elsewhere.

        For reinforcement learning, meta-learning, several losses: all that follows the
        gradient is done as in a step of the loss, summaries included.

        Args:
            state: What :meth:`init` or the step before returned; its buffers are
                donated.
            gradients: A tree that holds, under the name of each trained parameter, its
                gradient in the parameter's shape, as ``jax.grad`` gives it. What else
                it holds is not looked at. They are taken as unscaled by a
                ``loss_scale``.
            loss: A real scalar for the summaries, the guard and the optimizer.
            aux: What the update ops see as ``context.aux``; arrays.
            model_state: The new one; ``None`` keeps that of the state.

        Returns:
            The new state and a :class:`StepOutput`, whose loss is ``loss``.

        Raises:
            ValueError: If a trained parameter has no gradient, one has another shape,
                or the optimizer needs the loss, or the loss as a function, which a line
                search evaluates.

        Example:
            >>> import jax, jax.numpy as jnp, optloss
            >>> def loss(w, x):
            ...     return jnp.sum((w - x) ** 2)
            >>> train_op = optloss.optimize_loss(
            ...     loss, global_step=0, learning_rate=0.1, optimizer="sgd"
            ... )
            >>> state = train_op.init(jnp.array([1.0, 2.0]))
            >>> gradients = jax.jacfwd(loss)(state.params, 0.0)
            >>> state, output = train_op.apply_gradients(state, gradients)
            >>> print(state.params)
            [0.8 1.6]
        """
        call = "train_op.apply_gradients"
        state = _checked(call, state)
        with clear_if_deleted(f"{call}(state)", state):
            return self._compiled_application(
                state, only_arrays(gradients), loss, aux, model_state
            )

    @functools.cached_property
    def _compiled_application(self) -> CompiledStep:
        return CompiledStep(self._applied, self.donate)

    def _applied(
        self,
        shardings: Any,
        state: TrainOpState,
        gradients: Any,
        loss: Any,
        aux: Any,
        model_state: Any,
    ) -> Step:
        trained = self.chain.start.trained(state.params)
        self._check_whose("train_op.apply_gradients(state)", state, trained)
        gradients = conjugate(given_gradients(gradients, trained))
        outcome = given_outcome(loss, aux, model_state, state.model_state)
        with jax.named_scope(self.name or "OptimizeLoss"):
            try:
                return self._advance(state, trained, outcome, gradients, shardings)
            except TypeError as error:
                raise missing_argument(error) from error

    def averaged(self, state: TrainOpState) -> Any:
        """Return the parameters with the moving average of those that are trained.

        Args:
            state: What :meth:`init` or a step returned; its arrays may be traced.

        Returns:
            A tree like ``state.params``, in its dtypes, of arrays of its own, which a
            donated step does not take.

        Raises:
            ValueError: If there is no ``moving_average``.

        Example:
            >>> import jax.numpy as jnp, optloss
            >>> train_op = optloss.optimize_loss(
            ...     lambda w: w**2, global_step=0, learning_rate=0.5, optimizer="sgd",
            ...     moving_average=0.9,
            ... )
            >>> state = train_op.init(jnp.array(1.0))
            >>> state, output = train_op(state)
            >>> print(state.params, train_op.averaged(state).round(3))
            0.0 0.1
        """
        _checked("train_op.averaged", state)
        if state.average is None:
            raise ValueError(
                "train_op.averaged(state): the state holds no average. Make the op "
                "with optimize_loss(moving_average=0.999)."
            )
        with clear_if_deleted("train_op.averaged(state)", state):
            return averaged(state.average, state.params)

    def evaluation_params(self, state: TrainOpState) -> Any:
        """Return the parameters to evaluate with.

        A schedule-free optimizer trains at other parameters than those it is to be
        judged by; with any other they are those of the state. For the average that
        ``moving_average`` keeps there is :meth:`averaged`.

        Args:
            state: What :meth:`init` or a step returned; its arrays may be traced.

        Returns:
            A tree like ``state.params``, of arrays of its own, which a donated step
            does not take.

        Example:
            >>> import jax.numpy as jnp, optloss
            >>> train_op = optloss.optimize_loss(
            ...     lambda w: w**2, global_step=0, learning_rate=0.1,
            ...     optimizer="schedule_free_sgd",
            ... )
            >>> state = train_op.init(jnp.array(1.0))
            >>> for _ in range(9):
            ...     state, output = train_op(state)
            >>> print(train_op.evaluation_params(state) == state.params)
            False

        References:
            Defazio et al., *The Road Less Scheduled*, 2024, arXiv:2405.15682.
        """
        call = "train_op.evaluation_params"
        _checked(call, state)
        trained = self.chain.start.trained(state.params)
        layout, size = self.chain.start.layout(trained), self.chain.start.pack_size
        moved = evaluation_params(state.opt_state, trained, layout, size)
        with clear_if_deleted(f"{call}(state)", state):
            return jax.tree.map(own_copy, fill_masked(moved, state.params))

    def _step(
        self, shardings: Any, state: TrainOpState, /, *args: Any, **kwargs: Any
    ) -> Step:
        objective = Objective(
            loss=self.loss,
            params=state.params,
            model_state=state.model_state,
            selected=self.chain.start.selected(state.params),
            ops_follow=self.update_ops is not None,
            args=args,
            kwargs=kwargs,
        )
        trained = select_leaves(state.params, objective.selected)
        self._check_whose("train_op(state)", state, trained)
        with jax.named_scope(self.name or "OptimizeLoss"):
            outcome, gradients = objective.gradient(
                trained, self.value_and_grad, self.chain.scale(state.opt_state)
            )
            gradients = shared_gradient(
                gradients, self.chain.axis_name, self.replica_axis_name
            )
            value_fn = objective.value_fn
            return self._advance(
                state, trained, outcome, gradients, shardings, value_fn=value_fn
            )

    def _advance(
        self,
        state: TrainOpState,
        trained: PyTree,
        outcome: Outcome,
        gradients: PyTree,
        shardings: Any,
        **extra: Any,
    ) -> Step:
        """Return the state after an update by these ``gradients``."""
        if self.colocate_gradients_with_ops:
            selected = self.chain.start.selected(state.params)
            wanted = shardings and select_leaves(shardings.params, selected)
            gradients = shard_like(gradients, trained, wanted)
        # As JAX gives it, which is what the line searches compute with.
        extra["grad"] = conjugate(gradients)
        if outcome.loss is not None:
            extra["value"] = outcome.loss
        if state.step is not None:
            extra["step"] = state.step
        shaped, before = self.chain.before(gradients, state.opt_state, trained, extra)
        ready, norm = self.chain.ready(shaped, trained)

        def update() -> tuple[Moved, ChainState]:
            updates, after = self.chain.after(ready, before, trained, extra, norm)
            moved = optax.apply_updates(trained, updates)
            return self._moved(state, outcome, moved), after

        def nothing() -> Moved:
            return Moved(trained, state.average, state.model_state)

        moved, opt_state = self.chain.guard(
            state.opt_state, norm, outcome.loss, update, nothing
        )
        step = state.step
        if step is not None and self.increment_global_step:
            step = increment(step)
        measured = None
        if self.asked.gradients:
            measured = self.chain.measured(shaped, before, trained, extra, norm)
        rates = self.chain.rates(opt_state)
        summaries = step_summaries(
            self.asked, outcome.loss, rates, measured, state.step
        )
        params = fill_masked(moved.trained, state.params)
        new_state = TrainOpState(
            step, params, moved.model_state, opt_state, moved.average
        )
        return new_state, StepOutput(outcome.loss, outcome.aux, summaries)

    def _moved(self, state: TrainOpState, outcome: Outcome, trained: PyTree) -> Moved:
        """Return what follows the optimizer: projection, average and update ops."""
        if self.projection is not None:
            trained = run_projection(self.projection, trained)
        average = state.average
        if self.moving_average is not None and average is not None:
            average = update_average(self.moving_average, average, trained, state.step)
        params = fill_masked(trained, state.params)
        context = UpdateContext(params, outcome.aux, outcome.loss, state.step)
        ops = self.update_ops or ()
        model_state = run_update_ops(ops, outcome.model_state, context)
        return Moved(trained, average, model_state)

    def _check_whose(self, call: str, state: TrainOpState, trained: PyTree) -> None:
        """Refuse a state of another op; while tracing, so at no cost to a step."""
        counter = jax.ShapeDtypeStruct((), jnp.int32)
        step = None if self.global_step is None else counter
        check_part(call, "step counter", state.step, step, ADOPT)
        if self.update_ops and state.model_state is None:
            raise part_error(call, "model_state", "none", "what update_ops work on", "")
        average = None
        if self.moving_average is not None:
            average = jax.eval_shape(start_average, trained)
        check_part(call, "moving average", state.average, average, ADOPT)
        self.chain.start.check(call, state.opt_state, trained, ADOPT)


def _checked(call: str, state: Any) -> TrainOpState:
    """Return ``state`` with an array as its step, if it is a state at all."""
    if not isinstance(state, TrainOpState):
        advice = "Make one with state = train_op.init(params)."
        if isinstance(state, tuple) and isinstance((*state, None)[0], TrainOpState):
            advice = "Take the pair apart: state, output = train_op(state, ...)."
        elif isinstance(state, StepOutput):
            advice = "It stands first: state, output = train_op(state, ...)."
        problem = f"the first argument must be a TrainOpState. {advice}"
        raise argument_error(call, "state", state, problem)
    # A restored step may be an int, whose weak type would be compiled for by itself.
    if not isinstance(state.step, int):
        return state
    return state._replace(step=jnp.asarray(state.step, jnp.int32))

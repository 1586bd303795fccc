"""The training op: one call makes the loss, the gradients and the whole update.

    state -> loss and gradients -> chain -> parameters -> update ops -> step + 1

It is compiled once: whatever may change from step to step, the learning rate and the
data included, is an argument of the compiled program and no constant in it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optloss.adopt import adopt_state
from optloss.arguments import as_arrays
from optloss.chain import Chain
from optloss.describe import describe, one_line
from optloss.donation import clear_if_deleted, copies_of_donated
from optloss.evaluation import evaluation_params
from optloss.extra import fill_masked
from optloss.fast.handover import Stacked
from optloss.histograms import Histogram
from optloss.loss import Outcome, call_loss, run_update_ops
from optloss.mesh import kept_shardings, shard_like, shard_state
from optloss.messages import short_repr
from optloss.stages import ChainState
from optloss.state_check import check_part, part_error
from optloss.summaries import Asked, step_summaries
from optloss.trees import (
    increment,
    map_inexact,
    merge_leaves,
    own_copy,
    select_leaves,
)
from optloss.typing import PyTree


class TrainOpState(NamedTuple):
    """All that a training run is: what a checkpoint must hold."""

    step: jax.Array | None  # int32 [], or None where there is no counter
    params: Any
    model_state: Any  # None where the loss has none
    opt_state: Any


class StepOutput(NamedTuple):
    """What one step reports."""

    loss: jax.Array  # float [], before the update
    aux: Any
    summaries: dict[str, jax.Array | Histogram]  # by tag


class UpdateContext(NamedTuple):
    """What an update op may look at."""

    params: Any  # after the update
    aux: Any
    loss: jax.Array  # before the update
    step: jax.Array | None  # before its increment


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
    donate: bool

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The chain alone, as :func:`make_optimizer` makes it."""
        return self.chain.transform()

    @property
    def name(self) -> str:
        """The prefix of the summaries' tags."""
        return self.asked.name

    @property
    def _counts(self) -> bool:
        return self.global_step is not None and self.increment_global_step

    def __repr__(self) -> str:
        """Return the pipeline in order, on one line."""
        return one_line(self.chain, self.name, self._counts)

    def describe(self, params: Any) -> str:
        """Return the pipeline, and a table of what applies to which parameter.

        Args:
            params: The parameters, or their shapes from ``jax.eval_shape``: nothing is
                allocated.

        Returns:
            Lines of at most 100 columns, with a row a parameter that gives its name,
            shape, dtype, whether it is trained and its multipliers. Rows of like
            layers are folded.

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
        return describe(self.chain, self.name, params, self._counts)

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
        params = as_arrays(self.chain.call, params)
        opt_state = self.chain.init(params)
        if not any(self.chain.selected(params)):
            raise ValueError(
                f"train_op.init(params={short_repr(params)}): it holds no floating "
                "array, so "
                "there is nothing to train."
            )
        params, model_state = jax.tree.map(own_copy, (params, model_state))
        step = None
        if self.global_step is not None:
            step = jnp.array(self.global_step, jnp.int32, copy=True)
        state = TrainOpState(step, params, model_state, opt_state)
        placed: TrainOpState = shard_state(state, params)
        return placed

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
        state = adopt_state("train_op.adopt", self.init, old_state, params)
        placed: TrainOpState = shard_state(state, state.params)
        return placed

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainOp":
        """Return the op itself: it never changes."""
        return self

    def __call__(self, state: TrainOpState, *args: Any, **kwargs: Any) -> Step:
        """Make one step, compiled; the buffers of ``state`` are donated.

        Arrays of ``state`` may also be among the arguments: they are copied before.
        """
        _check_state(state)
        state = _with_step_as_array(state)
        with clear_if_deleted("train_op(state)", state):
            if self.donate:
                args, kwargs = copies_of_donated(state, (args, kwargs))
            new_state, loss, aux, found = self._compiled_for(state)(
                state, *args, **kwargs
            )
            return new_state, StepOutput(loss, aux, found.summaries())

    def _compiled_for(self, state: TrainOpState) -> Callable[..., Any]:
        shardings = kept_shardings(state, state.params)
        if shardings is None:
            return self._compiled
        structure = jax.tree.structure(state)
        if (structure, shardings) not in self._compiled_on_a_mesh:
            placed = jax.tree.unflatten(structure, shardings)
            self._compiled_on_a_mesh[structure, shardings] = jax.jit(
                functools.partial(self._handed_over, placed.params),
                donate_argnums=(0,) if self.donate else (),
                out_shardings=(
                    placed,
                    None,
                    None,
                    None,
                ),
            )
        return self._compiled_on_a_mesh[structure, shardings]

    @functools.cached_property
    def _compiled_on_a_mesh(self) -> dict[Any, Callable[..., Any]]:
        return {}

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return jax.jit(
            functools.partial(self._handed_over, None),
            donate_argnums=(0,) if self.donate else (),
        )

    def _handed_over(
        self, shardings: Any, state: TrainOpState, /, *args: Any, **kwargs: Any
    ) -> Any:
        _check_state(state)
        with jax.named_scope(self.name or "OptimizeLoss"):
            new_state, output = self._step(state, args, kwargs, shardings)
        return new_state, output.loss, output.aux, Stacked(output.summaries)

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
        _check_state(state)
        state = _with_step_as_array(state)
        with (
            clear_if_deleted("train_op.update(state)", state),
            jax.named_scope(self.name or "OptimizeLoss"),
        ):
            return self._step(state, args, kwargs)

    def evaluation_params(self, state: TrainOpState) -> Any:
        """Return the parameters to evaluate with.

        A schedule-free optimizer trains at other parameters than those it is to be
        judged by; with any other they are those of the state.

        Args:
            state: What :meth:`init` or a step returned; its arrays may be traced.

        Returns:
            A tree like ``state.params``, of arrays of its own, which a donated step
            does not take.

        Example:
            >>> import jax.numpy as jnp, optloss
            >>> train_op = optloss.optimize_loss(
            ...     lambda w: w**2, global_step=0, learning_rate=0.5,
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
        _check_state(state)
        selected = self.chain.selected(state.params)
        trained = select_leaves(state.params, selected)
        layout, size = self.chain.layout(trained), self.chain.pack_size
        moved = evaluation_params(state.opt_state, trained, layout, size)
        params = merge_leaves(moved, state.params, selected)
        return jax.tree.map(own_copy, params)

    def _step(
        self,
        state: TrainOpState,
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
        shardings: PyTree = None,
    ) -> Step:
        selected = self.chain.selected(state.params)
        trained = select_leaves(state.params, selected)
        self._check_whose(state, trained)
        outcome, gradients = self._differentiate(state, trained, selected, args, kwargs)
        if self.colocate_gradients_with_ops:
            wanted = None if shardings is None else select_leaves(shardings, selected)
            gradients = shard_like(gradients, trained, wanted)
        extra = self._extra(state, outcome, gradients, args, kwargs)
        shaped, before = self.chain.before(gradients, state.opt_state, trained, extra)
        norm = self.chain.norm(shaped)

        def update() -> tuple[tuple[PyTree, PyTree], ChainState]:
            updates, after = self.chain.after(shaped, before, trained, extra, norm)
            moved = optax.apply_updates(trained, updates)
            params = merge_leaves(moved, state.params, selected)
            context = UpdateContext(params, outcome.aux, outcome.loss, state.step)
            ops = self.update_ops or ()
            return (moved, run_update_ops(ops, outcome.model_state, context)), after

        def nothing() -> tuple[PyTree, PyTree]:
            return trained, state.model_state

        (moved, model_state), opt_state = self.chain.guard(
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
        params = merge_leaves(moved, state.params, selected)
        new_state = TrainOpState(step, params, model_state, opt_state)
        return new_state, StepOutput(outcome.loss, outcome.aux, summaries)

    def _check_whose(self, state: TrainOpState, trained: PyTree) -> None:
        """Refuse a state of another op; while tracing, so at no cost to a step."""
        call = "train_op(state)"
        counter = jax.ShapeDtypeStruct((), jnp.int32)
        step = None if self.global_step is None else counter
        check_part(call, "step counter", state.step, step, ADOPT)
        if self.update_ops and state.model_state is None:
            raise part_error(call, "model_state", "none", "what update_ops work on", "")
        self.chain.check(call, state.opt_state, trained, ADOPT)

    def _extra(
        self, state: TrainOpState, outcome: Outcome, gradients: Any, args: Any, kw: Any
    ) -> dict[str, Any]:
        """Return what the transforms may ask for besides the gradient."""

        def value_fn(trained: Any, step: Any = None) -> jax.Array:
            del step  # optax hands on all that a line search does not name
            params = fill_masked(trained, state.params)
            stateful = self.update_ops is not None
            return call_loss(
                self.loss, params, state.model_state, stateful, args, kw
            ).loss

        # As JAX gives it, which is what the line searches compute with.
        grad = _conjugate(gradients)
        extra = {"value": outcome.loss, "grad": grad, "value_fn": value_fn}
        return extra if state.step is None else {**extra, "step": state.step}

    def _differentiate(
        self,
        state: TrainOpState,
        trained: Any,
        selected: list[bool],
        args: Any,
        kw: Any,
    ) -> tuple[Outcome, Any]:
        def objective(trained: Any) -> tuple[jax.Array, Outcome]:
            # Rebuilt in here, so that modules made of them belong to this trace.
            params = merge_leaves(trained, state.params, selected)
            model_state = jax.tree.map(lambda leaf: leaf, state.model_state)
            outcome = call_loss(
                self.loss, params, model_state, self.update_ops is not None, args, kw
            )
            return outcome.loss, outcome

        (_, outcome), gradients = jax.value_and_grad(objective, has_aux=True)(trained)
        # JAX's gradient of a complex leaf points uphill only once it is conjugated.
        return outcome, _conjugate(gradients)


def _conjugate(tree: Any) -> Any:
    return map_inexact(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, tree)


def _check_state(state: Any) -> None:
    if not isinstance(state, TrainOpState):
        pair = isinstance(state, tuple) and isinstance((*state, None)[0], TrainOpState)
        advice = (
            "Take the pair apart: state, output = train_op(state, ...)."
            if pair
            else "Make one with state = train_op.init(params)."
        )
        raise ValueError(
            f"train_op(state={short_repr(state)}): the first argument must be a "
            f"TrainOpState. {advice}"
        )


def _with_step_as_array(state: TrainOpState) -> TrainOpState:
    # A restored step may be an int, whose weak type would be compiled for by itself.
    if not isinstance(state.step, int):
        return state
    return state._replace(step=jnp.asarray(state.step, jnp.int32))

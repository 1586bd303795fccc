"""The chain of one training step, in TensorFlow's order.

    gradient -> + noise -> x multipliers -> (norm measured) -> clip -> optimizer -> x
    multipliers

It falls into two halves. The first shapes the gradient, whose norm is measured then;
the second makes an update of it. Between them stands the guard, which looks at the norm
and the loss, and has the second half done or everything left as it was. The training op
runs the halves itself, since what it guards is more than the chain.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from optloss.arguments import Given, as_arrays, stages_of
from optloss.extra import fill_masked
from optloss.fast.packing import (
    Layout,
    layout_of,
    pack,
    pack_small_leaves,
    table_of,
)
from optloss.guard import count_skipped, is_finite, start_skipping, update_if
from optloss.loss_scale import LossScale, as_loss_scale
from optloss.mesh import AxisName
from optloss.names import first_match, leaf_names, select
from optloss.norms import global_norm
from optloss.rates import used_rates
from optloss.stages import (
    ChainState,
    Extra,
    Stages,
    in_turn,
    looks_at_leaves,
    offers_norms,
    run,
    run_clip,
)
from optloss.state_check import check_state
from optloss.summaries import Measured
from optloss.transforms.multipliers import start_multiplying
from optloss.trees import (
    keep_dtypes,
    merge_leaves,
    negative_zeros,
    own_copies,
    select_leaves,
)
from optloss.typing import (
    Clip,
    DecayFn,
    LearningRate,
    Multipliers,
    NoiseScale,
    Optimizer,
    PyTree,
    Variables,
)

Transform = optax.GradientTransformationExtraArgs
CARRY_OVER = (
    "optloss.carry_over(state, tx.init(params)) makes one of it, with all that fits."
)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Chain:
    """The stages of a training step and the selection of parameters they work on.

    Trees that the two halves are given hold ``optax.MaskedNode()`` in place of what is
    not trained.
    """

    call: str
    stages: Stages
    variables: Any
    skip_nonfinite: bool
    pack_size: int
    axis_name: AxisName
    loss_scale: LossScale | None = None

    @classmethod
    def of(cls, call: str, given: Given) -> "Chain":
        """Return the chain that these arguments of ``call`` ask for."""
        stages = stages_of(call, given)
        scale = as_loss_scale(call, given.get("loss_scale"))
        is_dynamic = scale is not None and scale.is_dynamic
        return cls(
            call=call,
            stages=stages,
            variables=given["variables"],
            skip_nonfinite=given["skip_nonfinite"] or is_dynamic,
            pack_size=int(given["pack_small_leaves"]),
            axis_name=given["axis_name"],
            loss_scale=scale,
        )

    def transform(self) -> Transform:
        """Return both halves and what stands between them as one transform."""
        return Transform(self.init, self._update)

    def selected(self, params: PyTree) -> list[bool]:
        """Return, for each leaf of ``params``, whether it is trained."""
        return select(self.call, self.variables, params)

    def init(self, params: PyTree) -> PyTree:
        """Return the state for ``params``, with all names and patterns checked.

        An optimizer may keep the starting weights, one array twice, or an array of the
        caller's. The state holds copies, so that donating it takes nothing of theirs.
        """
        leaves, structure = jax.tree.flatten(self._named_start(params))
        return jax.tree.unflatten(structure, own_copies(leaves))

    def _named_start(self, params: PyTree) -> PyTree:
        params = as_arrays(self.call, params)
        names = leaf_names(params)
        # Without leaves it is a placeholder for parameters, or nothing is trained.
        for stage in (self.stages.multipliers, self.stages.rate_multipliers):
            where = f"{self.call}, {stage.scope}"
            first_match(where, tuple(stage.rules), names, check=bool(names))
        trained = select_leaves(params, self.selected(params))
        if self.stages.optimizer.groups is not None and names:
            self.stages.optimizer.groups.check(names, leaf_names(trained))
        return self._start(trained)

    def _start(self, trained: PyTree) -> PyTree:
        noise = self.stages.noise.transform.init(trained)
        multipliers = [
            start_multiplying(stage.rules)
            for stage in (self.stages.multipliers, self.stages.rate_multipliers)
        ]
        after: PyTree = self._clip_and_optimizer.init(trained)
        table = table_of(self.layout(trained)) if self.pack_size else None
        scale = None if self.loss_scale is None else self.loss_scale.init()
        state = ChainState(noise, *after, table, *multipliers, scale)
        return start_skipping(state) if self.skip_nonfinite else state

    def layout(self, trained: PyTree) -> Layout:
        """Return which leaves the optimizer's state has in which packed vector."""
        groups = self.stages.optimizer.groups
        if not self.pack_size:
            return Layout({})
        if groups is not None:
            return groups.layout(trained, self.pack_size)
        return layout_of(trained, self.pack_size)

    def check(self, call: str, state: PyTree, trained: PyTree, cure: str) -> None:
        """Refuse, in the words of ``call``, a state of another chain or parameters.

        Only shapes are looked at, and those of one structure once.
        """
        shapes = tuple(map(jnp.shape, jax.tree.leaves((state, trained))))
        seen = jax.tree.structure((state, trained)), shapes
        if seen not in self._checked:
            check_state(call, state, self._start, trained, cure)
            self._checked.add(seen)

    @functools.cached_property
    def _checked(self) -> set[Any]:
        return set()

    def _update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        selected = self.selected(updates)
        gradients = select_leaves(updates, selected)
        trained = None if params is None else select_leaves(params, selected)
        like = gradients if trained is None else trained
        self.check("update(state)", state, like, CARRY_OVER)
        extra = {**_of_trained(extra, selected, params)}
        shaped, after_noise = self.before(gradients, state, trained, extra)
        norm = self.norm(shaped)

        def update() -> tuple[PyTree, ChainState]:
            return self.after(shaped, after_noise, trained, extra, norm)

        def nothing() -> PyTree:
            return negative_zeros(jax.eval_shape(update)[0], gradients)

        steps, state = self.guard(state, norm, extra.get("value"), update, nothing)
        return merge_leaves(steps, negative_zeros(updates, updates), selected), state

    def before(
        self, gradients: PyTree, state: PyTree, params: PyTree, extra: Extra
    ) -> tuple[PyTree, ChainState]:
        """Add noise and multiply: the first half."""
        inner = self._inner(state)
        noise, multipliers = self.stages.noise, self.stages.multipliers
        noisy, after = run(noise, gradients, inner.noise, params, extra)
        shaped, counted = run(multipliers, noisy, inner.multipliers, params, extra)
        return shaped, inner._replace(noise=after, multipliers=counted)

    def norm(self, shaped: PyTree) -> jax.Array | None:
        """Return the norm that the guard looks at, ``None`` where there is none."""
        if not self.skip_nonfinite:
            return None
        if self.pack_size:  # one sum for all small leaves
            shaped = pack(shaped, layout_of(shaped, self.pack_size))
        return global_norm(shaped, axis_name=self.axis_name)

    def guard(
        self,
        state: PyTree,
        norm: jax.Array | None,
        loss: jax.Array | None,
        update: Callable[[], tuple[T, ChainState]],
        nothing: Callable[[], T],
    ) -> tuple[T, PyTree]:
        """Return ``update()``, or ``nothing()`` and the old state, bit for bit."""
        if norm is None:
            return update()
        good = is_finite(norm, loss, self.axis_name)
        made, inner = update_if(good, update, (nothing(), state.inner))
        if self.loss_scale is not None and inner.loss_scale is not None:
            scale = self.loss_scale.update(state.inner.loss_scale, good)
            inner = inner._replace(loss_scale=scale)
        return made, count_skipped(state, good)._replace(inner=inner)

    def after(
        self,
        shaped: PyTree,
        state: ChainState,
        params: PyTree,
        extra: Extra,
        norm: jax.Array | None,
    ) -> tuple[PyTree, ChainState]:
        """Clip, optimize and multiply: the second half."""
        both: PyTree = (state.clip, state.optimizer)
        updates, both = self._clip_and_optimizer.update(
            shaped, both, params, gradient_norm=norm, **extra
        )
        clip, optimizer = both
        multipliers, before = self.stages.rate_multipliers, state.rate_multipliers
        updates, counted = run(multipliers, updates, before, params, extra)
        optimizer = keep_dtypes(optimizer, state.optimizer)
        after = state._replace(clip=clip, optimizer=optimizer, rate_multipliers=counted)
        return updates, after

    def measured(
        self,
        shaped: PyTree,
        state: ChainState,
        params: PyTree,
        extra: Extra,
        norm: jax.Array | None,
    ) -> Measured:
        """Return what is to be known of the gradient, before and after the clip.

        XLA merges this clip with the one of :meth:`after`.
        """
        clip = self.stages.clip
        clipped, seen = run_clip(clip, shaped, state.clip, params, extra, norm)
        if not offers_norms(seen):
            return Measured(shaped, clipped, norm, None, uniform=False)
        uniform = getattr(seen, "uniform", False)
        return Measured(shaped, clipped, seen.norm, seen.factor, uniform)

    def rates(self, state: PyTree) -> dict[str, jax.Array]:
        """Return the learning rates of the latest update by tag, where known."""
        return used_rates(self._inner(state).optimizer)

    def scale(self, state: PyTree) -> jax.Array | None:
        """Return what the loss is multiplied by, ``None`` without a loss scale."""
        if self.loss_scale is None:
            return None
        return self.loss_scale.scale(self._inner(state).loss_scale)

    def _inner(self, state: PyTree) -> ChainState:
        inner: ChainState = state.inner if self.skip_nonfinite else state
        return inner

    @functools.cached_property
    def _clip_and_optimizer(self) -> Transform:
        clip, optimizer = self.stages.clip, self.stages.optimizer
        if not self.pack_size:
            return in_turn(clip, optimizer)
        if optimizer.groups is not None:
            packed = optimizer.groups.transform(self.pack_size)
            return in_turn(clip, optimizer._replace(transform=packed))
        if looks_at_leaves(clip):
            packed = pack_small_leaves(optimizer.transform, self.pack_size)
            return in_turn(clip, optimizer._replace(transform=packed))
        return pack_small_leaves(in_turn(clip, optimizer), self.pack_size)


def _of_trained(extra: Extra, selected: list[bool], params: PyTree) -> Extra:
    """Return extra arguments about all parameters as ones about those trained."""
    made = dict(extra)
    if extra.get("grad") is not None:
        made["grad"] = select_leaves(extra["grad"], selected)
    if extra.get("value_fn") is not None:
        given = extra["value_fn"]

        def value_fn(trained: PyTree, **others: PyTree) -> jax.Array:
            value: jax.Array = given(fill_masked(trained, params), **others)
            return value

        made["value_fn"] = functools.update_wrapper(value_fn, given)
    return made


def make_optimizer(
    learning_rate: LearningRate,
    optimizer: Optimizer,
    *,
    gradient_noise_scale: NoiseScale = None,
    gradient_multipliers: Multipliers | None = None,
    clip_gradients: Clip = None,
    learning_rate_decay_fn: DecayFn | None = None,
    learning_rate_multipliers: Multipliers | None = None,
    variables: Variables = None,
    skip_nonfinite: bool = False,
    seed: int | jax.Array = 0,
    pack_small_leaves: int = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Make the whole chain of :func:`optimize_loss` as one optax transformation.

    It is what goes into a Flax ``TrainState``, an ``nnx.Optimizer`` or a loop of your
    own: noise, multipliers, clip, optimizer at the decayed rate, rate multipliers.

    Args:
        learning_rate: A number, a 0-d array, a schedule, or ``None`` with an optimizer
            that brings its own; or a mapping from names or patterns to such.
        optimizer: A name, a function of the learning rate, a class, an instance, or a
            function without arguments, or a mapping from names or patterns to such;
            see :func:`optimize_loss`.
        gradient_noise_scale: Standard deviation of Gaussian noise, a function of the
            step, or a transformation.
        gradient_multipliers: Maps names or patterns to factors of the gradient. Adam,
            Adagrad and RMSProp nearly undo them.
        clip_gradients: Largest global norm, a transformation such as
            :func:`adaptive_clipping`, or a function of ``(gradient, variable)`` pairs.
        learning_rate_decay_fn: ``fn(learning_rate, step) -> rate``.
        learning_rate_multipliers: Maps names or patterns to factors of the update.
        variables: Which parameters are trained: names or patterns, a predicate
            ``(name, leaf) -> bool`` or a tree of bools. The updates of the others are
            negative zeros, which leave them bit for bit.
        skip_nonfinite: Whether an update whose gradient holds NaN or infinity is
            skipped. The loss is judged, too, if ``value=loss`` is passed to ``update``.
        seed: Where the noise starts: an int or a JAX key.
        pack_small_leaves: Largest size of a leaf that is packed with its like while an
            elementwise optimizer works on it; 0 packs none.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over.

    Returns:
        A transform. Its ``update`` takes the extra arguments ``step=`` (the global
        step, which annealing, warm-up and decay read; without it each counts for
        itself), ``value=`` (the loss), and for line searches ``grad=`` and
        ``value_fn=``, the loss as a function of the parameters. Updates keep shape
        ``[*shape]``; they may be float32 for half-precision leaves until they are
        applied.

    Raises:
        ValueError: As :func:`optimize_loss` for the same arguments.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = make_optimizer(0.1, "SGD", clip_gradients=1.0)
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> print(optax.apply_updates(params, updates)["w"])
        [2.94 3.92]

    See also:
        :func:`optimize_loss`, :func:`set_learning_rate`, :func:`get_summaries`.
    """
    given = locals()
    return Chain.of("make_optimizer", given).transform()

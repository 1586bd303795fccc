"""The chain of one training step, in TensorFlow's order.

    gradient -> + noise -> x multipliers -> (norm measured) -> clip -> optimizer -> x
    multipliers

It falls into two halves. The first shapes the gradient and measures it; whether an
update is made at all is judged in the middle; the second turns the gradient into an
update. The training op runs the halves itself, :func:`make_optimizer` makes one
transform of them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.messages import check_bool, is_number, show
from optloss.names import assign, leaf_names, select
from optloss.norms import global_norm
from optloss.packed import Packed, layout_of, pack, unpack
from optloss.stages import (
    NOTHING,
    AxisName,
    Stage,
    check_axis_name,
    check_learning_rate,
    check_pack_size,
    check_variables,
    clip_stage,
    multiplier_stage,
    noise_stage,
    optimizer_stage,
)
from optloss.transforms.adaptive_clipping import AdaptiveClippingState
from optloss.transforms.clipping import ClipState
from optloss.transforms.nonfinite import is_finite, skip_unless, start_skipping
from optloss.transforms.packing import pack_small_leaves
from optloss.trees import freeze, keep_dtypes, negative_zeros, scale_leaves, thaw


class ChainState(NamedTuple):
    """The states of the stages, in their order."""

    noise: Any
    clip: Any
    optimizer: Any


class Shaped(NamedTuple):
    """A gradient on its way, half through the chain."""

    measured: Any  # a tree, or Packed
    factor: Any  # float [], of a clip of ours that is still to be multiplied by
    like: Any  # the tree the gradients came as
    state: ChainState
    norm: Any  # float [], before the clip; None where it was not measured
    clipped_norm: Any  # float [], behind it; None without a clip

    def gradients(self) -> Any:
        """Return the clipped gradients.

        They are multiplied where they are used: made before a branch that takes them,
        they would be written to memory once more.
        """
        if self.factor is None:
            return self.measured
        return scale_leaves(self.measured, self.factor)


@dataclasses.dataclass(frozen=True)
class Chain:
    """The stages of a training step and the selection of parameters they work on.

    Trees that its two halves are given hold ``optax.MaskedNode()`` in place of what is
    not trained.
    """

    call: str
    noise: Stage
    multipliers: Stage
    clip: Stage
    optimizer: Stage
    rate_multipliers: Stage
    variables: Any
    skip_nonfinite: bool
    pack_size: int
    axis_name: AxisName

    @property
    def stages(self) -> list[Stage]:
        """The stages that do something, in order."""
        every = (
            self.noise,
            self.multipliers,
            self.clip,
            self.optimizer,
            self.rate_multipliers,
        )
        return [stage for stage in every if stage is not NOTHING]

    def selected(self, params: Any) -> list[bool]:
        """Return, for each leaf of ``params``, whether it is trained."""
        return select(self.call, self.variables, params)

    def init(self, params: Any) -> Any:
        """Return the state for ``params``, with all names and patterns checked."""
        params = as_arrays(self.call, params)
        names = leaf_names(params)
        for stage in (self.multipliers, self.rate_multipliers):
            assign(f"{self.call}, {stage.argument}", tuple(stage.rules), names)
        trained = freeze(params, self.selected(params))
        state = ChainState(
            noise=self.noise.transform.init(trained),
            clip=self.clip.transform.init(trained),
            optimizer=self._optimizer().init(trained),
        )
        return start_skipping(state) if self.skip_nonfinite else state

    def shape(
        self, gradients: Any, state: ChainState, params: Any, extra: Any, measure: bool
    ) -> Shaped:
        """Add noise, multiply, measure and clip: the first half.

        Without a clip of ours the norms cost a reduction, which ``measure`` asks for.
        """
        like = gradients
        if self.pack_size and self.noise.packs and self.clip.packs:
            layout = layout_of(gradients if params is None else params, self.pack_size)
            gradients = pack(gradients, layout)
        with jax.named_scope("noise"):
            noisy, noise = self.noise.transform.update(
                gradients, state.noise, params, **extra
            )
        with jax.named_scope("multipliers"):
            measured, _ = self.multipliers.transform.update(noisy, optax.EmptyState())
        with jax.named_scope("clip"):
            clipped, clip = self.clip.transform.update(
                measured, state.clip, params, **extra
            )
        states = ChainState(noise, clip, state.optimizer)
        if isinstance(clip, (ClipState, AdaptiveClippingState)):
            norms: tuple[Any, Any] = clip.norm, clip.norm * clip.factor
            return Shaped(measured, clip.factor, like, states, *norms)
        clips = measure and self.clip is not NOTHING
        norms = (
            self._norm(measured) if measure else None,
            self._norm(clipped) if clips else None,
        )
        return Shaped(clipped, None, like, states, *norms)

    def _norm(self, tree: Any) -> jax.Array:
        return global_norm(tree, axis_name=self.axis_name)

    def _optimizer(self) -> optax.GradientTransformationExtraArgs:
        transform = self.optimizer.transform
        return (
            pack_small_leaves(transform, self.pack_size)
            if self.pack_size
            else transform
        )

    def optimize(self, shaped: Shaped, params: Any, extra: Any) -> tuple[Any, Any]:
        """Turn the shaped gradient into an update: the second half."""
        before = shaped.state.optimizer
        with jax.named_scope("clip"):
            gradients = shaped.gradients()
        with jax.named_scope("optimizer"):
            updates, after = self._optimizer().update(
                gradients, before, params, **extra
            )
            if isinstance(updates, Packed):
                updates = unpack(updates.tree, shaped.like, updates.layout)
        with jax.named_scope("learning_rate_multipliers"):
            updates, _ = self.rate_multipliers.transform.update(
                updates, optax.EmptyState()
            )
        state = shaped.state._replace(optimizer=keep_dtypes(after, before))
        return updates, state

    def move(self, shaped: Shaped, params: Any, extra: Any) -> tuple[Any, Any]:
        """Turn the shaped gradient into new parameters: the second half, applied."""
        updates, state = self.optimize(shaped, params, extra)
        return optax.apply_updates(params, updates), state

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """Return both halves as one transform."""
        return optax.GradientTransformationExtraArgs(self.init, self._update)

    def _update(
        self, updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        selected = self.selected(updates)
        gradients = freeze(updates, selected)
        trained = None if params is None else freeze(params, selected)
        steps, state = self._update_trained(gradients, state, trained, extra)
        return thaw(steps, negative_zeros(updates, updates), selected), state

    def _update_trained(
        self, gradients: Any, state: Any, params: Any, extra: Any
    ) -> tuple[Any, Any]:
        before = state.inner if self.skip_nonfinite else state
        shaped = self.shape(gradients, before, params, extra, self.skip_nonfinite)
        if not self.skip_nonfinite:
            return self.optimize(shaped, params, extra)
        return skip_unless(
            is_finite(shaped.norm, extra, self.axis_name),
            state,
            lambda: self.optimize(shaped, params, extra),
            lambda shapes: negative_zeros(shapes, gradients),
        )


def as_arrays(call: str, params: Any) -> Any:
    """Return ``params`` with numbers as arrays; refuse leaves that are neither."""
    leaves, structure = jax.tree.flatten(params)
    for i, (name, leaf) in enumerate(zip(leaf_names(params), leaves, strict=True)):
        if is_number(leaf):
            leaves[i] = jnp.asarray(leaf)
        elif not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            raise ValueError(
                f"{call}: the parameter {name!r} is no array but {show(leaf)}. Keep "
                "such leaves outside, for example with params, static = eqx.partition("
                "model, eqx.is_inexact_array), and combine them inside the loss."
            )
    return jax.tree.unflatten(structure, leaves)


def make_optimizer(
    learning_rate: Any,
    optimizer: Any,
    *,
    gradient_noise_scale: Any = None,
    gradient_multipliers: Any = None,
    clip_gradients: Any = None,
    learning_rate_decay_fn: Any = None,
    learning_rate_multipliers: Any = None,
    variables: Any = None,
    skip_nonfinite: bool = False,
    seed: Any = 0,
    pack_small_leaves: int = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Make the whole chain of :func:`optimize_loss` as one optax transformation.

    It is what goes into a Flax ``TrainState``, an ``nnx.Optimizer`` or a loop of your
    own: noise, multipliers, clip, optimizer at the decayed rate, rate multipliers.

    Args:
        learning_rate: A number, a 0-d array, a schedule, or ``None`` with an optimizer
            that brings its own.
        optimizer: A name, a function of the learning rate, a class, an instance, or a
            function without arguments; see :func:`optimize_loss`.
        gradient_noise_scale: Standard deviation of Gaussian noise, or a transformation.
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
        itself) and ``value=`` (the loss). Updates keep shape ``[*shape]``; they may be
        float32 for half-precision leaves until they are applied.

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
    call = "make_optimizer"
    check_learning_rate(call, learning_rate, optimizer, learning_rate_decay_fn)
    return Chain(
        call=call,
        optimizer=optimizer_stage(
            call, learning_rate, optimizer, learning_rate_decay_fn
        ),
        clip=clip_stage(call, clip_gradients, axis_name),
        noise=noise_stage(call, gradient_noise_scale, seed, axis_name),
        multipliers=multiplier_stage(
            call, "gradient_multipliers", gradient_multipliers
        ),
        rate_multipliers=multiplier_stage(
            call, "learning_rate_multipliers", learning_rate_multipliers
        ),
        variables=check_variables(call, variables),
        skip_nonfinite=check_bool(call, "skip_nonfinite", skip_nonfinite),
        pack_size=check_pack_size(call, pack_small_leaves, learning_rate, optimizer),
        axis_name=check_axis_name(call, axis_name),
    ).transform()

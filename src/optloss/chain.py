"""The chain of one training step, in TensorFlow's order.

    gradient -> + noise -> x multipliers -> (norm measured) -> clip -> optimizer -> x
    multipliers

It falls into two halves. The first shapes the gradient, whose norm is measured then;
the second makes an update of it. Between them stands the guard, which looks at the norm
and the loss, and has the second half done or everything left as it was. The training op
runs the halves itself, since what it guards is more than the chain.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import optax

from optloss.chain_start import ChainStart
from optloss.extra import about_trained
from optloss.fast.packing import layout_of, pack
from optloss.guard import judge, update_if
from optloss.norms import global_norm
from optloss.optimizer_argument import Given
from optloss.rates import used_rates
from optloss.replicas import shard_axes
from optloss.stages import ChainState, Extra, offers_norms, run, run_clip
from optloss.summaries import Measured
from optloss.trees import keep_dtypes, merge_leaves, negative_zeros, select_leaves
from optloss.typing import AxisName, PyTree

CARRY_OVER = (
    "optloss.carry_over(state, tx.init(params)) makes one of it, with all that fits."
)
T = TypeVar("T")


class Transform(optax.GradientTransformationExtraArgs):
    """Both halves of a chain as one transform, which prints as what it does."""

    def __repr__(self) -> str:
        return f"make_optimizer: {getattr(self.init, '__self__', self.init)!r}"


@dataclasses.dataclass(frozen=True)
class Chain:
    """The stages of a training step and the selection of parameters they work on.

    Trees that the two halves are given hold ``optax.MaskedNode()`` in place of what is
    not trained.
    """

    start: ChainStart
    axis_name: AxisName

    @classmethod
    def of(cls, call: str, given: Given) -> "Chain":
        """Return the chain that these arguments of ``call`` ask for."""
        return cls(ChainStart.of(call, given), shard_axes(given))

    def transform(self) -> Transform:
        """Return both halves and what stands between them as one transform."""
        return Transform(self.start.init, self._update)

    def _update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        selected = self.start.selected(updates)
        gradients = select_leaves(updates, selected)
        trained = None if params is None else select_leaves(params, selected)
        like = gradients if trained is None else trained
        self.start.check("update(state)", state, like, CARRY_OVER)
        extra = about_trained(extra, selected, params)
        shaped, after_noise = self.before(gradients, state, trained, extra)
        ready, norm = self.ready(shaped, trained)

        def update() -> tuple[PyTree, ChainState]:
            return self.after(ready, after_noise, trained, extra, norm)

        def nothing() -> PyTree:
            return negative_zeros(jax.eval_shape(update)[0], gradients)

        steps, state = self.guard(state, norm, extra.get("value"), update, nothing)
        return merge_leaves(steps, negative_zeros(updates, updates), selected), state

    def before(
        self, gradients: PyTree, state: PyTree, params: PyTree, extra: Extra
    ) -> tuple[PyTree, ChainState]:
        """Add noise and multiply: the first half."""
        inner = self._inner(state)
        noise, multipliers = self.start.stages.noise, self.start.stages.multipliers
        noisy, after = run(noise, gradients, inner.noise, params, extra)
        shaped, counted = run(multipliers, noisy, inner.multipliers, params, extra)
        return shaped, inner._replace(noise=after, multipliers=counted)

    def ready(self, shaped: PyTree, params: PyTree) -> tuple[PyTree, jax.Array | None]:
        """Return what the second half takes, and the norm that the guard looks at."""
        if not self.start.is_guarded:
            return shaped, None
        # Packed once, it is measured and, where the clip is packed too, optimized.
        like = shaped if params is None else params
        packed = pack(shaped, layout_of(like, self.start.pack_size))
        norm = global_norm(packed, axis_name=self.axis_name)
        stays_packed = self.start.packs_all and params is not None
        return (packed if stays_packed else shaped), norm

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
        rule = self.start.spikes
        good, finite, state = judge(state, norm, loss, self.axis_name, rule)
        made, inner = update_if(good, update, (nothing(), state.inner))
        if self.start.loss_scale is not None and inner.loss_scale is not None:
            scale = self.start.loss_scale.update(state.inner.loss_scale, finite)
            inner = inner._replace(loss_scale=scale)
        return made, state._replace(inner=inner)

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
        updates, both = self.start.clip_and_optimizer.update(
            shaped, both, params, gradient_norm=norm, **extra
        )
        clip, optimizer = both
        multipliers, before = self.start.stages.rate_multipliers, state.rate_multipliers
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
        clip = self.start.stages.clip
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
        if self.start.loss_scale is None:
            return None
        return self.start.loss_scale.scale(self._inner(state).loss_scale)

    def _inner(self, state: PyTree) -> ChainState:
        return state.inner if self.start.is_guarded else state

"""How the state of a chain starts, and how it is told from that of another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from optloss.arguments import as_arrays, stages_of
from optloss.fast.packing import Layout, layout_of, pack_small_leaves, table_of
from optloss.guard import start_skipping
from optloss.loss_scale import LossScale, as_loss_scale
from optloss.names import check_patterns, leaf_names, select
from optloss.optimizer_argument import Given
from optloss.spikes import SpikeRule, as_spike_rule
from optloss.stages import ChainState, Stages, in_turn, looks_at_leaves
from optloss.state_check import check_state
from optloss.transforms.multipliers import start_multiplying
from optloss.trees import own_copies, select_leaves
from optloss.typing import PyTree, Variables


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ChainStart:
    """What a chain is made of, and what makes its state."""

    call: str
    stages: Stages
    variables: Variables
    is_guarded: bool
    pack_size: int
    loss_scale: LossScale | None
    spikes: SpikeRule | None
    checked: set[PyTree] = dataclasses.field(default_factory=set)

    @classmethod
    def of(cls, call: str, given: Given) -> "ChainStart":
        """Return what these arguments of ``call`` ask for."""
        stages = stages_of(call, given)
        scale = as_loss_scale(call, given.get("loss_scale"))
        spikes = as_spike_rule(call, given["skip_spikes"])
        is_dynamic = scale is not None and scale.is_dynamic
        return cls(
            call=call,
            stages=stages,
            variables=given["variables"],
            is_guarded=given["skip_nonfinite"] or is_dynamic or spikes is not None,
            pack_size=int(given["pack_small_leaves"]),
            loss_scale=scale,
            spikes=spikes,
        )

    @property
    def texts(self) -> list[str]:
        """What each stage does, in words and in order."""
        return [stage.text for stage in self.stages if stage.text]

    @property
    def skips(self) -> str:
        """What the guard skips, in words."""
        if not self.is_guarded:
            return ""
        spikes = "" if self.spikes is None else " or a spike"
        return f" (skipped if not finite{spikes})"

    def __repr__(self) -> str:
        return f"{' -> '.join(self.texts)}{self.skips}"

    def selected(self, params: PyTree) -> list[bool]:
        """Return, for each leaf of ``params``, whether it is trained."""
        return select(self.call, self.variables, params)

    def trained(self, params: PyTree) -> PyTree:
        """Return ``params`` with placeholders for what is not trained."""
        return select_leaves(params, self.selected(params))

    def init(self, params: PyTree) -> PyTree:
        """Return the state for ``params``, with all names and patterns checked.

        An optimizer may keep the starting weights, one array twice, or an array of the
        caller's. The state holds copies, so that donating it takes nothing of theirs.
        """
        params = as_arrays(self.call, params)
        names = leaf_names(params)
        if names:  # else it is a placeholder for parameters, or nothing is trained
            for stage in (self.stages.multipliers, self.stages.rate_multipliers):
                where = f"{self.call}, {stage.scope}"
                check_patterns(where, tuple(stage.rules), names)
        trained = self.trained(params)
        if names and self.stages.optimizer.groups is not None:
            self.stages.optimizer.groups.check(names, leaf_names(trained))
        leaves, structure = jax.tree.flatten(self(trained))
        return jax.tree.unflatten(structure, own_copies(leaves))

    def __call__(self, trained: PyTree) -> PyTree:
        """Return the state before the first update."""
        after: PyTree = self.clip_and_optimizer.init(trained)
        clip, optimizer = after
        state = ChainState(
            noise=self.stages.noise.transform.init(trained),
            clip=clip,
            optimizer=optimizer,
            packed=table_of(self.layout(trained)) if self.pack_size else None,
            multipliers=start_multiplying(self.stages.multipliers.rules),
            rate_multipliers=start_multiplying(self.stages.rate_multipliers.rules),
            loss_scale=None if self.loss_scale is None else self.loss_scale.init(),
        )
        return start_skipping(state, self.spikes) if self.is_guarded else state

    def layout(self, trained: PyTree) -> Layout:
        """Return which leaves the optimizer's state has in which packed vector."""
        groups = self.stages.optimizer.groups
        if not self.pack_size:
            return {}
        if groups is not None:
            return groups.layout(trained)
        return layout_of(trained, self.pack_size)

    def check(self, call: str, state: PyTree, trained: PyTree, cure: str) -> None:
        """Refuse, in the words of ``call``, a state of another chain or parameters.

        Only shapes are looked at, and those of one structure once.
        """
        shapes = tuple(map(jnp.shape, jax.tree.leaves((state, trained))))
        seen = jax.tree.structure((state, trained)), shapes
        if seen not in self.checked:
            check_state(call, state, self, trained, cure)
            self.checked.add(seen)

    @functools.cached_property  # trying a clip out compiles it
    def packs_all(self) -> bool:
        """Whether the clip, too, works on packed leaves."""
        grouped = self.stages.optimizer.groups is not None
        return self.pack_size > 0 and not (grouped or looks_at_leaves(self.stages.clip))

    @functools.cached_property
    def clip_and_optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The second half but for the multipliers, on packed leaves where they are."""
        clip, optimizer, size = self.stages.clip, self.stages.optimizer, self.pack_size
        if self.packs_all:
            return pack_small_leaves(in_turn(clip, optimizer), size)
        transform = optimizer.transform
        if optimizer.groups is not None:
            transform = optimizer.groups.transform()
        elif size:
            transform = pack_small_leaves(transform, size)
        return in_turn(clip, optimizer._replace(transform=transform))

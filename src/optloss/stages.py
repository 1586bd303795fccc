"""One stage of the chain: what it does, as a transform and in words."""

import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.fast.packing import is_elementwise
from optloss.groups import Groups
from optloss.typing import Multipliers, PyTree

Extra = Mapping[str, PyTree]


class Stage(NamedTuple):
    """A transform together with the text that describes it."""

    text: str
    transform: optax.GradientTransformationExtraArgs
    scope: str = "identity"  # under which a profile shows it
    rules: Multipliers = types.MappingProxyType({})  # of multipliers
    groups: Groups | None = None  # of several optimizers or rates: they transform


NOTHING = Stage("", optax.with_extra_args_support(optax.identity()))


class Stages(NamedTuple):
    """The stages in order; :data:`NOTHING`, which has no text, for an absent one."""

    noise: Stage = NOTHING
    multipliers: Stage = NOTHING
    clip: Stage = NOTHING
    optimizer: Stage = NOTHING
    rate_multipliers: Stage = NOTHING


class ChainState(NamedTuple):
    """The states of the stages, in their order."""

    noise: PyTree
    clip: PyTree
    optimizer: PyTree
    # uint8 [bytes], which leaves are packed; None for none
    packed: jax.Array | None = None
    # A count each, where a multiplier is a function of the step.
    multipliers: PyTree = optax.EmptyState()
    rate_multipliers: PyTree = optax.EmptyState()
    loss_scale: PyTree = None


def run(
    stage: Stage, updates: PyTree, state: PyTree, params: PyTree, extra: Extra
) -> tuple[PyTree, PyTree]:
    """Return the updates and the state after ``stage``."""
    with jax.named_scope(stage.scope):
        return stage.transform.update(updates, state, params, **extra)


def in_turn(clip: Stage, optimizer: Stage) -> optax.GradientTransformationExtraArgs:
    """Return the transform that clips and optimizes; its state is that of both."""

    def init(params: PyTree) -> tuple[PyTree, PyTree]:
        return clip.transform.init(params), optimizer.transform.init(params)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        gradient_norm: jax.Array | None = None,
        **extra: PyTree,
    ) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        clipped, seen = run_clip(clip, updates, state[0], params, extra, gradient_norm)
        updates, after = run(optimizer, clipped, state[1], params, extra)
        return updates, (seen, after)

    return optax.GradientTransformationExtraArgs(init, update)


def run_clip(
    clip: Stage,
    gradients: PyTree,
    state: PyTree,
    params: PyTree,
    extra: Extra,
    norm: jax.Array | None,
) -> tuple[PyTree, PyTree]:
    """Clip. What measures the global norm itself is handed a ``norm`` that is known."""
    if norm is not None and offers_norms(state):
        extra = {**extra, "gradient_norm": norm}
    return run(clip, gradients, state, params, extra)


def offers_norms(state: PyTree) -> bool:
    """Tell whether a clip's state says what the global norm was and became."""
    return hasattr(state, "norm") and hasattr(state, "factor")


def looks_at_leaves(clip: Stage) -> bool:
    """Tell whether ``clip`` would do something else to packed leaves."""
    if not clip.text:
        return False
    leaf = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        state = jax.eval_shape(clip.transform.init, leaf)
    except ValueError:  # it asks for parameters by their names
        return True
    told = [
        node.uniform
        for node in jax.tree.leaves(state, is_leaf=_tells_whether_uniform)
        if _tells_whether_uniform(node)
    ]
    # Trying it out does not show what it does after a warm-up.
    if not all(told):
        return True
    return not (_tells_whether_uniform(state) or is_elementwise(clip.transform))


def _tells_whether_uniform(state: PyTree) -> bool:
    return hasattr(state, "uniform")

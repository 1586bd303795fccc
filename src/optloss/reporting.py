"""What a step reports: the summaries that were asked for, by TensorFlow's tags."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optloss.chain import Shaped
from optloss.histograms import Histogram, Stacked, empty_like, histogram
from optloss.names import leaf_names
from optloss.norms import global_norm
from optloss.packed import Packed, unpack
from optloss.stages import AxisName
from optloss.summaries import (
    CLIPPED_GRADIENT_NORM,
    GRADIENT_NORM,
    LEARNING_RATE,
    LOSS,
    PARAMETER_GRADIENT_NORM,
    PARAMETER_GRADIENTS,
)
from optloss.transforms.learning_rate import LearningRateState
from optloss.trees import inexact_leaves


class Asked(NamedTuple):
    """What is to be reported, and how."""

    summaries: Sequence[str]  # out of OPTIMIZER_SUMMARIES
    name: str  # prefix of the tags
    histogram_every: int
    axis_name: AxisName


class Seen(NamedTuple):
    """What a step came by."""

    loss: jax.Array
    optimizer_state: Any
    shaped: Shaped
    step: jax.Array | None


def wants_norms(summaries: Sequence[str]) -> bool:
    """Tell whether the global norms are to be reported."""
    return "global_gradient_norm" in summaries or "gradient_norm" in summaries


def summarise(asked: Asked, seen: Seen) -> dict[str, Any]:
    """Return the summaries of a step, by tag."""
    found: dict[str, Any] = {}
    if "loss" in asked.summaries:
        found[LOSS] = seen.loss
    rate_known = isinstance(seen.optimizer_state, LearningRateState)
    if "learning_rate" in asked.summaries and rate_known:
        found[LEARNING_RATE] = seen.optimizer_state.rate
    if wants_norms(asked.summaries):
        found[GRADIENT_NORM] = seen.shaped.norm
        if seen.shaped.clipped_norm is not None:
            found[CLIPPED_GRADIENT_NORM] = seen.shaped.clipped_norm
    found |= _of_parameters(asked, seen)
    prefix = f"{asked.name}/" if asked.name else ""
    return {
        prefix + tag: value if isinstance(value, Histogram) else _float32(value)
        for tag, value in found.items()
    }


def _float32(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def _gradients(shaped: Shaped) -> list[jax.Array]:
    gradients = shaped.gradients()
    if isinstance(gradients, Packed):
        gradients = unpack(gradients.tree, shaped.like, gradients.layout)
    return inexact_leaves(gradients)


def _of_parameters(asked: Asked, seen: Seen) -> dict[str, Any]:
    names, axes = leaf_names(seen.shaped.like), asked.axis_name
    found: dict[str, Any] = {}
    if "gradient_norm" in asked.summaries:
        for name, leaf in zip(names, _gradients(seen.shaped), strict=True):
            tag = f"{PARAMETER_GRADIENT_NORM}/{name}"
            found[tag] = global_norm(leaf, axis_name=axes)
    if "gradients" in asked.summaries:
        due = True if seen.step is None else seen.step % asked.histogram_every == 0

        def measured() -> Stacked:
            return Stacked(
                {
                    f"{PARAMETER_GRADIENTS}/{name}": histogram(leaf, axis_name=axes)
                    for name, leaf in zip(names, _gradients(seen.shaped), strict=True)
                }
            )

        def nothing() -> Stacked:
            return empty_like(jax.eval_shape(measured))

        found |= jax.lax.cond(due, measured, nothing).summaries()
    return found

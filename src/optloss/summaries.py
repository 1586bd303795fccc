"""What can be looked at in a run: its tags, and what a state measured.

A transform publishes what it measured by a method of its state, ``measurements()``,
that returns a dict from tag to scalar. :func:`get_summaries` finds such states wherever
they are wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optloss.donation import clear_if_deleted
from optloss.fast.handover import Stacked, empty_like
from optloss.histograms import Histogram, histogram
from optloss.messages import argument_error
from optloss.names import inexact_names
from optloss.norms import global_norm, leaf_norms
from optloss.trees import inexact_leaves
from optloss.typing import AxisName, PyTree, Summaries

LEARNING_RATE = "learning_rate"
GRADIENT_NORM = "global_norm/gradient_norm"
CLIPPED_GRADIENT_NORM = "global_norm/clipped_gradient_norm"
CLIP_THRESHOLD = "clip_threshold"

OPTIMIZER_SUMMARIES: Summaries = (
    "learning_rate",
    "loss",
    "gradients",
    "gradient_norm",
    "global_gradient_norm",
)


def get_summaries(tree: PyTree) -> dict[str, jax.Array]:
    """Return what our transforms measured at the latest update, by tag.

    Nothing is computed again: the transforms keep in their state what they measure
    anyway. The state may be that of one transform or of a chain, and may be wrapped in
    others, such as ``optax.masked``, ``optax.partition`` or ``optax.MultiSteps``, in a
    :class:`TrainOpState`, a Flax ``TrainState`` or an ``nnx.Optimizer``.

    Args:
        tree: A state, or any tree that holds one. Its arrays may be traced.

    Returns:
        A dict from tag to float32 scalar ``[]``, in the order of the chain; empty if no
        transform of ours is in ``tree``. A tag found before gets ``_1``, then ``_2``.
        After a skipped update they are those of the latest that was made, but for
        what tells of the skipping.

    Raises:
        ValueError: If ``tree`` is an op and no state.

    Note:
        Under ``vmap`` the values are batched like the state.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from optloss import clip_by_global_norm
        >>> tx = optax.chain(clip_by_global_norm(1.0), optax.adam(1e-3))
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(grads, tx.init(grads))
        >>> for tag, value in get_summaries(state).items():
        ...     print(tag, value)
        global_norm/gradient_norm 5.0
        global_norm/clipped_gradient_norm 1.0
        clip_factor 0.2
        clipped_share 1.0

    See also:
        :class:`StepOutput`, whose ``summaries`` come from here.
    """
    if callable(tree) and jax.tree_util.all_leaves([tree]):
        problem = "is no state. Pass the one that the op returned, or op.state."
        raise argument_error("get_summaries", "tree", tree, problem)
    found: dict[str, jax.Array] = {}
    seen: dict[str, int] = {}
    with clear_if_deleted("get_summaries(state)", tree):
        for state in _measuring(tree):
            for tag, value in _plain(state).measurements().items():
                earlier = seen.setdefault(tag, 0)
                seen[tag] += 1
                name = f"{tag}_{earlier}" if earlier else tag
                found[name] = jnp.asarray(value, jnp.float32)
    return found


def clip_measurements(state: PyTree) -> dict[str, jax.Array]:
    """Return what the state of any clip tells, by summary tags."""
    return {
        GRADIENT_NORM: state.norm,
        CLIPPED_GRADIENT_NORM: state.norm * state.factor,
        "clip_factor": state.factor,
        "clipped_share": state.clipped / jnp.maximum(state.step, 1),
    }


def without_repeats(summaries: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return ``summaries`` without what a step has reported under its name as well."""
    both = (LEARNING_RATE, GRADIENT_NORM, CLIPPED_GRADIENT_NORM)
    repeats = {
        tag
        for tag in summaries
        if tag in both or tag.startswith(f"{LEARNING_RATE}/")
        if any(other.endswith(f"/{tag}") for other in summaries)
    }
    return {tag: value for tag, value in summaries.items() if tag not in repeats}


def _measures(node: object) -> bool:
    return isinstance(node, tuple) and hasattr(node, "measurements")


def _measuring(tree: PyTree) -> Iterator[PyTree]:
    """Yield the states in ``tree`` that measure, an outer one before its inner ones."""
    if _measures(tree):
        yield tree
    for node in jax.tree.leaves(tree, is_leaf=lambda n: n is not tree and _measures(n)):
        if _measures(node):
            yield from _measuring(node)


def _plain(state: PyTree) -> PyTree:
    # An nnx.Optimizer keeps the structure of a state and wraps its arrays in Variables.
    def wraps(node: object) -> bool:
        return hasattr(node, "get_value")

    return jax.tree.map(
        lambda node: node.get_value() if wraps(node) else node, state, is_leaf=wraps
    )


class Asked(NamedTuple):
    """What a step is to report, and how."""

    summaries: Sequence[str]  # out of OPTIMIZER_SUMMARIES
    name: str  # prefix of the tags
    histogram_every: int
    axis_name: AxisName

    @property
    def norms(self) -> bool:
        """Whether the global norms are to be reported."""
        return not {"global_gradient_norm", "gradient_norm"}.isdisjoint(self.summaries)

    @property
    def gradients(self) -> bool:
        """Whether anything of the gradient is to be reported."""
        return self.norms or "gradients" in self.summaries


class Measured(NamedTuple):
    """What is known of the gradient of a step."""

    gradients: PyTree  # before the clip
    clipped: PyTree  # after it
    norm: jax.Array | None  # of `gradients`, where the clip or the guard has it
    factor: jax.Array | None  # clipped norm / norm, where the clip has it
    uniform: bool  # whether the clip multiplied every leaf by the factor


def step_summaries(
    asked: Asked,
    loss: jax.Array | None,
    rates: Mapping[str, jax.Array],
    measured: Measured | None,
    step: jax.Array | None,
) -> dict[str, jax.Array | Histogram]:
    """Return the summaries of a step, by tag: of loss and gradient as far as known.

    The loss is that before the update. The step is that before its increment, ``None``
    without a counter.
    """
    found: dict[str, jax.Array | Histogram] = {}
    if "loss" in asked.summaries and loss is not None:
        found["loss"] = loss
    if "learning_rate" in asked.summaries:
        found |= rates
    if measured is not None and asked.norms:
        found |= _norms(asked, measured)
    if measured is not None and "gradients" in asked.summaries:
        found |= _histograms(asked, measured.clipped, step)
    prefix = f"{asked.name}/" if asked.name else ""
    return {
        prefix + tag: value
        if isinstance(value, Histogram)
        else jnp.asarray(value, jnp.float32)
        for tag, value in found.items()
    }


def _norms(asked: Asked, measured: Measured) -> dict[str, jax.Array]:
    gradients, clipped, norm, factor, uniform = measured
    found: dict[str, jax.Array] = {}
    if norm is None:
        norm = global_norm(gradients, axis_name=asked.axis_name)
    found[GRADIENT_NORM] = norm
    if factor is not None:
        found[CLIPPED_GRADIENT_NORM] = norm * factor
    elif clipped is not gradients:
        found[CLIPPED_GRADIENT_NORM] = global_norm(clipped, axis_name=asked.axis_name)
    if "gradient_norm" in asked.summaries:
        by = factor if uniform and factor is not None else None
        # Of the gradient that the global norm is of, too: both come from one pass.
        tree = clipped if by is None else gradients
        norms = leaf_norms(tree, axis_name=asked.axis_name)
        for name, one in zip(inexact_names(tree), norms, strict=True):
            found[f"gradient_norm/{name}"] = one if by is None else one * by
    return found


def _histograms(
    asked: Asked, gradients: PyTree, step: jax.Array | None
) -> dict[str, Histogram]:
    def counted() -> Stacked:
        pairs = zip(inexact_names(gradients), inexact_leaves(gradients), strict=True)
        return Stacked.of(
            {
                f"gradients/{name}": histogram(leaf, axis_name=asked.axis_name)
                for name, leaf in pairs
            }
        )

    def nothing() -> Stacked:
        return empty_like(jax.eval_shape(counted))

    due = True if step is None else step % asked.histogram_every == 0
    return jax.lax.cond(due, counted, nothing).summaries()

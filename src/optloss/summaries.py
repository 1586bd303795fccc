"""What can be looked at in a run: its tags, and what a state measured.

A transform publishes what it measured by a method of its state, ``measurements()``,
that returns a dict from tag to scalar. :func:`get_summaries` finds such states wherever
they are wrapped, so nothing has to be computed, or passed along, a second time.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

LEARNING_RATE = "learning_rate"
LOSS = "loss"
GRADIENT_NORM = "global_norm/gradient_norm"
CLIPPED_GRADIENT_NORM = "global_norm/clipped_gradient_norm"
PARAMETER_GRADIENT_NORM = "gradient_norm"
PARAMETER_GRADIENTS = "gradients"
CLIP_FACTOR = "clip_factor"
CLIPPED_SHARE = "clipped_share"
ADAPTIVE_MAX_NORM = "global_norm/adaptive_max_gradient_norm"
ADAPTIVE_MEAN = "adaptive/mean"
ADAPTIVE_SQ_MEAN = "adaptive/sq_mean"
NOISE_STD = "noise_std"
SKIPPED_TOTAL = "skipped/total"
SKIPPED_CONSECUTIVE = "skipped/consecutive"

OPTIMIZER_SUMMARIES = (
    "learning_rate",
    "loss",
    "gradients",
    "gradient_norm",
    "global_gradient_norm",
)


def get_summaries(tree: Any) -> dict[str, jax.Array]:
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
    found: dict[str, jax.Array] = {}
    seen: dict[str, int] = {}
    for state in _measuring(tree):
        for tag, value in _plain(state).measurements().items():
            earlier = seen.setdefault(tag, 0)
            seen[tag] += 1
            name = f"{tag}_{earlier}" if earlier else tag
            found[name] = jnp.asarray(value, jnp.float32)
    return found


def _measures(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "measurements")


def _measuring(tree: Any) -> Iterator[Any]:
    """Yield the states in ``tree`` that measure, an outer one before its inner ones."""
    if _measures(tree):
        yield tree
    for node in jax.tree.leaves(tree, is_leaf=lambda n: n is not tree and _measures(n)):
        if _measures(node):
            yield from _measuring(node)


def _plain(state: Any) -> Any:
    # An nnx.Optimizer keeps the structure of a state and wraps its arrays in Variables.
    fields = (f.get_value() if hasattr(f, "get_value") else f for f in state)
    return type(state)(*fields)

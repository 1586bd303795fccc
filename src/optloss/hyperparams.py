"""What ``optax.inject_hyperparams`` inside an optimizer does to its learning rate.

Its state holds the hyperparameters that it was made with. An optimizer is made again at
each update, with the rate of that step, and such a state would still hold the first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optloss.extra import by_signature
from optloss.messages import refusal
from optloss.typing import PyTree

INJECTED = (
    "the optimizer is wrapped in optax.inject_hyperparams, whose state would keep the "
    "first learning rate for ever. Pass it unwrapped."
)

Factory = Callable[[jax.Array], optax.GradientTransformation]


def check_rate_is_outside(
    call: str, factory: Factory, inner: PyTree, params: PyTree
) -> None:
    """Refuse an optimizer whose ``optax.inject_hyperparams`` keeps its first rate."""
    if not hyperparams(inner):
        return
    small = jax.tree.map(lambda leaf: jnp.zeros((1,) * leaf.ndim, leaf.dtype), params)
    if keeps_first_rate(factory, small):
        raise refusal(call, INJECTED)


def keeps_first_rate(factory: Factory, params: PyTree) -> bool:
    """Tell whether an update at a second rate still finds the first one in the state.

    It is tried out on ``params``; what cannot be tried counts as keeping it.
    """

    def found(first: float, second: float) -> list[PyTree]:
        state = factory(jnp.float32(first)).init(params)
        later = by_signature(factory(jnp.float32(second)))
        extra = {"value": jnp.zeros(()), "step": jnp.zeros((), jnp.int32)}
        _, state = later.update(params, state, params, grad=params, **extra)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(hyperparams(state))]

    with jax.ensure_compile_time_eval():
        try:
            kept, right = found(0.1, 0.2), found(0.2, 0.2)
        except Exception:  # an optimizer of the user's own may fail in any way
            return True
    return not all(np.array_equal(a, b) for a, b in zip(kept, right, strict=True))


def hyperparams(state: PyTree) -> list[PyTree]:
    """Return what ``optax.inject_hyperparams`` holds anywhere in ``state``."""

    def holds(node: PyTree) -> bool:
        return hasattr(node, "hyperparams")

    nodes = jax.tree.leaves(state, is_leaf=holds)
    return [node.hyperparams for node in nodes if holds(node)]

"""Many slices of one array, at little cost to XLA's CPU compiler and its programs.

Left alone, it does two things to hundreds of slices:

* Where each starts becomes a constant in a kernel of its own, and 400 kernels that
  differ in nothing else take 6 s to compile. As arguments of one kernel: half a second.
  Here a start is an element of a constant, at an index that XLA cannot know.
* What computes the array becomes part of each slice. A kernel that multiplies a million
  elements before it takes a few counts as a large one, and is split over threads. Here
  the array ends a loop, which makes no turn and copies nothing. A barrier would be
  dropped, and a branch copies what it passes on.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optloss.mesh import is_traced, never


def slices(
    array: jax.Array, starts: Sequence[int], sizes: Sequence[int]
) -> list[jax.Array]:
    """Return slices along the first axis of ``array``, one a start and a size."""

    def plain() -> list[jax.Array]:
        return [
            lax.slice_in_dim(array, start, start + size)
            for start, size in zip(starts, sizes, strict=True)
        ]

    def on_a_cpu() -> list[jax.Array]:
        held, zero = _hold(array)
        return [
            lax.dynamic_slice_in_dim(held, _hide(start, zero), size)
            for start, size in zip(starts, sizes, strict=True)
        ]

    if not array.size or not is_traced(array):
        return plain()
    return lax.platform_dependent(cpu=on_a_cpu, default=plain)


@jax.custom_jvp
def _hold(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ``array``, computed before anything reads it, and a 0 XLA cannot know."""
    # Read inside of the loop: another reader would have the array computed twice.
    return lax.while_loop(
        lambda carry: never(jnp.ravel(carry[0])[0]),
        lambda carry: (carry[0] + carry[0], carry[1] + jnp.uint32(1)),
        (array, jnp.uint32(0)),
    )


@_hold.defjvp
def _hold_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, Any]]:
    held, zero = _hold(*primals)
    return (held, zero), (tangents[0], np.zeros(zero.shape, jax.dtypes.float0))


def _hide(number: int, zero: jax.Array) -> jax.Array:
    """Return ``number`` as a scalar that XLA cannot fold into a kernel."""
    # XLA sees through equal and evenly spaced numbers.
    several = np.array([number, number + 1, number], np.uint32)
    return lax.dynamic_index_in_dim(several, zero, keepdims=False)

"""Scaling the loss, so that half-precision gradients neither vanish nor overflow.

In float16 a gradient below 6e-8 is zero. The loss is therefore multiplied by a large
number before it is differentiated, and the gradients are divided by it afterwards:

    scale_loss -> differentiate -> unscale -> noise, clip, ... -> [finite?] -> update

Where a number overflows, the guard skips the step, and the next tries a smaller scale.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optloss.messages import argument_error, check_int, is_number
from optloss.trees import accumulator_dtype, map_inexact, real_dtype, to_float32
from optloss.typing import PyTree

LARGEST = 2.0**127  # the largest power of two in float32


class LossScaleState(NamedTuple):
    """The scale, and how long it has been good."""

    scale: jax.Array  # float32 []
    good: jax.Array  # int32 [], finite steps since the scale last changed

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return {"loss_scale": self.scale}


@dataclasses.dataclass(frozen=True)
class LossScale:
    """How a loss is scaled; with a ``factor`` of 1 the scale is constant."""

    initial: float
    growth_interval: int
    factor: float
    minimum: float

    @property
    def is_dynamic(self) -> bool:
        """Whether the scale follows the steps of the run."""
        return self.factor > 1

    @property
    def text(self) -> str:
        """The words that describe it."""
        kind = "dynamic loss scale from" if self.is_dynamic else "loss scale"
        return f"{kind} {self.initial:g}"

    def scale(self, state: LossScaleState | None) -> jax.Array:
        """Return the scale of the next step."""
        return jnp.float32(self.initial) if state is None else state.scale

    def init(self) -> LossScaleState | None:
        """Return the state before the first step; a constant scale has none."""
        if not self.is_dynamic:
            return None
        return LossScaleState(
            scale=jnp.array(self.initial, jnp.float32), good=jnp.zeros((), jnp.int32)
        )

    def update(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """Return the state after a step whose loss and gradients were ``finite``."""
        good = state.good + 1
        is_due = good == self.growth_interval
        larger = jnp.minimum(state.scale * self.factor, LARGEST)
        smaller = jnp.maximum(state.scale / self.factor, self.minimum)
        kept_or_larger = jnp.where(is_due, larger, state.scale)
        return LossScaleState(
            scale=jnp.where(finite, kept_or_larger, smaller),
            good=jnp.where(finite & ~is_due, good, 0),
        )


def scale_loss(scale: jax.Array, loss: jax.Array) -> jax.Array:
    """Return the loss times the scale, in float32 (float64 for such a loss)."""
    return loss.astype(accumulator_dtype(loss.dtype)) * scale


def unscale(scale: jax.Array, tree: PyTree) -> PyTree:
    """Return gradients, or the loss, divided by the scale.

    Half-precision leaves become float32, where what is left of them is no zero; float64
    and complex ones keep their precision.
    """

    def divide(leaf: jax.Array) -> jax.Array:
        divisor = scale.astype(real_dtype(leaf.dtype))
        if jnp.iscomplexobj(leaf):
            return jax.lax.complex(leaf.real / divisor, leaf.imag / divisor)
        return leaf / divisor

    return map_inexact(divide, to_float32(tree))


def dynamic_loss_scale(
    initial: float = 2.0**15,
    *,
    growth_interval: int = 2000,
    factor: float = 2.0,
    minimum: float = 1.0,
) -> LossScale:
    r"""Scale the loss by the largest number that lets the gradients stay finite.

    The scale :math:`s` follows the steps of the run,

    .. math:: s \leftarrow \begin{cases}
        \max(s / f, m) & \text{after a step with a NaN or an infinity,} \\
        s f & \text{after } k \text{ finite steps in a row,} \\
        s & \text{otherwise,} \end{cases}

    with :math:`f` = ``factor``, :math:`m` = ``minimum`` and :math:`k` =
    ``growth_interval``; counting starts again whenever the scale changes.

    Args:
        initial: Scale of the first step.
        growth_interval: Finite steps in a row after which the scale grows.
        factor: What the scale is multiplied or divided by. Powers of two round nothing.
        minimum: The scale never shrinks below it.

    Returns:
        A description for ``optimize_loss(loss_scale=...)``, whose state holds a float32
        scalar ``scale`` and an int32 scalar ``good``.

    Raises:
        ValueError: Unless ``0 < minimum <= initial <= 2**127``, ``factor > 1`` and
            ``growth_interval`` is an int >= 1.

    Note:
        For float16. The range of bfloat16 is that of float32, which needs no scale.

    Example:
        >>> dynamic_loss_scale(1024.0, growth_interval=100)
        LossScale(initial=1024.0, growth_interval=100, factor=2.0, minimum=1.0)

    See also:
        A plain number as ``loss_scale``, which never changes.

    References:
        Micikevicius et al., *Mixed Precision Training*, 2018, arXiv:1710.03740, section
        3.2. ``flax.training.dynamic_scale.DynamicScale(growth_interval=k)`` grows after
        k + 1 finite steps, this after k.
    """
    call = "dynamic_loss_scale"
    _check_scale(call, "initial", initial)
    growth_interval = check_int(
        call, "growth_interval", growth_interval, 1, "an int in [1, 2**31).", 2**31 - 1
    )
    if not is_number(factor) or not 1 < factor <= LARGEST:
        raise argument_error(
            call,
            "factor",
            factor,
            "must be a number > 1. For a constant scale, pass the number itself as "
            "loss_scale.",
        )
    _check_scale(call, "minimum", minimum)
    if minimum > initial:
        problem = f"must not exceed the initial scale, {initial}."
        raise argument_error(call, "minimum", minimum, problem)
    return LossScale(float(initial), growth_interval, float(factor), float(minimum))


def as_loss_scale(call: str, value: Any) -> LossScale | None:
    """Return ``value`` as a :class:`LossScale`; a number is a constant one."""
    if value is None or isinstance(value, LossScale):
        return value
    _check_scale(
        call, "loss_scale", value, "a number > 0, dynamic_loss_scale(...) or None."
    )
    return LossScale(float(value), growth_interval=1, factor=1.0, minimum=0.0)


def _check_scale(
    call: str, argument: str, value: Any, requirement: str = "a number > 0."
) -> None:
    if not is_number(value) or not 0 < value <= LARGEST:
        raise argument_error(call, argument, value, f"must be {requirement}")

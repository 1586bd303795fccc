"""What counts as a spike: far above the running mean of what came before.

The norm of the gradient is judged by its logarithm, since norms differ by factors; the
loss is judged as it is. Only a rise is a spike.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.messages import check_number
from optloss.trees import increment
from optloss.typing import Scalar

LEAST_LOG_DEVIATION = 0.1  # of the logarithm of the norm: about 10 % of the norm
LEAST_DEVIATION = 0.01  # of the loss, as a share of its mean
STD_FACTOR = 6.0


class Level(NamedTuple):
    """Running mean and variance of what was observed."""

    observed: jax.Array  # int32 []
    mean: jax.Array  # float32 []
    variance: jax.Array  # float32 []


class Levels(NamedTuple):
    """What the updates so far were like."""

    log_norm: Level
    loss: Level
    in_a_row: jax.Array  # int32 [], updates skipped as spikes since the last made


@dataclasses.dataclass(frozen=True)
class SpikeRule:
    """When an update is skipped as a spike."""

    std_factor: Scalar
    decay: Scalar = 0.98
    warmup: Scalar = 100
    patience: Scalar = 20

    def start(self) -> Levels:
        """Return the levels before the first update."""

        def level() -> Level:
            return Level(
                observed=jnp.zeros((), jnp.int32),
                mean=jnp.zeros((), jnp.float32),
                variance=jnp.zeros((), jnp.float32),
            )

        return Levels(level(), level(), in_a_row=jnp.zeros((), jnp.int32))

    def is_spike(
        self, levels: Levels, norm: jax.Array, loss: jax.Array | None
    ) -> jax.Array:
        """Tell whether one of the two, both finite, lies far above its level."""
        log_norm = jnp.log(norm.astype(jnp.float32))
        spike = self._far_above(levels.log_norm, log_norm, LEAST_LOG_DEVIATION)
        if loss is None:
            return spike
        least = LEAST_DEVIATION * jnp.abs(levels.loss.mean)
        return spike | self._far_above(levels.loss, loss.astype(jnp.float32), least)

    def after(
        self,
        levels: Levels,
        norm: jax.Array,
        loss: jax.Array | None,
        good: jax.Array,
        spike: jax.Array,
    ) -> Levels:
        """Return the levels after an update: what is skipped enters none."""
        # The logarithm of a norm of zero is infinite: it is not observed.
        seen = good & (norm > 0)
        log_norm = jnp.log(jnp.where(seen, norm, 1).astype(jnp.float32))
        followed = levels._replace(
            log_norm=self._follow(levels.log_norm, log_norm, seen)
        )
        if loss is not None:
            value = jnp.where(good, loss, 0).astype(jnp.float32)
            followed = followed._replace(loss=self._follow(levels.loss, value, good))
        in_a_row = jnp.where(good, 0, levels.in_a_row + spike)
        # A rise that lasts is the new level.
        gives_in = in_a_row >= self.patience
        return optax.tree.where(
            gives_in, self.start(), followed._replace(in_a_row=in_a_row)
        )

    def _far_above(
        self, level: Level, value: jax.Array, least: float | jax.Array
    ) -> jax.Array:
        deviation = jnp.maximum(jnp.sqrt(level.variance), least)
        is_known = level.observed >= self.warmup
        return is_known & (value > level.mean + self.std_factor * deviation)

    def _follow(self, level: Level, value: jax.Array, seen: jax.Array) -> Level:
        n = level.observed.astype(jnp.float32)
        decay = jnp.minimum(self.decay, n / (n + 1))
        ahead = value - level.mean
        followed = Level(
            observed=increment(level.observed),
            mean=level.mean + (1 - decay) * ahead,
            variance=decay * (level.variance + (1 - decay) * ahead**2),
        )
        return optax.tree.where(seen, followed, level)


def as_spike_rule(call: str, value: Scalar | bool | None) -> SpikeRule | None:
    """Return the rule that the argument ``skip_spikes`` asks for."""
    if value is None:
        return None
    if value is True:
        return SpikeRule(STD_FACTOR)
    check_number(
        call,
        "skip_spikes",
        value,
        lambda number: 0 < number < float("inf"),
        f"a real number > 0 (standard deviations), True for {STD_FACTOR:g}, or None.",
    )
    return SpikeRule(value)

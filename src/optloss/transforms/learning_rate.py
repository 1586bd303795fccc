"""The learning rate: a number that lives in the state, and may decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.extra import by_signature
from optloss.hyperparams import Factory, check_rate_is_outside
from optloss.knobs import SCHEDULE, check_scalar, is_schedule, value_at
from optloss.messages import (
    argument_error,
    check_at_least_zero,
    check_callable,
    is_array,
    refusal,
    short_repr,
)
from optloss.plateau import plateau_scale
from optloss.summaries import LEARNING_RATE
from optloss.trees import (
    accumulator_dtype,
    increment,
    inexact_only,
    is_transformation,
    keep_dtypes,
    merge_inexact,
    scale_leaves,
    to_float32,
)
from optloss.typing import DecayFn, PyTree, Scalar, Schedule

Rate = Scalar | Schedule
Rates = jax.Array | dict[str, jax.Array]


class LearningRateState(NamedTuple):
    """The base rate, the rate used last, and the state of the optimizer at it.

    Where the rate is one of several that go by name, base and rate are dicts of one
    scalar under its key.
    """

    step: jax.Array  # int32 [], updates so far
    base: Rates | None  # float [], the rate before decay; None for a schedule
    rate: Rates  # float [], what the latest update was handed
    inner: PyTree

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        rates = (
            {f"{LEARNING_RATE}/{key}": rate for key, rate in self.rate.items()}
            if isinstance(self.rate, dict)
            else {LEARNING_RATE: self.rate}
        )
        scale = plateau_scale(self.inner)
        return rates if scale is None else {tag: rates[tag] * scale for tag in rates}


def scale_by_learning_rate(
    learning_rate: Rate, decay_fn: DecayFn | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply the update by minus the learning rate of this step.

    .. math:: u \leftarrow -\eta(t) \, u, \qquad \eta(t) = \text{decay_fn}(\eta_0, t)

    The base rate :math:`\eta_0` lives in the state, where :func:`set_learning_rate` can
    change it in mid-run without a new compilation and a checkpoint keeps it.

    Args:
        learning_rate: A real number, a 0-d array (may be traced), or a schedule, a
            function of the step; with a schedule there is no base rate.
        decay_fn: ``decay_fn(base_rate, step) -> rate``, such as
            ``functools.partial(exponential_decay, decay_steps=1000, decay_rate=0.96)``.
            The step is the extra argument ``step=`` of ``update``, or without one the
            transform's own count.

    Returns:
        A transform with a :class:`~optloss.transforms.learning_rate.LearningRateState`.
        Leaves keep shape ``[*shape]`` and dtype. The rate is a float32 scalar ``[]``,
        float64 if given as a float64 array.

    Raises:
        ValueError: If the rate is a negative or not finite Python number, or no rate at
            all; if a schedule comes with a ``decay_fn``; when traced, if the rate
            computed is no real scalar.

    Note:
        It belongs behind the transforms that make the direction, as
        ``optax.scale_by_learning_rate`` does. For a whole optimizer that takes the rate
        itself there is :func:`inject_learning_rate`. Through
        ``optax.inject_hyperparams`` the rate in this state still rules: a change of the
        hyperparameter, or a schedule there, is not seen.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.scale_by_adam(), scale_by_learning_rate(0.1))
        >>> params = jnp.array([1.0])
        >>> updates, state = tx.update(jnp.array([5.0]), tx.init(params))
        >>> print(f"{optax.apply_updates(params, updates)[0]:.3f}")
        0.900

    See also:
        :func:`inject_learning_rate`, :func:`set_learning_rate`, ``optloss.decays``.
    """
    return with_rate("scale_by_learning_rate", _descend, learning_rate, decay_fn)


def _descend(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
    scale = optax.stateless(lambda updates, _: scale_leaves(updates, -rate))
    return optax.with_extra_args_support(scale)


def inject_learning_rate(
    factory: Factory, learning_rate: Rate, decay_fn: DecayFn | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Build an optimizer again at every update, with the learning rate of that step.

    ``factory(rate)`` is called with a traced scalar once per trace, so that the rate
    may stand anywhere in the optimizer (Ftrl has it inside a square root's divisor) and
    still change without a new compilation.

    Args:
        factory: A function of the rate that returns a transformation whose state does
            not depend on the rate: ``optax.adam``,
            ``optloss.optimizers.tensorflow.ftrl``.
        learning_rate: As for :func:`scale_by_learning_rate`.
        decay_fn: As for :func:`scale_by_learning_rate`.

    Returns:
        A transform with a :class:`~optloss.transforms.learning_rate.LearningRateState`
        around the optimizer's state. That keeps the dtypes it started with, which some
        of optax's optimizers let drift for bfloat16 parameters. Updates of
        half-precision leaves are computed in float32, and may stay so until they are
        applied. Leaves that are not floating or complex are passed by the optimizer.

    Raises:
        ValueError: As :func:`scale_by_learning_rate`; if ``factory`` is not callable,
            returns no transformation, or is wrapped in ``optax.inject_hyperparams``.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = inject_learning_rate(lambda rate: optax.sgd(rate, momentum=0.9), 0.1)
        >>> params = jnp.array([1.0])
        >>> updates, state = tx.update(jnp.array([5.0]), tx.init(params), params)
        >>> print(updates, state.rate)
        [-0.5] 0.1

    See also:
        ``optax.inject_hyperparams``, which casts the rate to the parameters' dtype:
        with bfloat16 parameters ``adam`` then gives NaN at the first update.
    """
    wanted = "a function of the learning rate, such as optax.adam"
    check_callable("inject_learning_rate", "factory", factory, 1, wanted)

    def build(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        return in_float32(check_transformation("inject_learning_rate", factory(rate)))

    return with_rate("inject_learning_rate", build, learning_rate, decay_fn)


def in_float32(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Return ``inner`` with all that it is given in float32 at least."""
    # In bfloat16, a decay of 0.999 is 1, and a difference of moments mostly rounding.
    update = by_signature(inner).update

    def wide(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: object
    ) -> tuple[PyTree, PyTree]:
        if "grad" in extra:
            extra["grad"] = to_float32(extra["grad"])
        return update(
            to_float32(updates), to_float32(state), to_float32(params), **extra
        )

    return optax.GradientTransformationExtraArgs(inner.init, wide)


def with_rate(
    call: str,
    factory: Callable[[jax.Array], optax.GradientTransformationExtraArgs],
    learning_rate: Rate,
    decay_fn: DecayFn | None,
    key: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return the transform that ``factory`` makes at each update with its rate.

    The rate is one of several where it has a ``key``.
    """
    check_rate(call, learning_rate, decay_fn)

    def rate_at(base: jax.Array, step: jax.Array) -> Scalar:
        if callable(learning_rate):
            return value_at(call, "learning_rate", learning_rate, step)
        if decay_fn is None:
            return base
        return check_scalar(call, "decay_fn", decay_fn, decay_fn(base, step))

    def init(params: PyTree) -> PyTree:
        base = None if callable(learning_rate) else start_rate(learning_rate)
        rate = jnp.zeros((), jnp.float32) if base is None else jnp.copy(base)
        trained = inexact_only(params)
        first = factory(rate).init(trained)
        inner = keep_dtypes(first, first)  # in strong types, as an update leaves them
        check_rate_is_outside(call, factory, inner, trained)
        step = jnp.zeros((), jnp.int32)
        stored = None if base is None else _under(key, base)
        return LearningRateState(step, stored, _under(key, rate), inner)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        step: jax.Array | None = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        base, before = _value(state.base), _value(state.rate)
        rate = rate_at(base, state.step if step is None else step)
        rate = jnp.asarray(rate, before.dtype)
        if step is not None:
            extra["step"] = step
        if "grad" in extra:
            extra["grad"] = inexact_only(extra["grad"])
        steps, inner = factory(rate).update(
            inexact_only(updates), state.inner, inexact_only(params), **extra
        )
        inner = keep_dtypes(inner, state.inner)
        count = increment(state.step)
        new_state = LearningRateState(count, state.base, _under(key, rate), inner)
        return merge_inexact(steps, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _under(key: str | None, rate: jax.Array) -> Rates:
    return rate if key is None else {key: rate}


def _value(rate: Rates) -> jax.Array:
    return next(iter(rate.values())) if isinstance(rate, dict) else rate


def start_rate(learning_rate: Scalar) -> jax.Array:
    """Return the base rate as a scalar of its own: float64 only if given as such."""
    given = learning_rate.dtype if is_array(learning_rate) else jnp.float32
    return jnp.array(learning_rate, accumulator_dtype(given), copy=True)


def check_rate(call: str, learning_rate: object, decay_fn: object) -> None:
    """Refuse what is neither a rate nor a schedule, and a schedule with a decay."""
    if decay_fn is not None:
        wanted = "a function (rate, step) -> rate"
        check_callable(call, "decay_fn", decay_fn, 2, wanted)
    if is_schedule(learning_rate):
        check_callable(call, "learning_rate", learning_rate, 1, SCHEDULE)
        if decay_fn is not None:
            raise argument_error(
                call,
                "learning_rate",
                learning_rate,
                "a schedule and a decay function exclude each other. Give a number.",
            )
        return
    check_at_least_zero(call, learning_rate=learning_rate)


def check_transformation(call: str, result: object) -> optax.GradientTransformation:
    """Return what an optimizer's factory made if it has ``init`` and ``update``."""
    if not is_transformation(result):
        raise refusal(
            call,
            f"the optimizer's function returned {short_repr(result)}, which is no "
            "optax transformation. Return one, such as optax.sgd(rate).",
        )
    return result

"""The learning rate: a number that lives in the state, and may decay."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.mesh import put_like
from optloss.messages import (
    argument_error,
    check_callable,
    check_number,
    is_array,
    is_real_scalar,
    refusal,
    short_repr,
)
from optloss.summaries import LEARNING_RATE
from optloss.trees import (
    increment,
    inexact_only,
    is_inexact,
    is_transformation,
    keep_dtypes,
    merge_leaves,
    scale_leaves,
    to_float32,
)

Rate = float | jax.Array | optax.Schedule
DecayFn = Callable[[jax.Array, jax.Array], jax.Array]
Factory = Callable[[jax.Array], optax.GradientTransformation]

SCHEDULE = "a schedule, a function step -> rate"
INJECTED = (
    "the optimizer is wrapped in optax.inject_hyperparams, whose state would keep the "
    "first learning rate for ever. Pass it unwrapped."
)


class LearningRateState(NamedTuple):
    """The base rate, the rate used last, and the state of the optimizer at it."""

    step: jax.Array  # int32 [], updates so far
    base: jax.Array | None  # float [], the rate before decay; None for a schedule
    rate: jax.Array  # float [], what the latest update used
    inner: Any

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return {LEARNING_RATE: self.rate}


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
    return _with_rate("scale_by_learning_rate", _descend, learning_rate, decay_fn)


def _descend(rate: jax.Array) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: scale_leaves(updates, -rate))


def inject_learning_rate(
    factory: Factory, learning_rate: Rate, decay_fn: DecayFn | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Build an optimizer anew at every update, with the learning rate of that step.

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

    def build(rate: jax.Array) -> optax.GradientTransformation:
        return _in_float32(check_transformation("inject_learning_rate", factory(rate)))

    return _with_rate("inject_learning_rate", build, learning_rate, decay_fn)


def _in_float32(inner: Any) -> optax.GradientTransformationExtraArgs:
    # In bfloat16, a decay of 0.999 is 1, and a difference of moments mostly rounding.
    update = optax.with_extra_args_support(inner).update
    return optax.GradientTransformationExtraArgs(
        inner.init,
        lambda updates, state, params=None, **extra: update(
            to_float32(updates), to_float32(state), to_float32(params), **extra
        ),
    )


def _with_rate(
    call: str, factory: Factory, learning_rate: Rate, decay_fn: DecayFn | None
) -> optax.GradientTransformationExtraArgs:
    check_rate(call, learning_rate, decay_fn)
    schedule = learning_rate if callable(learning_rate) else None

    def build(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(factory(rate))

    def rate_at(base: Any, step: jax.Array) -> Any:
        if schedule is not None:
            return check_scalar(call, "learning_rate", schedule, schedule(step))
        if decay_fn is None:
            return base
        return check_scalar(call, "decay_fn", decay_fn, decay_fn(base, step))

    def init(params: Any) -> Any:
        base = None if callable(learning_rate) else start_rate(learning_rate)
        rate = jnp.zeros((), jnp.float32) if base is None else jnp.copy(base)
        inner = build(rate).init(inexact_only(params))
        check_rate_is_outside(call, inner)
        step = jnp.zeros((), jnp.int32)
        return LearningRateState(step, base, rate, inner)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        step: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        rate = rate_at(state.base, state.step if step is None else step)
        rate = jnp.asarray(rate, state.rate.dtype)
        if step is not None:
            extra["step"] = step
        steps, inner = build(rate).update(
            inexact_only(updates),
            state.inner,
            None if params is None else inexact_only(params),
            **extra,
        )
        selected = [is_inexact(leaf) for leaf in jax.tree.leaves(updates)]
        inner = keep_dtypes(inner, state.inner)
        new_state = LearningRateState(increment(state.step), state.base, rate, inner)
        return merge_leaves(steps, updates, selected), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def start_rate(learning_rate: float | jax.Array) -> jax.Array:
    """Return the base rate as a scalar of its own: float64 only if given as such."""
    wide = is_array(learning_rate) and learning_rate.dtype == jnp.float64
    # A float64 array of NumPy's is float32 to a JAX that has no 64 bits.
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64 if wide else jnp.float32)
    return jnp.array(learning_rate, dtype, copy=True)


def set_learning_rate(state: Any, value: float | jax.Array) -> Any:
    """Return ``state`` with another learning rate (before decay, where there is one).

    Nothing is compiled anew: the rate is a scalar in the state, not a constant of the
    program.

    Args:
        state: A ``TrainOpState``, the state of :func:`make_optimizer`, or any tree that
            holds the state of one :func:`inject_learning_rate` or
            :func:`scale_by_learning_rate`.
        value: The new rate, a real number or 0-d array; may be traced.

    Returns:
        A tree of the same structure, dtypes and placement.

    Raises:
        ValueError: If ``value`` is no such number, or the state holds no base rate (the
            optimizer was an instance, or the rate a schedule) or several.

    Example:
        >>> import jax.numpy as jnp
        >>> state = scale_by_learning_rate(0.1).init(jnp.zeros(2))
        >>> print(set_learning_rate(state, 0.01).base)
        0.01
    """
    check_rate_number("set_learning_rate", "value", value)
    nodes, structure = jax.tree.flatten(state, is_leaf=_has_rate)
    places = [i for i, node in enumerate(nodes) if _has_rate(node)]
    if not places or any(nodes[i].base is None for i in places):
        raise refusal(
            f"set_learning_rate({short_repr(type(state))})",
            "the state holds no base rate. An optimizer given as an instance keeps its "
            "own rate, and a schedule has none: give a number as learning_rate, and "
            "the optimizer by name or as a function.",
        )
    if len(places) > 1:
        raise refusal(
            f"set_learning_rate({short_repr(type(state))})",
            f"the state holds {len(places)} base rates. Set them one by one in their "
            "parts of the state.",
        )
    node = nodes[places[0]]
    nodes[places[0]] = node._replace(base=_beside(node.base, value))
    return jax.tree.unflatten(structure, nodes)


def _has_rate(node: Any) -> bool:
    return isinstance(node, LearningRateState)


def _beside(old: jax.Array, value: float | jax.Array) -> jax.Array:
    return put_like(jnp.array(value, old.dtype, copy=True), old)


def check_rate(call: str, learning_rate: Any, decay_fn: Any) -> None:
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
    check_rate_number(call, "learning_rate", learning_rate)


def is_schedule(learning_rate: Any) -> bool:
    """Tell whether ``learning_rate`` is a function of the step."""
    return callable(learning_rate) and not isinstance(learning_rate, type)


def check_rate_number(
    call: str,
    argument: str,
    value: Any,
    requirement: str = "a finite real number >= 0 or a 0-d array.",
) -> None:
    """Refuse ``value`` unless it is a finite real number >= 0 or a 0-d array."""
    check_number(
        call,
        argument,
        value,
        lambda number: 0 <= number < float("inf"),
        requirement,
    )


def check_transformation(call: str, result: Any) -> Any:
    """Return what an optimizer's factory made if it has ``init`` and ``update``."""
    if not is_transformation(result):
        raise refusal(
            call,
            f"the optimizer's function returned {short_repr(result)}, which is no "
            "optax transformation. Return one, such as optax.sgd(rate).",
        )
    return result


def check_rate_is_outside(call: str, inner: Any) -> None:
    """Refuse the state of ``optax.inject_hyperparams``, which keeps its first rate."""
    if any(
        hasattr(node, "hyperparams")
        for node in jax.tree.leaves(inner, is_leaf=lambda n: hasattr(n, "hyperparams"))
    ):
        raise refusal(call, INJECTED)


def check_scalar(call: str, argument: str, fn: Any, result: Any) -> Any:
    """Refuse what a schedule or decay function returned unless it is a real scalar."""
    if not is_real_scalar(result):
        raise argument_error(
            call,
            argument,
            fn,
            f"must return a real scalar, returned {short_repr(result)}.",
        )
    return result

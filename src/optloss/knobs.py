"""A knob of a transform: a number, a traced scalar, or a function of the step."""

from collections.abc import Callable
from typing import TypeGuard

import jax
import jax.numpy as jnp

from optloss.messages import argument_error, check_callable, is_real_scalar, short_repr
from optloss.typing import Scalar, Schedule

SCHEDULE = "a schedule, a function step -> rate"
KNOB = "a function of the step"


def is_schedule(value: object) -> TypeGuard[Schedule]:
    """Tell whether ``value`` is a function of the step."""
    return callable(value) and not isinstance(value, type)


def check_knob(
    call: str, argument: str, value: object, check: Callable[..., None]
) -> None:
    """Refuse ``value`` unless it is a function, or what ``check`` accepts."""
    if is_schedule(value):
        check_callable(call, argument, value, 1, KNOB)
    else:
        check(call, **{argument: value})


def value_at(
    call: str, argument: str, knob: Scalar | Schedule, step: jax.Array
) -> Scalar:
    """Return what ``knob`` is at ``step``."""
    if not callable(knob):
        return knob
    return check_scalar(call, argument, knob, knob(step))


def check_schedule(call: str, argument: str, knob: object) -> None:
    """Refuse a function of the step that computes no real scalar."""
    if not is_schedule(knob):
        return
    check_callable(call, argument, knob, 1, KNOB)

    def compute(step: jax.Array) -> tuple[()]:
        value_at(call, argument, knob, step)
        return ()

    jax.eval_shape(compute, jax.ShapeDtypeStruct((), jnp.int32))


def check_scalar(call: str, argument: str, fn: object, result: object) -> Scalar:
    """Refuse what a schedule or decay function returned unless it is a real scalar."""
    if not is_real_scalar(result):
        problem = f"must return a real scalar, returned {short_repr(result)}."
        raise argument_error(call, argument, fn, problem)
    return result

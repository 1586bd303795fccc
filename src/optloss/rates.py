"""Checks of learning rates, and of what is built with them."""

from typing import Any

import jax
import jax.numpy as jnp

from optloss.messages import check_number, refusal, show


def check_rate(call: str, learning_rate: Any, decay_fn: Any) -> None:
    """Refuse what is neither a rate nor a schedule, and a schedule with a decay."""
    if decay_fn is not None and not callable(decay_fn):
        raise refusal(
            call, "decay_fn", decay_fn, "must be a function (rate, step) -> rate."
        )
    if is_schedule(learning_rate):
        if decay_fn is not None:
            raise refusal(
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


def check_rate_number(call: str, argument: str, value: Any) -> None:
    """Refuse ``value`` unless it is a finite real number >= 0 or a 0-d array."""
    check_number(
        call,
        argument,
        value,
        lambda number: 0 <= number < float("inf"),
        "a finite real number >= 0 or a 0-d array.",
    )


def check_transformation(call: str, result: Any) -> Any:
    """Return what an optimizer's factory made if it has ``init`` and ``update``."""
    if isinstance(result, type) or not (
        callable(getattr(result, "init", None))
        and callable(getattr(result, "update", None))
    ):
        raise ValueError(
            f"{call}: the optimizer's function returned {show(result)}, which is no "
            "optax transformation. Return one, such as optax.sgd(rate)."
        )
    return result


def check_rate_is_outside(call: str, inner: Any) -> None:
    """Refuse the state of ``optax.inject_hyperparams``, which keeps its first rate."""
    if any(
        hasattr(node, "hyperparams")
        for node in jax.tree.leaves(inner, is_leaf=lambda n: hasattr(n, "hyperparams"))
    ):
        raise ValueError(
            f"{call}: the optimizer is wrapped in optax.inject_hyperparams, whose "
            "state would keep the first learning rate for ever. Pass it unwrapped."
        )


def check_scalar(call: str, argument: str, fn: Any, result: Any) -> Any:
    """Refuse what a schedule or decay function returned unless it is a real scalar."""
    dtype = getattr(result, "dtype", None)
    shape = getattr(result, "shape", ())
    real = isinstance(result, (int, float)) if dtype is None else _is_real(dtype)
    if shape != () or not real or isinstance(result, bool):
        raise refusal(
            call, argument, fn, f"must return a real scalar, returned {show(result)}."
        )
    return result


def check_decay(call: str, decay_fn: Any) -> None:
    """Refuse a ``learning_rate_decay_fn`` that cannot be called."""
    if decay_fn is not None and not callable(decay_fn):
        raise refusal(
            call,
            "learning_rate_decay_fn",
            decay_fn,
            "must be a function (learning_rate, step) -> rate.",
        )


def check_result(call: str, learning_rate: Any, decay_fn: Any) -> None:
    """Refuse a decay function or a schedule that computes no real scalar."""

    def compute(rate: jax.Array, step: jax.Array) -> tuple[()]:
        if decay_fn is not None:
            result = decay_fn(rate, step)
            check_scalar(call, "learning_rate_decay_fn", decay_fn, result)
        elif is_schedule(learning_rate):
            check_scalar(call, "learning_rate", learning_rate, learning_rate(step))
        return ()

    rate, step = (jax.ShapeDtypeStruct((), t) for t in (jnp.float32, jnp.int32))
    jax.eval_shape(compute, rate, step)


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)

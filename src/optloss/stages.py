"""From an argument of ``optimize_loss`` or ``make_optimizer`` to a stage of the chain.

Each function checks one argument in the words of the call it belongs to, and returns
the transform that does it together with the text that describes it.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.messages import check_int, check_number, refusal, show
from optloss.names import Pattern
from optloss.names import check_variables as check_variables
from optloss.optimizers.registry import get_factory, title
from optloss.rates import (
    check_decay,
    check_result,
    check_transformation,
    is_schedule,
)
from optloss.transforms.clipping import clip_by_function, clip_by_global_norm
from optloss.transforms.learning_rate import inject_learning_rate
from optloss.transforms.multipliers import check_multipliers, multiply_gradients
from optloss.transforms.noise import add_gradient_noise, check_key
from optloss.transforms.packing import is_elementwise

AxisName = str | tuple[str, ...] | None


class Stage(NamedTuple):
    """One stage of the chain: what it does, in words and as a transform."""

    text: str
    transform: optax.GradientTransformationExtraArgs
    packs: bool = False  # whether it works on packed gradients, too
    argument: str = ""
    rules: Mapping[Pattern, Any] = types.MappingProxyType({})


NOTHING = Stage("", optax.with_extra_args_support(optax.identity()), packs=True)
PACKING = ("add_gradient_noise", "clip_by_global_norm", "adaptive_clipping")


def is_transformation(value: Any) -> bool:
    """Tell whether ``value`` is an instance with ``init`` and ``update``."""
    return not isinstance(value, type) and all(
        callable(getattr(value, name, None)) for name in ("init", "update")
    )


def name_of(transform: Any) -> str:
    """Return the name of the function that made ``transform``."""
    made_by = getattr(transform.init, "__qualname__", "").split(".<locals>")[0]
    return made_by.split(".")[0] or type(transform).__name__


def check_noise(call: str, scale: Any) -> None:
    """Refuse a ``gradient_noise_scale`` that is no strength and no transformation."""
    if scale is None or is_transformation(scale):
        return
    check_number(
        call,
        "gradient_noise_scale",
        scale,
        lambda number: 0 <= number < float("inf"),
        "a finite real number >= 0, a 0-d array or a transformation such as "
        "add_gradient_noise(0.1, annealing=0.55).",
    )


def noise_stage(call: str, scale: Any, seed: Any, axis_name: AxisName) -> Stage:
    """Return the stage for ``gradient_noise_scale`` and ``seed``."""
    check_noise(call, scale)
    check_key(call, "seed", seed)
    if scale is None:
        return NOTHING
    if is_transformation(scale):
        return _given_stage(scale)
    noise = add_gradient_noise(scale, key=seed, axis_name=axis_name)
    return Stage(f"add_gradient_noise({show(scale)})", noise, packs=True)


def _given_stage(transform: Any) -> Stage:
    ours = (getattr(transform.update, "__module__", None) or "").startswith("optloss.")
    packs = ours and name_of(transform) in PACKING
    return Stage(name_of(transform), optax.with_extra_args_support(transform), packs)


def multiplier_stage(call: str, argument: str, multipliers: Any) -> Stage:
    """Return the stage for the multipliers of gradients, or of learning rates."""
    if multipliers is None:
        return NOTHING
    check_multipliers(call, argument, multipliers)
    if not multipliers:
        return NOTHING
    rules = f"{len(multipliers)} rule{'s' if len(multipliers) > 1 else ''}"
    text = f"{argument}({rules})"
    return Stage(
        text,
        multiply_gradients(multipliers),
        packs=True,
        argument=argument,
        rules=multipliers,
    )


def clip_stage(call: str, clip: Any, axis_name: AxisName) -> Stage:
    """Return the stage for ``clip_gradients``."""
    if clip is None:
        return NOTHING
    if is_transformation(clip):
        return _given_stage(clip)
    if _is_factory(clip):
        raise refusal(
            call,
            "clip_gradients",
            clip,
            f"is a function that makes a clip. Call it: {_root(clip).__name__}(...).",
        )
    if _is_function(clip):
        return Stage(f"clip_by_function({show(clip)})", clip_by_function(clip))
    check_number(
        call,
        "clip_gradients",
        clip,
        lambda number: number >= 0,
        "a real number >= 0 (inf only measures), a 0-d array, a transformation such as "
        "adaptive_clipping(), or a function of (gradient, variable) pairs.",
    )
    transform = clip_by_global_norm(clip, axis_name=axis_name)
    return Stage(f"clip_by_global_norm({show(clip)})", transform, packs=True)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _root(function: Any) -> Any:
    while hasattr(function, "func"):
        function = function.func
    return function


def _is_factory(value: Any) -> bool:
    module = getattr(_root(value), "__module__", None) or ""
    return callable(value) and module.split(".")[0] in ("optloss", "optax")


def check_learning_rate(
    call: str, learning_rate: Any, optimizer: Any, decay_fn: Any
) -> None:
    """Refuse a ``learning_rate`` that does not go with the optimizer or the decay."""
    if learning_rate is None:
        brings_its_own = is_transformation(optimizer) or (
            not isinstance(optimizer, type) and _takes(optimizer, 0)
        )
        if not brings_its_own:
            raise refusal(
                call,
                "learning_rate",
                None,
                "may be None only where the optimizer brings its own rate: with an "
                "instance or a function without arguments.",
            )
        return
    if is_schedule(learning_rate):
        if decay_fn is not None:
            raise refusal(
                call,
                "learning_rate",
                learning_rate,
                "a schedule and learning_rate_decay_fn exclude each other. Give a "
                "number.",
            )
        return
    check_number(
        call,
        "learning_rate",
        learning_rate,
        lambda number: 0 <= number < float("inf"),
        "a finite real number >= 0, a 0-d array or a schedule (a function of the "
        "step).",
    )


def _takes(function: Any, arguments: int) -> bool:
    if isinstance(function, str) or not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError:
        return False
    except ValueError:  # a builtin that tells no signature
        return True
    return True


def optimizer_stage(
    call: str, learning_rate: Any, optimizer: Any, decay_fn: Any
) -> Stage:
    """Return the stage for ``optimizer`` at ``learning_rate``, in any of its forms."""
    check_decay(call, decay_fn)
    if is_transformation(optimizer):
        if decay_fn is not None and learning_rate is not None:
            warnings.warn(
                f"{call}: the optimizer is an instance, whose own learning rate "
                "governs; learning_rate_decay_fn has no effect.",
                UserWarning,
                stacklevel=3,
            )
        return _instance_stage(call, optimizer)
    if learning_rate is None:
        return _instance_stage(call, check_transformation(call, optimizer()))
    check_result(call, learning_rate, decay_fn)
    factory, text = _factory(call, optimizer)
    _probe_factory(call, factory)
    rate = show(learning_rate)
    if decay_fn is not None:
        rate += f" decayed by {show(decay_fn)}"
    transform = inject_learning_rate(factory, learning_rate, decay_fn)
    return Stage(f"{text} at {rate}", transform)


def _instance_stage(call: str, optimizer: Any) -> Stage:
    text = f"{name_of(optimizer)} at its own rate"
    return Stage(text, optax.with_extra_args_support(optimizer))


def _factory(call: str, optimizer: Any) -> tuple[Callable[..., Any], str]:
    if isinstance(optimizer, str):
        return get_factory(call, optimizer), title(optimizer)
    if _takes(optimizer, 1):
        return optimizer, show(optimizer)
    problem = (
        "must be a name, a function of the learning rate, a class or an optax "
        "transformation."
    )
    if isinstance(optimizer, type):
        problem = "a class must be built from the learning rate alone."
    elif callable(optimizer):
        problem = (
            "a function must take the learning rate alone. Bind the rest with a "
            "lambda, or give learning_rate=None for a function without arguments."
        )
    raise refusal(call, "optimizer", optimizer, problem)


def _probe_factory(call: str, factory: Callable[..., Any]) -> None:
    def build(rate: jax.Array) -> tuple[()]:
        _refuse_injected(call, check_transformation(call, factory(rate)))
        return ()

    jax.eval_shape(build, jax.ShapeDtypeStruct((), jnp.float32))


def _refuse_injected(call: str, transform: Any) -> None:
    if name_of(transform) == "inject_hyperparams":
        raise ValueError(
            f"{call}: the optimizer is wrapped in optax.inject_hyperparams, whose "
            "state would keep the first learning rate for ever. Pass it unwrapped."
        )


def check_axis_name(call: str, axis_name: Any) -> AxisName:
    """Return ``axis_name`` unless it is neither a str nor a tuple of them."""
    if axis_name is None or isinstance(axis_name, str):
        return axis_name
    if isinstance(axis_name, tuple) and all(isinstance(n, str) for n in axis_name):
        return axis_name
    raise refusal(
        call, "axis_name", axis_name, "must be a mesh axis's name or a tuple of them."
    )


def check_pack_size(call: str, size: Any, learning_rate: Any, optimizer: Any) -> int:
    """Return ``size`` unless it is no int >= 0, or the optimizer cannot be packed."""
    check_int(
        call,
        "pack_small_leaves",
        size,
        0,
        "an int >= 0: the largest size of a leaf to pack, 0 for none.",
    )
    # At a rate of its own: the caller's may be traced, and the answer is the same.
    rate = None if learning_rate is None else 0.1
    can_be_packed = (
        _named_can_be_packed if isinstance(optimizer, str) else _can_be_packed
    )
    if size and not can_be_packed(call, rate, optimizer):
        raise refusal(
            call,
            "pack_small_leaves",
            size,
            f"the optimizer {show(optimizer)} looks at the shapes, norms or names of "
            "single leaves, so packed leaves would train differently. Leave it at 0.",
        )
    return int(size)


def _can_be_packed(call: str, rate: float | None, optimizer: Any) -> bool:
    return is_elementwise(optimizer_stage(call, rate, optimizer, None).transform)


# Trying it out takes a second, and a name always means the same.
_named_can_be_packed = functools.cache(_can_be_packed)

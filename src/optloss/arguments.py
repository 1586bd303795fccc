"""The arguments of ``optimize_loss`` and ``make_optimizer``: refused, or made a stage.

Both calls take most of their arguments in common, and check them in the order of
TensorFlow's function: the first wrong one is refused, in the words of the call that was
given it. What passes is turned into the stages of the chain, each a transform together
with the text that describes it.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optloss.fast.packing import is_elementwise
from optloss.mesh import is_deleted
from optloss.messages import (
    argument_error,
    check_axis_name,
    check_bool,
    check_callable,
    check_int,
    check_key,
    check_number,
    is_array,
    is_encodable,
    is_number,
    listing,
    quoted,
    refusal,
    short_repr,
    takes,
)
from optloss.names import check_names, check_variables, leaf_names
from optloss.optimizers.registry import get_factory, title
from optloss.stages import NOTHING, Stage, Stages
from optloss.summaries import OPTIMIZER_SUMMARIES
from optloss.transforms.clipping import clip_by_function, clip_by_global_norm
from optloss.transforms.learning_rate import (
    INJECTED,
    SCHEDULE,
    check_rate_number,
    check_scalar,
    check_transformation,
    inject_learning_rate,
    is_schedule,
)
from optloss.transforms.multipliers import check_multipliers, multiply_gradients
from optloss.transforms.noise import add_gradient_noise
from optloss.trees import is_transformation
from optloss.typing import PyTree

Given = Mapping[str, Any]

LARGEST_STEP = 2**31 - 1


def stages_of(call: str, given: Given) -> Stages:
    """Refuse the first wrong argument that ``call`` was given, or return the stages."""
    made: dict[str, Any] = {}
    for name, check in CHECKS.items():
        if name in given:
            made[name] = check(call, given)
    return Stages(
        noise=_noise_stage(given)._replace(scope="noise"),
        multipliers=made["gradient_multipliers"],
        clip=_clip_stage(given)._replace(scope="clip"),
        optimizer=made["optimizer"]._replace(scope="optimizer"),
        rate_multipliers=made["learning_rate_multipliers"],
    )


def as_arrays(call: str, params: PyTree) -> PyTree:
    """Return ``params`` with numbers as arrays.

    Refuse leaves that are neither or whose buffers are gone, and names that collide.
    """
    if isinstance(params, Iterator):  # which JAX would take for a leaf
        problem = f"the parameters are {short_repr(params)}. Pass a list of them."
        raise refusal(call, problem)
    leaves, structure = jax.tree.flatten(params)
    names = leaf_names(params)
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if is_number(leaf) and _fits(leaf):
            leaves[i] = jnp.asarray(leaf)
        elif not _is_jax_array(leaf):
            raise refusal(
                call,
                f"{_parameter(name)} is no array but {short_repr(leaf)}. Keep such "
                "leaves outside, for example with params, static = eqx.partition("
                "model, eqx.is_inexact_array), and combine them inside the loss.",
            )
        elif is_deleted(leaf):
            raise refusal(
                call,
                f"{_parameter(name)} was deleted when it was donated to an earlier "
                "call. Take the parameters from what that call returned.",
            )
    check_names(call, params)
    return jax.tree.unflatten(structure, leaves)


def _parameter(name: str) -> str:
    return f"the parameter {quoted(name)}" if name else "the tree of parameters"


def _fits(number: Any) -> bool:
    try:
        jnp.asarray(number)
    except (OverflowError, ValueError):  # beyond int32, or beyond 4,300 digits
        return False
    return True


def _is_jax_array(leaf: Any) -> bool:
    if not (hasattr(leaf, "dtype") and isinstance(getattr(leaf, "shape", None), tuple)):
        return False
    # NumPy has arrays of objects, of text and of dates, which JAX has not.
    return not isinstance(leaf, (np.ndarray, np.generic)) or leaf.dtype.kind not in (
        *"OUSMm",
    )


# The loss and its step


def _check_loss(call: str, given: Given) -> None:
    loss = given["loss"]
    check_callable(call, "loss", loss, 1, "a function loss(params, *args)", more=True)


def _check_global_step(call: str, given: Given) -> None:
    step = given["global_step"]
    if step is None:
        return
    if is_array(step):
        good = step.shape == () and jnp.issubdtype(step.dtype, jnp.integer)
    else:
        good = isinstance(step, (int, np.integer)) and not isinstance(step, bool)
    if good and isinstance(step, jax.Array):
        good = not is_deleted(step)
    elif good:
        good = 0 <= int(step) <= LARGEST_STEP
    if not good:
        cure = (
            "must be an int in [0, 2**31) or a 0-d integer array, or None for no "
            "counter."
        )
        raise argument_error(call, "global_step", step, cure)


def _check_summaries(call: str, given: Given) -> None:
    summaries = given["summaries"]
    known = ", ".join(map(repr, OPTIMIZER_SUMMARIES))
    if summaries is None:
        return
    if isinstance(summaries, str) or not isinstance(summaries, Sequence):
        cure = f"must be a list out of {known}."
        raise argument_error(call, "summaries", summaries, cure)
    unknown = [
        entry
        for entry in summaries
        if not isinstance(entry, str) or entry not in OPTIMIZER_SUMMARIES
    ]
    if unknown:
        cure = f"unknown: {listing(unknown)}. Choose out of {known}."
        raise argument_error(call, "summaries", summaries, cure)


def _check_counter(call: str, given: Given) -> None:
    if given.get("global_step", 0) is not None or given["learning_rate"] is None:
        return
    if given["learning_rate_decay_fn"] is not None:
        reader = "learning_rate_decay_fn"
    elif is_schedule(given["learning_rate"]):
        reader = "a schedule as learning_rate"
    else:
        return
    cure = f"global_step is required for {reader}. Start it at 0."
    raise argument_error(call, "global_step", None, cure)


def _check_update_ops(call: str, given: Given) -> None:
    ops = given["update_ops"]
    if ops is None:
        return
    if isinstance(ops, (str, bytes)) or not (
        isinstance(ops, Sequence) and all(map(callable, ops))
    ):
        cure = "must be a list of functions op(model_state, context) -> model_state."
        raise argument_error(call, "update_ops", ops, cure)
    wanted = "a function op(model_state, context) -> model_state"
    for i, op in enumerate(ops):
        check_callable(call, f"update_ops[{i}]", op, 2, wanted)


def _check_name(call: str, given: Given) -> None:
    name = given["name"]
    if name is not None and not (isinstance(name, str) and is_encodable(name)):
        raise argument_error(call, "name", name, "must be a str; '' for no prefix.")


# Noise, multipliers, clip


def _check_noise(call: str, given: Given) -> None:
    scale = given["gradient_noise_scale"]
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


def _noise_stage(given: Given) -> Stage:
    scale, seed = given["gradient_noise_scale"], given["seed"]
    if scale is None:
        return NOTHING
    if is_transformation(scale):
        return _given_stage(scale)
    noise = add_gradient_noise(scale, key=seed, axis_name=given["axis_name"])
    return Stage(f"add_gradient_noise({short_repr(scale)})", noise)


def _multiplier_stage(argument: str, call: str, given: Given) -> Stage:
    multipliers = given[argument]
    if multipliers is None:
        return NOTHING
    check_multipliers(call, argument, multipliers)
    if not multipliers:
        return NOTHING
    rules = f"{len(multipliers)} rule{'s' if len(multipliers) > 1 else ''}"
    transform = multiply_gradients(multipliers)
    return Stage(f"{argument}({rules})", transform, argument, multipliers)


def _check_clip(call: str, given: Given) -> None:
    clip = given["clip_gradients"]
    if clip is None or is_transformation(clip):
        return
    if _is_factory(clip):
        cure = f"is a function that makes a clip. Call it: {_root(clip).__name__}(...)."
        raise argument_error(call, "clip_gradients", clip, cure)
    if _is_function(clip):
        wanted = "a function of a list of (gradient, variable) pairs"
        check_callable(call, "clip_gradients", clip, 1, wanted)
    else:
        check_number(
            call,
            "clip_gradients",
            clip,
            lambda number: number >= 0,
            "a real number >= 0 (inf only measures), a 0-d array, a transformation "
            "such as adaptive_clipping(), or a function of (gradient, variable) pairs.",
        )


def _clip_stage(given: Given) -> Stage:
    clip = given["clip_gradients"]
    if clip is None:
        return NOTHING
    if is_transformation(clip):
        return _given_stage(clip)
    if _is_function(clip):
        return Stage(f"clip_by_function({short_repr(clip)})", clip_by_function(clip))
    transform = clip_by_global_norm(clip, axis_name=given["axis_name"])
    return Stage(f"clip_by_global_norm({short_repr(clip)})", transform)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def name_of(transform: Any) -> str:
    """Return the name of the function that made ``transform``."""
    made_by = getattr(transform.init, "__qualname__", "").split(".<locals>")[0]
    return made_by.split(".")[0] or type(transform).__name__


def _given_stage(transform: Any) -> Stage:
    return Stage(name_of(transform), optax.with_extra_args_support(transform))


def _root(function: Any) -> Any:
    while hasattr(function, "func"):
        function = function.func
    return function


def _is_factory(value: Any) -> bool:
    module = getattr(_root(value), "__module__", None) or ""
    return callable(value) and module.split(".")[0] in ("optloss", "optax")


# The optimizer and its learning rate


def _check_learning_rate(call: str, given: Given) -> None:
    learning_rate, optimizer = given["learning_rate"], given["optimizer"]
    if learning_rate is None:
        brings_its_own = is_transformation(optimizer) or (
            not isinstance(optimizer, type) and _takes(optimizer, 0)
        )
        if not brings_its_own:
            cure = (
                "may be None only where the optimizer brings its own rate: with an "
                "instance or a function without arguments."
            )
            raise argument_error(call, "learning_rate", None, cure)
    elif is_schedule(learning_rate):
        check_callable(call, "learning_rate", learning_rate, 1, SCHEDULE)
        if given["learning_rate_decay_fn"] is not None:
            cure = (
                "a schedule and learning_rate_decay_fn exclude each other. Give a "
                "number."
            )
            raise argument_error(call, "learning_rate", learning_rate, cure)
    else:
        cure = (
            "a finite real number >= 0, a 0-d array or a schedule (a function of the "
            "step)."
        )
        check_rate_number(call, "learning_rate", learning_rate, cure)


def _takes(function: Any, arguments: int) -> bool:
    return callable(function) and takes(function, arguments)


def _optimizer_stage(call: str, given: Given) -> Stage:
    learning_rate, optimizer = given["learning_rate"], given["optimizer"]
    decay_fn = _decay_fn(call, given)
    if is_transformation(optimizer):
        if decay_fn is not None and learning_rate is not None:
            warnings.warn(
                f"{call}: the optimizer is an instance, whose own learning rate "
                "governs; learning_rate_decay_fn has no effect.",
                UserWarning,
                stacklevel=5,
            )
        return _instance_stage(optimizer)
    if learning_rate is None:
        return _instance_stage(check_transformation(call, optimizer()))
    _check_result(call, learning_rate, decay_fn)
    factory, text = _factory(call, optimizer)
    _probe_factory(call, factory)
    rate = short_repr(learning_rate)
    if decay_fn is not None:
        rate += f" decayed by {short_repr(decay_fn)}"
    transform = inject_learning_rate(factory, learning_rate, decay_fn)
    return Stage(f"{text} at {rate}", transform)


def _decay_fn(call: str, given: Given) -> Any:
    decay_fn = given["learning_rate_decay_fn"]
    if decay_fn is not None:
        wanted = "a function (learning_rate, step) -> rate"
        check_callable(call, "learning_rate_decay_fn", decay_fn, 2, wanted)
    return decay_fn


def _instance_stage(optimizer: Any) -> Stage:
    text = f"{name_of(optimizer)} at its own rate"
    return Stage(text, optax.with_extra_args_support(optimizer))


def _factory(call: str, optimizer: Any) -> tuple[Callable[..., Any], str]:
    if isinstance(optimizer, str):
        return get_factory(call, optimizer), title(optimizer)
    if _takes(optimizer, 1):
        return optimizer, short_repr(optimizer)
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
    raise argument_error(call, "optimizer", optimizer, problem)


def _probe_factory(call: str, factory: Callable[..., Any]) -> None:
    def build(rate: jax.Array) -> tuple[()]:
        made = check_transformation(call, factory(rate))
        if name_of(made) == "inject_hyperparams":
            raise refusal(call, INJECTED)
        return ()

    jax.eval_shape(build, jax.ShapeDtypeStruct((), jnp.float32))


def _check_result(call: str, learning_rate: Any, decay_fn: Any) -> None:
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


def _check_pack_size(call: str, given: Given) -> None:
    size, optimizer = given["pack_small_leaves"], given["optimizer"]
    cure = "an int >= 0: the largest size of a leaf to pack, 0 for none."
    check_int(call, "pack_small_leaves", size, 0, cure)
    # At a rate of its own: the caller's may be traced, and the answer is the same.
    rate = None if given["learning_rate"] is None else 0.1
    named = isinstance(optimizer, str)
    can_be_packed = _named_can_be_packed if named else _can_be_packed
    if size and not can_be_packed(call, rate, optimizer):
        cure = (
            f"the optimizer {short_repr(optimizer)} looks at the shapes, norms or "
            "names of single leaves, so packed leaves would train differently. Leave "
            "it at 0."
        )
        raise argument_error(call, "pack_small_leaves", size, cure)


def _can_be_packed(call: str, rate: float | None, optimizer: Any) -> bool:
    given = {
        "learning_rate": rate,
        "optimizer": optimizer,
        "learning_rate_decay_fn": None,
    }
    return is_elementwise(_optimizer_stage(call, given).transform)


# Trying it out takes a second, and a name always means the same.
_named_can_be_packed = functools.cache(_can_be_packed)


def _flag(name: str) -> Callable[[str, Given], bool]:
    return lambda call, given: check_bool(call, name, given[name])


CHECKS: dict[str, Callable[[str, Given], Any]] = {
    "loss": _check_loss,
    "global_step": _check_global_step,
    "learning_rate": _check_learning_rate,
    "summaries": _check_summaries,
    "learning_rate_decay_fn": _check_counter,
    "optimizer": _optimizer_stage,
    "clip_gradients": _check_clip,
    "gradient_noise_scale": _check_noise,
    "gradient_multipliers": functools.partial(
        _multiplier_stage, "gradient_multipliers"
    ),
    "update_ops": _check_update_ops,
    "variables": lambda call, given: check_variables(call, given["variables"]),
    "name": _check_name,
    "colocate_gradients_with_ops": _flag("colocate_gradients_with_ops"),
    "increment_global_step": _flag("increment_global_step"),
    "learning_rate_multipliers": functools.partial(
        _multiplier_stage, "learning_rate_multipliers"
    ),
    "histogram_every": lambda call, given: check_int(
        call,
        "histogram_every",
        given["histogram_every"],
        1,
        "an int in [1, 2**31).",
        LARGEST_STEP,
    ),
    "skip_nonfinite": _flag("skip_nonfinite"),
    "seed": lambda call, given: check_key(call, "seed", given["seed"]),
    "pack_small_leaves": _check_pack_size,
    "axis_name": lambda call, given: check_axis_name(call, given["axis_name"]),
    "donate": _flag("donate"),
}

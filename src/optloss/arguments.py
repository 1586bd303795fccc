"""The arguments of ``optimize_loss`` and ``make_optimizer``: refused, or made a stage.

Both calls take most of their arguments in common, and check them in the order of
TensorFlow's function: the first wrong one is refused, in the words of the call that was
given it. What passes is turned into the stages of the chain, each a transform together
with the text that describes it.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optloss.averages import check_decay
from optloss.extra import by_signature
from optloss.groups import Table
from optloss.knobs import check_schedule, is_schedule
from optloss.loss_scale import as_loss_scale
from optloss.made_by import module_of, name_of, root
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
    is_real_scalar,
    listing,
    quoted,
    refusal,
    short_repr,
    takes,
)
from optloss.names import check_names, check_variables, leaf_names
from optloss.optimizer_argument import (
    Given,
    check_learning_rate,
    check_pack_size,
    optimizer_stage,
)
from optloss.per_example import ClippedPerExample
from optloss.replicas import shard_axes
from optloss.spikes import as_spike_rule
from optloss.stages import NOTHING, Stage, Stages
from optloss.summaries import OPTIMIZER_SUMMARIES
from optloss.transforms.clipping import clip_by_function, clip_by_global_norm
from optloss.transforms.multipliers import check_multipliers, multiply_gradients
from optloss.transforms.noise import add_gradient_noise
from optloss.trees import is_transformation
from optloss.typing import PyTree

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
        if is_number(leaf):
            # An int may be beyond int32, or beyond 4,300 digits.
            with contextlib.suppress(OverflowError, ValueError):
                leaves[i] = leaf = jnp.asarray(leaf)
        if not _is_jax_array(leaf):
            problem = f"{_parameter(name)} is no array but {short_repr(leaf)}."
            raise refusal(call, f"{problem} {_cure(leaf)}")
        if is_deleted(leaf):
            raise refusal(
                call,
                f"{_parameter(name)} was deleted when it was donated to an earlier "
                "call. Take the parameters from what that call returned.",
            )
    check_names(call, params)
    _check_nnx(call, params)
    return jax.tree.unflatten(structure, leaves)


def _check_nnx(call: str, params: PyTree) -> None:
    """Refuse what an nnx model holds beside parameters, which would stay as it is."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    kinds = (nnx.BatchStat, nnx.Cache, nnx.Intermediate, nnx.RngState)
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, kinds))
    found = {type(node).__name__ for node in nodes if isinstance(node, kinds)}
    if found:
        raise refusal(
            call,
            f"the parameters hold variables that a step changes, {listing(found)}. "
            "Use optloss.integrations.nnx.optimize_loss(model, loss, ...), which keeps "
            "the changes; or split them off: graphdef, params, rest = nnx.split("
            "model, nnx.Param, ...), init(params, rest), and nnx.merge in the loss.",
        )


def _cure(leaf: object) -> str:
    if callable(getattr(leaf, "init", None)) and hasattr(leaf, "apply"):
        return "Pass the parameters that it makes: module.init(key, x)."
    return (
        "Keep such leaves outside, for example with params, static = eqx.partition("
        "model, eqx.is_inexact_array), and combine them inside the loss."
    )


def _parameter(name: str) -> str:
    return f"the parameter {quoted(name)}" if name else "the tree of parameters"


def _is_jax_array(leaf: object) -> bool:
    if not (hasattr(leaf, "dtype") and isinstance(getattr(leaf, "shape", None), tuple)):
        return False
    # NumPy has arrays of objects, of text and of dates, which JAX has not.
    is_numpy = isinstance(leaf, (np.ndarray, np.generic))
    return not (is_numpy and leaf.dtype.kind in "OUSMm")


# The loss and its step


def _check_loss(call: str, given: Given) -> None:
    loss = given["loss"]
    check_callable(call, "loss", loss, 1, "a function loss(params, *args)", more=True)


def _check_global_step(call: str, given: Given) -> None:
    step = given["global_step"]
    if step is None:
        return
    whole = isinstance(step, (int, np.integer)) or (
        is_array(step) and jnp.issubdtype(step.dtype, jnp.integer)
    )
    good = whole and is_real_scalar(step)
    if good and not isinstance(step, jax.Array):
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
    if given.get("global_step", 0) is not None:
        return
    rates = Table.of(given["learning_rate"]).values
    mappings = (given["gradient_multipliers"], given["learning_rate_multipliers"])
    multipliers = [v for m in mappings if isinstance(m, Mapping) for v in m.values()]
    if given["learning_rate_decay_fn"] is not None and any(
        rate is not None for rate in rates
    ):
        reader = "learning_rate_decay_fn"
    elif any(map(is_schedule, rates)):
        reader = "a schedule as learning_rate"
    elif is_schedule(given["gradient_noise_scale"]):
        reader = "a function as gradient_noise_scale"
    elif any(map(is_schedule, multipliers)):
        reader = "a function as multiplier"
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


def _check_histogram_every(call: str, given: Given) -> None:
    every, wanted = given["histogram_every"], "an int in [1, 2**31)."
    check_int(call, "histogram_every", every, 1, wanted, LARGEST_STEP)


# The gradient, and what follows the update


def _check_value_and_grad(call: str, given: Given) -> None:
    value_and_grad = given["value_and_grad"]
    wanted = "a function like jax.value_and_grad"
    check_callable(call, "value_and_grad", value_and_grad, 1, wanted, more=True)
    problem = ""
    if not takes(value_and_grad, 1, more=True, keywords=("has_aux",)):
        problem = (
            f"must be {wanted}, with an argument has_aux. Pass jax.value_and_grad "
            "itself, not what it makes of the loss."
        )
    elif module_of(value_and_grad).startswith("flax.nnx"):
        problem = (
            "differentiates nnx modules, not trees of arrays. Use jax.value_and_grad; "
            "optloss.integrations.nnx.optimize_loss takes the module itself."
        )
    if problem:
        raise argument_error(call, "value_and_grad", value_and_grad, problem)
    if not isinstance(value_and_grad, ClippedPerExample):
        return
    mixed = "a mean over devices mixes their examples. Use jit on a mesh."
    reason = {
        "axis_name": mixed,
        "replica_axis_name": mixed,
        "loss_scale": "it would clip scaled gradients. Scale neither, for example in "
        "bfloat16.",
    }
    for other, why in reason.items():
        if given[other] is not None:
            problem = f"cannot be used together with {other}: {why}"
            raise argument_error(call, "value_and_grad", value_and_grad, problem)


def _check_projection(call: str, given: Given) -> None:
    if given["projection"] is not None:
        wanted = "a function of the trained parameters that returns such"
        check_callable(call, "projection", given["projection"], 1, wanted)


# Noise, multipliers, clip


def _check_noise(call: str, given: Given) -> None:
    scale = given["gradient_noise_scale"]
    if scale is None or is_transformation(scale):
        return
    wanted = (
        "a finite real number >= 0, a 0-d array or a transformation such as "
        "add_gradient_noise(0.1, annealing=0.55)."
    )
    if callable(scale) and root(scale) is add_gradient_noise:
        raise argument_error(call, "gradient_noise_scale", scale, f"must be {wanted}")
    if is_schedule(scale):
        check_schedule(call, "gradient_noise_scale", scale)
    else:
        check_number(
            call, "gradient_noise_scale", scale, lambda n: 0 <= n < math.inf, wanted
        )


def _noise_stage(given: Given) -> Stage:
    scale, seed = given["gradient_noise_scale"], given["seed"]
    if scale is None:
        return NOTHING
    if is_transformation(scale):
        return Stage(name_of(scale), by_signature(scale))
    noise = add_gradient_noise(scale, key=seed, axis_name=shard_axes(given))
    return Stage(f"add_gradient_noise({short_repr(scale)})", noise)


def _multiplier_stage(argument: str, call: str, given: Given) -> Stage:
    multipliers = given[argument]
    if multipliers is None:
        return NOTHING
    check_multipliers(call, argument, multipliers)
    for key, multiplier in multipliers.items():
        check_schedule(call, f"{argument}[{key!r}]", multiplier)
    if not multipliers:
        return NOTHING
    rules = f"{len(multipliers)} rule{'s' if len(multipliers) > 1 else ''}"
    transform = multiply_gradients(multipliers)
    return Stage(f"{argument}({rules})", transform, argument, multipliers)


def _check_clip(call: str, given: Given) -> None:
    clip = given["clip_gradients"]
    if clip is None or is_transformation(clip):
        return
    library = module_of(clip).split(".")[0]
    if callable(clip) and library in ("optloss", "optax"):
        cure = f"is a function that makes a clip. Call it: {root(clip).__name__}(...)."
        raise argument_error(call, "clip_gradients", clip, cure)
    if callable(clip) and not isinstance(clip, type):
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
        return Stage(name_of(clip), by_signature(clip))
    if is_real_scalar(clip):
        transform = clip_by_global_norm(clip, axis_name=shard_axes(given))
        return Stage(f"clip_by_global_norm({short_repr(clip)})", transform)
    return Stage(f"clip_by_function({short_repr(clip)})", clip_by_function(clip))


def _flag(name: str) -> Callable[[str, Given], None]:
    return lambda call, given: check_bool(call, name, given[name])


CHECKS: dict[str, Callable[[str, Given], object]] = {
    "loss": _check_loss,
    "global_step": _check_global_step,
    "learning_rate": check_learning_rate,
    "summaries": _check_summaries,
    "learning_rate_decay_fn": _check_counter,
    "optimizer": optimizer_stage,
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
    "histogram_every": _check_histogram_every,
    "skip_nonfinite": _flag("skip_nonfinite"),
    "seed": lambda call, given: check_key(call, "seed", given["seed"]),
    "pack_small_leaves": check_pack_size,
    "axis_name": lambda call, given: check_axis_name(call, given["axis_name"]),
    "replica_axis_name": lambda call, given: check_axis_name(
        call, given["replica_axis_name"], "replica_axis_name"
    ),
    "donate": _flag("donate"),
    "skip_spikes": lambda call, given: as_spike_rule(call, given["skip_spikes"]),
    "value_and_grad": _check_value_and_grad,
    "loss_scale": lambda call, given: as_loss_scale(call, given["loss_scale"]),
    "projection": _check_projection,
    "moving_average": lambda call, given: check_decay(call, given["moving_average"]),
}

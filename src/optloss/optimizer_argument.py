"""The arguments ``optimizer``, ``learning_rate`` and what belongs to them.

Each is of one form, or a mapping from names or patterns to such forms. They are
refused, or made the optimizer's stage of the chain.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import optax

from optloss.extra import by_signature
from optloss.groups import Groups, Maker, Table
from optloss.hyperparams import INJECTED, Factory, keeps_first_rate
from optloss.knobs import SCHEDULE, check_scalar, check_schedule, is_schedule
from optloss.made_by import name_of
from optloss.messages import (
    MOST_SHOWN,
    argument_error,
    check_callable,
    check_int,
    check_number,
    quoted,
    refusal,
    short_repr,
    takes,
)
from optloss.names import is_pattern, text_of
from optloss.optimizers.registry import get_factory, title
from optloss.stages import NOTHING, Stage
from optloss.transforms.learning_rate import check_transformation, inject_learning_rate
from optloss.trees import is_transformation
from optloss.typing import DecayFn, LearningRate, OneOptimizer

Given = Mapping[str, Any]

NUMBER = (
    "a finite real number >= 0, a 0-d array or a schedule (a function of the step)."
)


def _items(argument: str, given: Any) -> list[tuple[str, Any]]:
    """Return each value with the text by which a message names it."""
    if not isinstance(given, Mapping):
        return [(argument, given)]
    return [(f"{argument}[{text_of(key)!r}]", value) for key, value in given.items()]


def _check_keys(call: str, argument: str, given: object) -> None:
    if not isinstance(given, Mapping):
        return
    if not given:
        cure = "maps no parameter to anything. Add '**' for all."
        raise argument_error(call, argument, given, cure)
    seen: set[str] = set()
    for key in given:
        if not is_pattern(key):
            problem = f"the key {quoted(key)} is neither a name nor a compiled pattern."
            raise argument_error(call, argument, given, problem)
        if text_of(key) in seen:
            problem = (
                f"two keys have the text {quoted(text_of(key))}, by which the state "
                "names its groups. Write one of them differently."
            )
            raise argument_error(call, argument, given, problem)
        seen.add(text_of(key))


def check_learning_rate(call: str, given: Given) -> None:
    """Refuse a rate of no known form, and one that its optimizer cannot do with."""
    _check_keys(call, "learning_rate", given["learning_rate"])
    decay_fn, grouped = given["learning_rate_decay_fn"], given["optimizer"]
    for argument, rate in _items("learning_rate", given["learning_rate"]):
        if rate is None:
            # Which optimizer meets which rate of a mapping is known with the names.
            mapped = isinstance(given["learning_rate"], Mapping)
            known = not (mapped and isinstance(grouped, Mapping))
            if known and not all(map(_brings_its_own, Table.of(grouped).values)):
                cure = (
                    "may be None only where the optimizer brings its own rate: with an "
                    "instance or a function without arguments."
                )
                raise argument_error(call, argument, None, cure)
        elif not is_schedule(rate):
            check_number(call, argument, rate, lambda n: 0 <= n < math.inf, NUMBER)
        else:
            check_callable(call, argument, rate, 1, SCHEDULE)
            if decay_fn is not None:
                cure = (
                    "a schedule and learning_rate_decay_fn exclude each other. Give a "
                    "number."
                )
                raise argument_error(call, argument, rate, cure)


def _brings_its_own(
    optimizer: object,
) -> TypeGuard[Callable[[], optax.GradientTransformation]]:
    return is_transformation(optimizer) or (
        not isinstance(optimizer, type) and _takes(optimizer, 0)
    )


def _takes(
    function: object, arguments: int
) -> TypeGuard[Callable[..., optax.GradientTransformation]]:
    return callable(function) and takes(function, arguments)


def optimizer_stage(call: str, given: Given) -> Stage:
    """Return the stage of the optimizer, or of several."""
    rates, optimizer = given["learning_rate"], given["optimizer"]
    decay_fn = given["learning_rate_decay_fn"]
    if decay_fn is not None:
        wanted = (
            "a function (learning_rate, step) -> rate; bind other arguments with "
            "functools.partial, and pass a schedule as learning_rate"
        )
        check_callable(call, "learning_rate_decay_fn", decay_fn, 2, wanted)
    _check_keys(call, "optimizer", optimizer)
    if decay_fn is not None and rates is not None:
        _warn_of_own_rates(call, optimizer)
    for argument, one in _items("learning_rate", rates):
        check_schedule(call, argument, one)
        if decay_fn is not None and one is not None:
            _check_decay(call, decay_fn)
    makers = {
        argument: _maker(call, argument, one, rates)
        for argument, one in _items("optimizer", optimizer)
    }
    if isinstance(optimizer, Mapping) or isinstance(rates, Mapping):
        return _grouped_stage(call, given, list(makers.values()))
    maker = makers["optimizer"]
    if maker.keeps_own(rates):
        return Stage(f"{maker.text} at its own rate", by_signature(maker.own()))
    rate: Any = rates
    transform = inject_learning_rate(maker.factory, rate, decay_fn)
    return Stage(f"{maker.text} at {_rate_text(rates, decay_fn)}", transform)


def _grouped_stage(call: str, given: Given, makers: list[Maker]) -> Stage:
    rates, decay_fn = given["learning_rate"], given["learning_rate_decay_fn"]
    table = Table.of(given["optimizer"])._replace(values=tuple(makers))
    groups = Groups(call, table, Table.of(rates), decay_fn, given["pack_small_leaves"])
    what = makers[0].text
    if table.patterns is not None:
        pairs = zip(table.keys, makers, strict=True)
        what = "{" + ", ".join(f"{key!r}: {maker.text}" for key, maker in pairs) + "}"
    text = f"{what} at {_rate_text(rates, decay_fn)}"
    return NOTHING._replace(text=text, groups=groups)


def _rate_text(rates: LearningRate, decay_fn: DecayFn | None) -> str:
    if isinstance(rates, Mapping):
        pairs = ((text_of(key), short_repr(rate)) for key, rate in rates.items())
        text = "{" + ", ".join(f"{key!r}: {rate}" for key, rate in pairs) + "}"
    else:
        text = "its own rate" if rates is None else short_repr(rates)
    if decay_fn is not None:
        text += f" decayed by {short_repr(decay_fn, 2 * MOST_SHOWN)}"
    return text


def _warn_of_own_rates(call: str, optimizer: object) -> None:
    if any(map(is_transformation, Table.of(optimizer).values)):
        warnings.warn(
            f"{call}: the optimizer is an instance, whose own learning rate "
            "governs; learning_rate_decay_fn has no effect.",
            UserWarning,
            stacklevel=7,
        )


def _maker(
    call: str, argument: str, optimizer: OneOptimizer, rates: LearningRate
) -> Maker:
    if is_transformation(optimizer):
        return Maker(name_of(optimizer), None, lambda: optimizer, governs=True)
    if isinstance(optimizer, str):
        return _named_maker(call, optimizer)
    own, given = None, Table.of(rates).values
    if any(rate is None for rate in given) and _brings_its_own(optimizer):
        own = functools.partial(_made_without_rate, call, optimizer)
        made = name_of(own())
        if rates is None or not _takes(optimizer, 1):
            return Maker(made, None, own)
    if not _takes(optimizer, 1):
        raise _no_optimizer(call, argument, optimizer)
    _probe_factory(call, optimizer)
    return Maker(short_repr(optimizer), optimizer, own)


@functools.cache  # it remembers whether it can be packed
def _named_maker(call: str, name: str) -> Maker:
    factory = get_factory(call, name)
    _probe_factory(call, factory)
    return Maker(title(name), factory, None)


def _made_without_rate(
    call: str, optimizer: Callable[[], object]
) -> optax.GradientTransformation:
    return check_transformation(call, optimizer())


def _no_optimizer(call: str, argument: str, optimizer: object) -> ValueError:
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
    return argument_error(call, argument, optimizer, problem)


def _probe_factory(call: str, factory: Factory) -> None:
    names = []

    def build(rate: jax.Array) -> tuple[()]:
        names.append(name_of(check_transformation(call, factory(rate))))
        return ()

    jax.eval_shape(build, jax.ShapeDtypeStruct((), jnp.float32))
    if names[0] == "optax.inject_hyperparams":
        params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
        if keeps_first_rate(factory, params):
            raise refusal(call, INJECTED)


def _check_decay(call: str, decay_fn: DecayFn) -> None:
    """Refuse a decay function that computes no real scalar."""

    def compute(rate: jax.Array, step: jax.Array) -> tuple[()]:
        check_scalar(call, "learning_rate_decay_fn", decay_fn, decay_fn(rate, step))
        return ()

    rate, step = (jax.ShapeDtypeStruct((), t) for t in (jnp.float32, jnp.int32))
    jax.eval_shape(compute, rate, step)


def check_pack_size(call: str, given: Given) -> None:
    """Refuse a size that is none, and packing where no optimizer can be packed."""
    size, optimizer = given["pack_small_leaves"], given["optimizer"]
    cure = "an int >= 0: the largest size of a leaf to pack, 0 for none."
    check_int(call, "pack_small_leaves", size, 0, cure)
    if not size:
        return
    for one in Table.of(optimizer).values:
        if _maker(call, "optimizer", one, given["learning_rate"]).is_elementwise:
            return
    what = f"the optimizer {short_repr(optimizer)} looks"
    if isinstance(optimizer, Mapping):
        what = f"each optimizer of {short_repr(optimizer)} looks"
    cure = (
        f"{what} at the shapes, norms or names of single leaves, so packed leaves "
        "would train differently. Leave it at 0."
    )
    raise argument_error(call, "pack_small_leaves", size, cure)

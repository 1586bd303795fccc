"""Optimizers by name.

The six capitalised names are TensorFlow's, with TensorFlow's numerics. A lower-case
name is optax's own function of that name. Either may carry keywords, written as Python
writes them: ``"adamw(weight_decay=0.1)"``. Such a text is parsed, never run.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from optloss.messages import (
    argument_error,
    check_callable,
    listing,
    nearest,
    quoted,
    short_text,
)
from optloss.optimizers.tensorflow import OPTIMIZER_CLS_NAMES
from optloss.typing import PyTree

Factory = Callable[..., optax.GradientTransformation]

LONGEST_TEXT = 10_000
PROBE = (("kernel", (3, 5)), ("bias", (5,)))

OPTAX_NAMES = (
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "amsgrad",
    "fromage",
    "lamb",
    "lars",
    "lbfgs",
    "lion",
    "nadam",
    "nadamw",
    "noisy_sgd",
    "novograd",
    "optimistic_adam_v2",
    "optimistic_gradient_descent",
    "polyak_sgd",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sign_sgd",
    "signum",
    "sm3",
    "yogi",
)
CONTRIB_NAMES = (
    "acprop",
    "ademamix",
    "adopt",
    "cocob",
    "dadapt_adamw",
    "dog",
    "dowg",
    "galore",
    "madgrad",
    "momo",
    "momo_adam",
    "muon",
    "prodigy",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "simplified_ademamix",
)

_registered: dict[str, Factory] = {
    **OPTIMIZER_CLS_NAMES,
    **{name: getattr(optax, name) for name in OPTAX_NAMES if hasattr(optax, name)},
    **{
        name: getattr(contrib, name) for name in CONTRIB_NAMES if hasattr(contrib, name)
    },
}


def list_optimizers(pattern: str = "*") -> list[str]:
    """List the names of optimizers that match a shell-style pattern, sorted.

    Args:
        pattern: ``*`` and ``?`` stand for any characters and any one, case counts.

    Returns:
        The names of TensorFlow's six, optax's, and those registered.

    Raises:
        ValueError: If ``pattern`` is not a str.

    Example:
        >>> list_optimizers("[A-Z]*")
        ['Adagrad', 'Adam', 'Ftrl', 'Momentum', 'RMSProp', 'SGD']
        >>> list_optimizers("adam*")
        ['adam', 'adamax', 'adamaxw', 'adamw']
    """
    if not isinstance(pattern, str):
        raise argument_error("list_optimizers", "pattern", pattern, "must be a str.")
    return sorted(name for name in _registered if fnmatch.fnmatchcase(name, pattern))


def register_optimizer(name: str, factory: Factory) -> None:
    """Make an optimizer of your own known by name.

    Args:
        name: An identifier that no other optimizer has.
        factory: ``factory(learning_rate, **keywords)`` returns an optax transformation.
            It is called with a traced scalar, once per trace, and with 0.1 to try out
            keywords that are written behind its name.

    Raises:
        ValueError: If the name is taken or no identifier, or ``factory`` is not
            callable.

    Example:
        >>> import optax
        >>> register_optimizer("heavy_ball", lambda rate: optax.sgd(rate, 0.99))
        >>> list_optimizers("heavy*")
        ['heavy_ball']
    """
    call = "register_optimizer"
    if not _is_identifier(name):
        raise argument_error(call, "name", name, "must be an identifier.")
    if name in _registered:
        problem = "is taken. Choose another name; a registered one is never replaced."
        raise argument_error(call, "name", name, problem)
    wanted = "a function of the learning rate that returns a transformation"
    check_callable(call, "factory", factory, 1, wanted, more=True)
    _registered[name] = factory


def _is_identifier(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier()


def get_factory(call: str, text: str) -> Factory:
    """Return the factory that ``text`` names, with the keywords it carries bound.

    Refusals are worded for the argument ``optimizer`` of ``call``.
    """
    name, keywords = _parse(call, text)
    factory = _registered.get(name)
    if factory is None:
        close = nearest(name, _registered, 1)
        hint = f"Did you mean {quoted(close[0])}? " if close else ""
        problem = f"no optimizer of that name. {hint}list_optimizers() prints them all."
        raise argument_error(call, "optimizer", text, problem)
    if not keywords:
        return factory
    _check_keywords(call, text, factory, keywords)
    bound = functools.partial(factory, **keywords)
    error = _failure(bound)
    # Without keywords, one of the caller's own may want parameters of its own.
    if error is not None and _failure(factory) is None:
        reason = short_text(str(error)).rstrip(".")
        problem = f"its keywords were not taken: {reason}. Give them other values."
        raise argument_error(call, "optimizer", text, problem) from error
    return functools.update_wrapper(bound, factory, assigned=("__module__", "__name__"))


def _failure(factory: Factory) -> Exception | None:
    """Return what is wrong with an update of two small leaves, which is traced."""

    def update(params: PyTree) -> PyTree:
        # At a number: a factory that looks at its rate may not take a traced one.
        transform = optax.with_extra_args_support(factory(0.1))
        zero = jnp.zeros(())
        state = transform.init(params)
        updates, _ = transform.update(params, state, params, step=zero, value=zero)
        return updates

    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in PROBE}
    try:
        for name, made in jax.eval_shape(update, shapes).items():
            shape = shapes[name].shape
            if made.shape != shape:
                return ValueError(f"an update of {shape} becomes {made.shape}")
    except Exception as error:  # whatever it is, the first step would end in it
        return error
    return None


def title(text: str) -> str:
    """Return ``text`` with whose it is: ``Adam (TensorFlow)`` or ``optax.adam``."""
    name = text.split("(")[0].strip()
    if name in OPTIMIZER_CLS_NAMES:
        return f"{text} (TensorFlow)"
    if name in OPTAX_NAMES:
        return f"optax.{text}"
    return f"optax.contrib.{text}" if name in CONTRIB_NAMES else text


def _parse(call: str, text: str) -> tuple[str, dict[str, object]]:
    if "(" not in text:
        return text.strip(), {}
    try:
        if len(text) > LONGEST_TEXT:
            raise ValueError
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError
        given = node.keywords
        keywords = {k.arg: ast.literal_eval(k.value) for k in given if k.arg}
        if node.args or len(keywords) < len(given):
            raise ValueError
        return node.func.id, keywords
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise argument_error(
            call,
            "optimizer",
            text,
            "is not a name with literal keywords. Write it like "
            "'adamw(weight_decay=0.1)', or pass a function of the rate: "
            "lambda rate: optax.adamw(rate, mask=mask).",
        ) from error


def _check_keywords(
    call: str, text: str, factory: Factory, keywords: dict[str, object]
) -> None:
    _, *others = inspect.signature(factory).parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in others)
    known = [
        p.name for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    taken = listing(known, 20) or "none"
    for keyword, value in keywords.items():
        if keyword not in known and not open_ended:
            problem = f"it has no keyword {quoted(keyword)}. It takes {taken}."
            raise argument_error(call, "optimizer", text, problem)
        if isinstance(value, float) and not math.isfinite(value):
            problem = f"the number {value} of {keyword!r} is not finite."
            raise argument_error(call, "optimizer", text, problem)

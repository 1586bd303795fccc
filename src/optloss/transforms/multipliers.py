"""Multipliers by parameter name."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.knobs import check_knob, is_schedule, value_at
from optloss.messages import (
    argument_error,
    check_finite,
    check_int,
    check_number,
    is_number,
    quoted,
)
from optloss.names import check_patterns, first_match, is_pattern, leaf_names
from optloss.trees import increment, is_inexact, scale_leaves
from optloss.typing import Multipliers, PyTree, Scalar

MOST_LAYERS = 100_000
LARGEST_LOG = 88.7  # of a float32


class MultiplierState(NamedTuple):
    """How often was multiplied, where a multiplier is a function of the step."""

    step: jax.Array  # int32 [], updates so far


def multiply_gradients(
    multipliers: Multipliers,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply the gradients of some parameters, chosen by name.

    Before the optimizer it multiplies the gradient, as TensorFlow's
    ``gradient_multipliers`` did; after it, the update, and so that parameter's rate:

    .. math:: g_i \leftarrow m_i \, g_i

    Args:
        multipliers: Maps a parameter's name, a glob (``*`` stays inside one segment,
            ``**`` spans any number) or a compiled regular expression to a real number
            or 0-d array, which may be traced, or a function of the step. The first that
            matches a name wins; a parameter that none matches is left alone. The step
            is the extra argument ``step=`` of ``update``, or without one the
            transform's own count.

    Returns:
        A transform without state; if a multiplier is a function, with a
        :class:`~optloss.transforms.multipliers.MultiplierState`. Leaves keep shape
        ``[*shape]`` and dtype. Where the multiplier is exactly 0 the result is exactly
        0, whatever the gradient holds.

    Raises:
        ValueError: If a multiplier is no finite real number; at ``init``, if a pattern
            matches no parameter, or earlier ones leave it nothing.

    Note:
        Adam, Adagrad and RMSProp divide the gradient by its own running size, which
        nearly undoes a constant multiplier *before* them. To change a layer's rate put
        it after the optimizer: ``learning_rate_multipliers`` of :func:`optimize_loss`.

    Example:
        >>> import jax.numpy as jnp
        >>> rules = multiply_gradients({"head/*": 10.0, "**/bias": 0.0})
        >>> params = {"body": {"bias": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
        >>> scaled, _ = rules.update(params, rules.init(params))
        >>> print(scaled["body"]["bias"], scaled["head"]["kernel"])
        [0. 0.] [10. 10.]

    See also:
        :func:`layerwise_decay`, which makes such a mapping for fine-tuning.
    """
    check_multipliers("multiply_gradients", "multipliers", multipliers)
    patterns = tuple(multipliers)
    constants = [value for value in multipliers.values() if not callable(value)]
    counts = len(constants) < len(patterns)

    @functools.lru_cache(maxsize=4)
    def resolve(names: tuple[str, ...]) -> list[int | None]:
        return first_match(patterns, names)

    def init(params: optax.Params) -> MultiplierState | optax.EmptyState:
        names = leaf_names(params)
        if names:  # else it is a placeholder for parameters
            check_patterns("multiply_gradients", patterns, names)
        return start_multiplying(multipliers)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        step: jax.Array | None = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        factors = constants
        if counts:
            time = state.step if step is None else step
            factors = [
                value_at("multiply_gradients", f"multipliers[{key!r}]", value, time)
                for key, value in multipliers.items()
            ]
            state = MultiplierState(increment(state.step))
        leaves, structure = jax.tree.flatten(updates)
        rules = resolve(tuple(leaf_names(updates)))
        scaled = [
            leaf if rule is None else _multiply(leaf, factors[rule])
            for leaf, rule in zip(leaves, rules, strict=True)
        ]
        return jax.tree.unflatten(structure, scaled), state

    return optax.GradientTransformationExtraArgs(init, update)


def start_multiplying(
    multipliers: Multipliers,
) -> MultiplierState | optax.EmptyState:
    """Return the state before the first update, whatever the parameters."""
    if any(map(is_schedule, multipliers.values())):
        return MultiplierState(jnp.zeros((), jnp.int32))
    return optax.EmptyState()


def _multiply(leaf: PyTree, multiplier: Scalar) -> PyTree:
    if not is_inexact(leaf):
        return leaf
    if is_number(multiplier) and multiplier == 0:
        return jnp.zeros_like(leaf)
    scaled = scale_leaves(leaf, multiplier)
    if is_number(multiplier):
        return scaled
    return jnp.where(multiplier == 0, jnp.zeros_like(leaf), scaled)


def check_multipliers(call: str, argument: str, multipliers: object) -> None:
    """Refuse ``multipliers`` unless it maps names to finite real numbers."""
    if not isinstance(multipliers, Mapping):
        raise argument_error(
            call, argument, multipliers, "must map parameter names to numbers."
        )
    for pattern, value in multipliers.items():
        if not is_pattern(pattern):
            raise argument_error(
                call,
                argument,
                multipliers,
                f"the key {quoted(pattern)} is neither a name nor a compiled pattern.",
            )
        check_knob(call, f"{argument}[{quoted(pattern)}]", value, check_finite)


def layerwise_decay(rate: float, pattern: str, num_layers: int) -> dict[str, float]:
    r"""Return multipliers that shrink geometrically from the last layer to the first.

    The usual recipe of fine-tuning: what is nearer to the input is more general, and
    should move less. Layer :math:`i` of :math:`n` gets

    .. math:: m_i = r^{\,n - i}

    with :math:`r` = ``rate``; what the pattern does not match keeps its whole rate.

    Args:
        rate: Factor between one layer and the next, > 0.
        pattern: A name or glob in which ``{}`` stands for the number of the layer,
            counted from 0.
        num_layers: How many layers there are, >= 1.

    Returns:
        A dict from pattern to multiplier, for ``learning_rate_multipliers``.

    Raises:
        ValueError: If ``rate`` is no number > 0, ``pattern`` holds no ``{}``, or
            ``num_layers`` is no int from 1 to 100,000, or the largest power is no
            float32.

    Example:
        >>> layerwise_decay(0.5, "encoder/layers_{}/**", 2)
        {'encoder/layers_0/**': 0.25, 'encoder/layers_1/**': 0.5}

    See also:
        :func:`multiply_gradients`.

    References:
        Howard and Ruder, *Universal Language Model Fine-tuning for Text
        Classification*, 2018, arXiv:1801.06146, section 3.2 (there one rate a layer,
        eta / 2.6).
    """
    check_number(
        "layerwise_decay",
        "rate",
        rate,
        lambda number: 0 < number < float("inf"),
        "a real number > 0.",
    )
    if not _is_numbered(pattern):
        raise argument_error(
            "layerwise_decay",
            "pattern",
            pattern,
            "must be a str with {} where the layer's number goes.",
        )
    wanted = f"an int in [1, {MOST_LAYERS}]."
    layers = check_int(
        "layerwise_decay", "num_layers", num_layers, 1, wanted, MOST_LAYERS
    )
    if is_number(rate) and layers * math.log(rate) > LARGEST_LOG:
        problem = f"to the power of {layers} is no finite number. Is it below 1?"
        raise argument_error("layerwise_decay", "rate", rate, problem)
    return {pattern.replace("{}", str(i)): rate ** (layers - i) for i in range(layers)}


def _is_numbered(pattern: object) -> bool:
    return isinstance(pattern, str) and "{}" in pattern

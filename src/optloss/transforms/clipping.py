"""Clipping by the global norm, and by a function of the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.knobs import check_knob, value_at
from optloss.messages import (
    argument_error,
    check_axis_name,
    check_bound,
    check_callable,
    is_number,
    refusal,
    short_repr,
)
from optloss.norms import global_norm, shrink_factor
from optloss.summaries import clip_measurements
from optloss.trees import (
    increment,
    is_inexact,
    merge_inexact,
    norm_dtype,
    scale_leaves,
    with_variables,
)
from optloss.typing import AxisName, Pairs, PyTree, Scalar, Schedule


class ClipState(NamedTuple):
    """What the clip measured at its latest update, and how often it clipped."""

    step: jax.Array  # int32 [], updates so far
    clipped: jax.Array  # int32 [], those that were clipped
    norm: jax.Array  # float [], before the clip
    factor: jax.Array  # float [], what the gradient was multiplied by

    @property
    def uniform(self) -> bool:
        """Whether every leaf was multiplied by the factor."""
        return True

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return clip_measurements(self)


def clip_by_global_norm(
    max_norm: Scalar | Schedule, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink the whole gradient so that its norm is at most ``max_norm``.

    All leaves are scaled by one common factor: the direction of the step never changes,
    only its length,

    .. math:: g \leftarrow g \cdot \min(1, c / \lVert g \rVert_2)

    with :math:`c` = ``max_norm``. A gradient already inside the ball is returned bit
    for bit, and so is one whose norm is not finite: no factor could mend it, and
    :func:`skip_nonfinite` is there to leave it out.

    Args:
        max_norm: Radius of the ball, in the units of the incoming gradient. May be
            traced, or a function of the step (the extra argument ``step=``, or without
            one the updates so far). ``inf`` measures and clips nothing; 0 gives zeros.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over, so that all devices clip by the norm of the whole.

    Returns:
        A transform with a :class:`~optloss.transforms.clipping.ClipState`. Leaves keep
        shape ``[*shape]`` and dtype; the norm is a float32 scalar ``[]`` even for
        half-precision leaves, float64 if a leaf is float64. ``update`` takes the norm
        as the extra argument ``gradient_norm=`` where it is measured already.

    Raises:
        ValueError: If ``max_norm`` is a Python number that is negative or NaN; when
            traced, if as a function it returns no real scalar.

    Note:
        Before Adam it bounds what the moments see; after Adam it bounds the step.

    Example:
        >>> import jax.numpy as jnp
        >>> clip = clip_by_global_norm(1.0)
        >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
        >>> clipped, _ = clip.update(grads, clip.init(grads))
        >>> print(clipped["w"], clipped["b"])
        [0.6 0. ] 0.8

    See also:
        :func:`adaptive_clipping`, whose bound follows the norms of the run;
        :func:`global_norm`.

    References:
        Pascanu, Mikolov and Bengio, *On the difficulty of training recurrent neural
        networks*, 2013, arXiv:1211.5063, Algorithm 1.
    """
    check_knob("clip_by_global_norm", "max_norm", max_norm, check_bound)
    check_axis_name("clip_by_global_norm", axis_name)

    def init(params: optax.Params) -> ClipState:
        dtype = norm_dtype(params)
        return ClipState(
            step=jnp.zeros((), jnp.int32),
            clipped=jnp.zeros((), jnp.int32),
            norm=jnp.zeros((), dtype),
            factor=jnp.ones((), dtype),
        )

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        gradient_norm: jax.Array | None = None,
        step: jax.Array | None = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        if gradient_norm is None:
            gradient_norm = global_norm(updates, axis_name=axis_name)
        norm = gradient_norm.astype(state.norm.dtype)
        time = state.step if step is None else step
        radius = value_at("clip_by_global_norm", "max_norm", max_norm, time)
        # An infinite bound is the largest float, which no finite norm exceeds either.
        largest = float(jnp.finfo(norm.dtype).max)
        within = min(radius, largest) if is_number(radius) else radius
        bound = jnp.clip(jnp.asarray(within, norm.dtype), 0, largest)
        factor = shrink_factor(norm, bound)
        new_state = ClipState(
            step=increment(state.step),
            clipped=state.clipped + (factor < 1),
            norm=norm,
            factor=factor.astype(norm.dtype),
        )
        return scale_leaves(updates, factor), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_function(
    fn: Callable[[Pairs], Iterable[tuple[jax.Array, jax.Array]]],
) -> optax.GradientTransformationExtraArgs:
    """Clip by a function of the list of all ``(gradient, variable)`` pairs.

    This is what ``clip_gradients=`` of the TensorFlow function took, so that such a
    function ports unchanged. The pairs are in the order of the tree's leaves; leaves
    that are not floating or complex, and frozen ones, are not among them.

    Args:
        fn: Takes a list of ``(gradient [*shape], variable [*shape])`` and returns
            these pairs, in any iterable, with the gradients changed. A plain optax
            function such as ``optax.clip(1.0)`` is no such function: it is a transform
            already.

    Returns:
        A transform without state. It needs ``params``; gradients keep their dtype.

    Raises:
        ValueError: If ``fn`` is not callable; when traced, if ``params`` is missing or
            ``fn`` returns another number of pairs or gradients of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> halve = clip_by_function(lambda pairs: [(g / 2, v) for g, v in pairs])
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> grads = {"w": jnp.array([4.0, 6.0])}
        >>> clipped, _ = halve.update(grads, halve.init(params), params)
        >>> print(clipped["w"])
        [2. 3.]

    See also:
        :func:`clip_by_global_norm`, :func:`adaptive_clipping`.
    """
    check_callable("clip_by_function", "fn", fn, 1, "a function of a list of pairs")

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        del extra
        if params is None:
            raise refusal(
                "clip_by_function",
                "the function is given (gradient, variable) pairs, so "
                "update(updates, state, params) needs params.",
            )
        pairs = with_variables(updates, params)
        gradients = _gradients(fn, fn(list(pairs)), len(pairs))
        clipped = [
            _like(fn, gradient, before)
            for gradient, (before, _) in zip(gradients, pairs, strict=True)
        ]
        return merge_inexact(clipped, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _gradients(fn: object, result: object, length: int) -> list[PyTree]:
    pairs: list[PyTree] = list(result) if isinstance(result, Iterable) else [None]
    if any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in pairs):
        problem = "must return a list of (gradient, variable)."
    elif len(pairs) != length:
        problem = (
            f"was given {length} pairs and returned {len(pairs)}. Return one for each."
        )
    else:
        return [gradient for gradient, _ in pairs]
    raise argument_error("clip_by_function", "fn", fn, problem)


def _like(fn: object, gradient: object, before: jax.Array) -> jax.Array:
    if getattr(gradient, "shape", None) != before.shape or not is_inexact(gradient):
        raise argument_error(
            "clip_by_function",
            "fn",
            fn,
            f"returned {short_repr(gradient)} for a gradient {short_repr(before)}. "
            "Keep the shape.",
        )
    return jnp.asarray(gradient, before.dtype)

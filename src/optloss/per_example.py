"""The gradient with each example's share of it bounded: what privacy asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optloss.batches import Batch, InAxes, Leaf, check_divides, check_in_axes
from optloss.gradients import BySlices, mean_of_slices
from optloss.mesh import manual_axes
from optloss.messages import check_int, check_number, short_repr
from optloss.trees import norm_dtype, real_dtype, to_float32
from optloss.typing import Differentiate, Differentiated, PyTree, ValueAndGrad


def clip_per_example(
    max_norm: float | jax.Array, *, in_axes: InAxes = 0, batch: int | None = None
) -> ValueAndGrad:
    r"""Clip the gradient of each example by its norm, then take the mean.

    No example can then move the mean by more than ``max_norm / n``: the gradient of
    differentially private training,

    .. math:: g = \frac{1}{n} \sum_{i=1}^{n}
        g_i \cdot \min(1, C / \lVert g_i \rVert_2), \qquad
        g_i = \nabla L(\theta, \{x_i\})

    with :math:`C` = ``max_norm`` and the norm over all trained parameters. Each example
    is a batch of one: arrays ``[n, *shape]`` reach the loss as ``[1, *shape]``.

    Args:
        max_norm: Largest norm of one example's gradient. May be traced. ``inf`` clips
            nothing.
        in_axes: The axis of the examples, as for :func:`accumulate_gradients`.
        batch: How many examples to differentiate at a time; it must divide their
            number. Memory holds as many gradients. ``None``: all at once.

    Returns:
        A function for ``optimize_loss(value_and_grad=...)``. The loss is the mean over
        the examples; ``aux`` is stacked, ``[n, ...]``, in the order of the examples. A
        scalar typed key is split into one for each example. Gradients are clipped and
        summed in float32 (float64 for such parameters) and have the dtypes of the
        parameters.

    Raises:
        ValueError: If ``max_norm`` is a Python number that is not above 0, ``batch`` is
            not an int >= 1 or ``in_axes`` is no axis or tuple; when traced, if
            ``in_axes`` does not fit the arguments, arrays differ in the number of
            examples, ``batch`` does not divide it, the new ``model_state`` depends on
            the example (as with BatchNorm, which mixes examples), or under
            ``shard_map`` or ``pmap``, where a loss that is a mean over devices mixes
            them, too.

    Note:
        An example whose gradient is not finite makes the mean NaN;
        ``skip_nonfinite=True`` skips such a step. One whose norm is above 1e19, the
        largest that float32 can square, counts as zero. Neither the random choice of
        the batch nor the accounting of the privacy spent is done here.

    Example:
        >>> import jax.numpy as jnp
        >>> def objective(w, x, model_state=None):
        ...     return jnp.sum(w * x), (model_state, None)
        >>> value_and_grad = clip_per_example(1.0)(objective, has_aux=True)
        >>> _, gradient = value_and_grad(
        ...     jnp.zeros(2), jnp.array([[8.0, 0.0], [0.0, 0.5]])
        ... )
        >>> print(gradient)
        [0.5  0.25]

    See also:
        :func:`clip_by_global_norm`, which clips the mean.

    References:
        Abadi et al., *Deep Learning with Differential Privacy*, 2016, arXiv:1607.00133,
        Algorithm 1. There noise of standard deviation :math:`\sigma C` is added to the
        sum; here ``gradient_noise_scale`` :math:`= \sigma C / n` adds it to the mean.
    """
    call = "clip_per_example"
    wanted = "a real number > 0 or a 0-d array."
    check_number(call, "max_norm", max_norm, lambda number: number > 0, wanted)
    if batch is not None:
        check_int(call, "batch", batch, 1, "an int >= 1, or None for all at once.")
    check_in_axes(call, in_axes)
    text = f"{call}({short_repr(max_norm)})"
    gradient = functools.partial(_clipped, max_norm, batch)
    return ClippedPerExample(text, call, in_axes, gradient)


class ClippedPerExample(BySlices):
    """What :func:`clip_per_example` returns."""


def _clipped(
    max_norm: float | jax.Array,
    batch: int | None,
    differentiate: Differentiate,
    params: PyTree,
    model_state: PyTree,
    data: Batch,
) -> Differentiated:
    size = _check_examples(data)
    at_once = batch or size
    check_divides("clip_per_example", "batch", at_once, data)
    steps = size // at_once
    stacks = [leaf.stack(steps, keys=size) for leaf in data.leaves]

    def one_example(values: list[Any]) -> tuple[tuple[Any, PyTree, PyTree], PyTree]:
        pairs = zip(stacks, values, strict=True)
        examples = [leaf.batch_of_one(value) for leaf, value in pairs]
        args, kwargs = jax.tree.unflatten(data.structure, examples)
        (loss, (state, aux)), gradients = differentiate(
            params, *args, model_state=model_state, **kwargs
        )
        return (loss, aux, gradients), state

    def one_slice(i: jax.Array, _: PyTree) -> Differentiated:
        (losses, aux, gradients), state = _map_examples(one_example, stacks, i)
        mean = _mean_of_clipped(gradients, max_norm)
        return (jnp.mean(losses), (state, aux)), mean

    (loss, (state, aux)), mean = mean_of_slices(one_slice, steps, params, model_state)
    return (loss, (state, jax.tree.map(_in_order, aux))), mean


def _check_examples(data: Batch) -> int:
    """Return the number of examples; refuse none, and a share of them."""
    if manual_axes():
        raise ValueError(
            "clip_per_example: cannot be used under shard_map or pmap (axis_name), "
            "where the loss is a mean over devices and its gradient mixes their "
            "examples. Use jit on a mesh."
        )
    if not data.size:
        raise ValueError(
            "clip_per_example: no argument holds examples. Pass the batch to the step, "
            "and do not except it with in_axes."
        )
    return data.size


def _map_examples(
    one_example: Callable[[list[Any]], tuple[Any, PyTree]],
    stacks: list[Leaf],
    i: jax.Array,
) -> tuple[Any, PyTree]:
    """Return what the examples of slice ``i`` give, and the one model_state of all."""
    values, axes = [leaf.pick(i) for leaf in stacks], [leaf.axis for leaf in stacks]
    try:
        return jax.vmap(one_example, in_axes=(axes,), out_axes=(0, None))(values)
    except ValueError as error:
        # If the loss itself raised it, it does so again.
        jax.eval_shape(lambda: jax.vmap(one_example, in_axes=(axes,))(values))
        raise ValueError(
            "clip_per_example: the new model_state depends on the example, as the "
            "statistics of a BatchNorm do. Use a layer without such, for example a "
            "GroupNorm, or return the model_state as it was."
        ) from error


def _mean_of_clipped(gradients: PyTree, max_norm: float | jax.Array) -> PyTree:
    """Return the mean of the rows of ``gradients``, none longer than ``max_norm``."""
    # A vmap of global_norm takes all of its sums, and jax 0.10 refuses it on a mesh.
    rows = to_float32(gradients)
    squares = sum(map(_squares, jax.tree.leaves(rows)), jnp.zeros((), norm_dtype(rows)))
    # Squares are compared, as the derivative of a norm at zero is NaN.
    outside = squares > jnp.square(jnp.asarray(max_norm, squares.dtype))
    factors = jnp.where(outside, max_norm / jnp.sqrt(jnp.where(outside, squares, 1)), 1)

    def mean(leaf: jax.Array) -> jax.Array:
        factor = factors.astype(real_dtype(leaf.dtype))
        return jnp.mean(jnp.expand_dims(factor, range(1, leaf.ndim)) * leaf, axis=0)

    return jax.tree.map(mean, rows)


def _squares(rows: jax.Array) -> jax.Array:
    return jnp.sum((rows * rows.conj()).real, axis=tuple(range(1, rows.ndim)))


def _in_order(slices: jax.Array) -> jax.Array:
    """Return ``[steps, batch, *shape]`` as ``[examples, *shape]``."""
    return slices.swapaxes(0, 1).reshape(-1, *slices.shape[2:])

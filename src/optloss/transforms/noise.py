"""Gaussian noise on the gradient."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.fast.draws import add_normals, split_key
from optloss.knobs import check_knob, value_at
from optloss.mesh import axes_of, shard_index, varying_axes
from optloss.messages import (
    check_at_least_zero,
    check_axis_name,
    check_choice,
    check_key,
    is_number,
)
from optloss.names import check_names, inexact_names
from optloss.trees import increment, inexact_leaves, merge_inexact
from optloss.typing import AxisName, PyTree, Scalar, Schedule


class NoiseState(NamedTuple):
    """Where the next draw starts, and how strong the latest was."""

    step: jax.Array  # int32 [], draws so far
    key: jax.Array  # uint32 [*key], the words of the key
    noise_std: jax.Array  # float32 [], std of the latest draw

    def measurements(self) -> dict[str, jax.Array]:
        """Return the scalars to publish, by their summary tags."""
        return {"noise_std": self.noise_std}


def add_gradient_noise(
    scale: Scalar | Schedule,
    *,
    annealing: float | jax.Array = 0.0,
    distribution: str = "normal",
    key: int | jax.Array = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Add independent noise to every element of the gradient.

    Noise helps to leave saddle points and poor minima; annealed, it fades as training
    settles. At step :math:`t`

    .. math::

        g \leftarrow g + \frac{s}{(1 + t)^{\gamma / 2}} \, z, \qquad z \sim N(0, 1)

    with :math:`s` = ``scale`` and :math:`\gamma` = ``annealing``. Each draw is a
    function of the key, the number of draws so far, the leaf's name and its shape
    alone: adding a leaf leaves the others' noise as it was, a resumed run draws what
    the undisturbed one would have, and the noise is the same on one device and on many.

    Args:
        scale: Standard deviation of the noise at step 0, >= 0, in the units of the
            gradient. May be traced, or a function of the step.
        annealing: Exponent of the variance's decay, >= 0; 0 is constant noise, the
            paper has 0.55. The step is the extra argument ``step=`` of ``update``, or
            without one the transform's own count.
        distribution: ``"normal"``, or ``"truncated_normal"``: redrawn beyond two
            standard deviations, which TensorFlow's function drew (its std is 0.8796 of
            ``scale``).
        key: A seed, or a JAX key of any implementation.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over: shards of one leaf then draw independently, replicas the same.

    Returns:
        A transform with a :class:`~optloss.transforms.noise.NoiseState`. Leaves keep
        shape ``[*shape]`` and dtype; the noise is drawn and added in float32 for half
        precision.

    Raises:
        ValueError: If ``scale`` or ``annealing`` is a Python number that is negative or
            not finite, ``distribution`` is neither of the two, or ``key`` is no key;
            when traced, if a function as ``scale`` returns no real scalar.

    Note:
        Put it before a clip, so that the clip bounds what the optimizer sees.

    Example:
        >>> import jax.numpy as jnp
        >>> noise = add_gradient_noise(0.1, key=42)
        >>> grads = {"w": jnp.zeros(1000)}
        >>> noisy, state = noise.update(grads, noise.init(grads))
        >>> print(f"{noisy['w'].std():.2f}", state.step)
        0.10 1

    See also:
        ``optax.add_noise``, whose second argument is this ``annealing`` and whose first
        is the *variance*.

    References:
        Neelakantan et al., *Adding Gradient Noise Improves Learning for Very Deep
        Networks*, 2015, arXiv:1511.06807, section 3 (there :math:`\eta = s^2`).
    """
    check_knob("add_gradient_noise", "scale", scale, check_at_least_zero)
    check_at_least_zero("add_gradient_noise", annealing=annealing)
    known = ("normal", "truncated_normal")
    check_choice("add_gradient_noise", "distribution", distribution, known)
    check_key("add_gradient_noise", "key", key)
    check_axis_name("add_gradient_noise", axis_name)
    axes = axes_of(axis_name)
    silent = is_number(scale) and scale == 0

    def init(params: optax.Params) -> NoiseState:
        check_names("add_gradient_noise", params)
        words, _ = split_key(key)
        return NoiseState(
            step=jnp.zeros((), jnp.int32),
            key=jnp.array(words, copy=True),
            noise_std=jnp.zeros((), jnp.float32),
        )

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        step: jax.Array | None = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        time = state.step if step is None else step
        wanted = value_at("add_gradient_noise", "scale", scale, time)
        std = wanted / (1.0 + time) ** (0.5 * annealing)
        new_state = NoiseState(
            step=increment(state.step),
            key=state.key,
            noise_std=jnp.asarray(std, jnp.float32),
        )
        if silent:
            return updates, new_state
        leaves = inexact_leaves(updates)
        index = functools.cache(shard_index)  # leaves that share one share the array
        noisy = add_normals(
            leaves,
            std,
            state.key,
            split_key(key)[1],
            state.step,
            inexact_names(updates),
            distribution=distribution,
            shard_ids=[index(varying_axes(leaf, axes)) for leaf in leaves],
        )
        return merge_inexact(noisy, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)

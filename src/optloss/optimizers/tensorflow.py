r"""TensorFlow's six optimizers, with the arithmetic TensorFlow 1.15 had.

Each factory takes the learning rate, Python's or traced, and the hyper-parameters by
the names they had in TensorFlow, and returns an optax transformation. Most differ from
optax's function of a like name: in where an epsilon stands, in how a slot starts.

Notation: a parameter :math:`w`, its gradient :math:`g`, the rate :math:`\eta`. Products
are elementwise; of a complex gradient, :math:`g^2` is :math:`\lvert g \rvert^2`.

No state depends on the rate, so that a factory may be called again for every rate. All
is computed in float32 for half-precision leaves and in the leaf's own precision
otherwise, to which the rate and the hyper-parameters are rounded. Gradients that are no
floating or complex arrays pass through, ``None`` among them, and touch no slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.messages import (
    check_at_least_zero,
    check_below_one,
    check_bool,
    check_finite,
    check_number,
    check_positive,
    is_array,
)
from optloss.optimizers.elementwise import elementwise, scalar, slots, square
from optloss.typing import PyTree, Scalar

Rows = tuple[jax.Array, ...]


class AdagradState(NamedTuple):
    """What :func:`adagrad` keeps."""

    accumulator: PyTree  # real [*shape] per leaf, the sum of squared gradients


class AdamState(NamedTuple):
    """What :func:`adam` keeps."""

    step: jax.Array  # int32 [], updates so far
    m: PyTree  # [*shape] per leaf, mean of the gradients
    v: PyTree  # real [*shape] per leaf, mean of their squares


class FtrlState(NamedTuple):
    """What :func:`ftrl` keeps."""

    accumulator: PyTree  # real [*shape] per leaf, the sum of squared gradients
    linear: PyTree  # [*shape] per leaf, what the parameter is solved from


class MomentumState(NamedTuple):
    """What :func:`momentum` keeps."""

    accumulator: PyTree  # [*shape] per leaf, the decaying sum of gradients


class RMSPropState(NamedTuple):
    """What :func:`rmsprop` keeps."""

    mean_square: PyTree  # real [*shape] per leaf
    mean_gradient: PyTree  # [*shape] per leaf, or None if not centered
    momentum: PyTree  # [*shape] per leaf, or None if the momentum is the number 0


def adagrad(
    learning_rate: Scalar, *, initial_accumulator_value: Scalar = 0.1
) -> optax.GradientTransformationExtraArgs:
    r"""Divide the gradient by the root of the sum of all its squares.

    .. math:: a \leftarrow a + g^2, \qquad w \leftarrow w - \eta \, g / \sqrt{a}

    Args:
        learning_rate: :math:`\eta`; may be traced.
        initial_accumulator_value: What :math:`a` starts with.

    Returns:
        A transform with an :class:`AdagradState`.

    Raises:
        ValueError: If a Python number is out of range.

    Note:
        ``optax.adagrad`` adds an epsilon of 1e-7 to :math:`a`; here there is none.

    Example:
        >>> tx = adagrad(0.1, initial_accumulator_value=9.0)
        >>> params = jnp.array([1.0])
        >>> updates, state = tx.update(jnp.array([4.0]), tx.init(params))
        >>> print(optax.apply_updates(params, updates), state.accumulator)
        [0.92] [25.]

    References:
        Duchi, Hazan and Singer, *Adaptive Subgradient Methods for Online Learning and
        Stochastic Optimization*, JMLR 12, 2011, figure 1.
    """
    call = "adagrad"
    check_at_least_zero(call, learning_rate=learning_rate)
    check_positive(call, initial_accumulator_value=initial_accumulator_value)

    def start(params: optax.Params) -> AdagradState:
        return AdagradState(slots(params, initial_accumulator_value, real=True))

    def rule(g: jax.Array, a: jax.Array) -> Rows:
        a = a + square(g)
        return -scalar(g, learning_rate) * g / jnp.sqrt(a), a

    return elementwise(start, rule)


def adam(
    learning_rate: Scalar,
    *,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    epsilon: Scalar = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide a mean of the gradients by the root of a mean of their squares.

    .. math:: m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        w &\leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
        \frac{m}{\sqrt{v} + \epsilon}

    with :math:`t` the updates made, this one included, whatever the global step.

    Args:
        learning_rate: :math:`\eta`; may be traced.
        beta1: :math:`\beta_1`, the decay of the first mean.
        beta2: :math:`\beta_2`, the decay of the second.
        epsilon: :math:`\epsilon`, below which gradients no longer count.

    Returns:
        A transform with an :class:`AdamState`.

    Raises:
        ValueError: If a Python number is out of range.

    Note:
        The :math:`\epsilon` is the paper's :math:`\hat\epsilon`. That of ``optax.adam``
        is added after the correction of :math:`v`, and weighs 32 times less at the
        first update: with gradients of 1e-6 its first step is a third longer.

    Example:
        >>> tx = adam(0.1)
        >>> params = jnp.array([1.0])
        >>> updates, state = tx.update(jnp.array([5.0]), tx.init(params))
        >>> print(optax.apply_updates(params, updates), state.step)
        [0.9] 1

    References:
        Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2014,
        arXiv:1412.6980, section 2, the order of computation at its end.
    """
    call = "adam"
    check_at_least_zero(call, learning_rate=learning_rate, epsilon=epsilon)
    check_below_one(call, beta1=beta1, beta2=beta2)

    def start(params: optax.Params) -> AdamState:
        step = jnp.zeros((), jnp.int32)
        return AdamState(step, slots(params, 0), slots(params, 0, real=True))

    def rule(g: jax.Array, m: jax.Array, v: jax.Array, step: jax.Array) -> Rows:
        rate, b1, b2 = (scalar(g, number) for number in (learning_rate, beta1, beta2))
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * square(g)
        rate *= jnp.sqrt(_one_minus_power(b2, step)) / _one_minus_power(b1, step)
        return -rate * m / (jnp.sqrt(v) + scalar(g, epsilon)), m, v

    return elementwise(start, rule)


def ftrl(
    learning_rate: Scalar,
    *,
    learning_rate_power: Scalar = -0.5,
    initial_accumulator_value: Scalar = 0.1,
    l1_regularization_strength: Scalar = 0.0,
    l2_regularization_strength: Scalar = 0.0,
    l2_shrinkage_regularization_strength: Scalar = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Follow the regularized leader: solve for the parameter at every update.

    .. math:: n' &= n + g^2, \qquad
        z \leftarrow z + g + 2 \lambda_s w - \frac{n'^{-p} - n^{-p}}{\eta} w \\
        w &\leftarrow \begin{cases}
            0 & \lvert z \rvert \le \lambda_1 \\
            (\operatorname{sign}(z) \lambda_1 - z) / (n'^{-p} / \eta + 2 \lambda_2)
        \end{cases}, \qquad n \leftarrow n'

    Args:
        learning_rate: :math:`\eta`; may be traced.
        learning_rate_power: :math:`p`, not above 0; 0 for a rate that stays.
        initial_accumulator_value: What :math:`n` starts with.
        l1_regularization_strength: :math:`\lambda_1`, which makes parameters exactly 0.
        l2_regularization_strength: :math:`\lambda_2`.
        l2_shrinkage_regularization_strength: :math:`\lambda_s`, a decay of the weights
            that :math:`n` does not count.

    Returns:
        A transform with an :class:`FtrlState`. Its update needs the parameters, and is
        what is to be added to them.

    Raises:
        ValueError: If a Python number is out of range; from the update, if it is not
            given the parameters.

    Note:
        It forgets where a parameter started: a first gradient of zero makes it 0. A
        rate that decays pulls parameters towards 0, too. A rate of exactly 0 changes
        neither parameters nor state, where TensorFlow has NaN.

    Example:
        >>> tx = ftrl(0.5, initial_accumulator_value=9, l1_regularization_strength=2)
        >>> params = jnp.array([0.0, 0.0])
        >>> grads = jnp.array([4.0, 1.0])
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> print(optax.apply_updates(params, updates), state.linear)
        [-0.2  0. ] [4. 1.]

    References:
        McMahan et al., *Ad Click Prediction: a View from the Trenches*, KDD 2013,
        algorithm 1, with :math:`\beta = 0`; the shrinkage is TensorFlow's.
    """
    call = "ftrl"
    check_at_least_zero(
        call,
        learning_rate=learning_rate,
        initial_accumulator_value=initial_accumulator_value,
        l1_regularization_strength=l1_regularization_strength,
        l2_regularization_strength=l2_regularization_strength,
        l2_shrinkage_regularization_strength=l2_shrinkage_regularization_strength,
    )
    check_number(
        call,
        "learning_rate_power",
        learning_rate_power,
        lambda n: -math.inf < n <= 0,
        "a finite real number <= 0 or a 0-d array.",
    )

    def start(params: optax.Params) -> FtrlState:
        n = slots(params, initial_accumulator_value, real=True)
        return FtrlState(n, slots(params, 0))

    def rule(g: jax.Array, n: jax.Array, z: jax.Array, w: jax.Array) -> Rows:
        w, rate = w.astype(g.dtype), scalar(g, learning_rate)
        l1 = scalar(g, l1_regularization_strength)
        l2 = scalar(g, l2_regularization_strength)
        shrinkage = scalar(g, l2_shrinkage_regularization_strength)
        still = rate == 0
        divisor = jnp.where(still, 1, rate)
        new_n = n + square(g)
        root, new_root = (_root(number, learning_rate_power) for number in (n, new_n))
        new_z = z + g + 2 * shrinkage * w - (new_root - root) / divisor * w
        solved = jnp.abs(new_z) > l1
        slope = new_root / divisor + 2 * l2
        new_w = jnp.where(solved, (jnp.sign(new_z) * l1 - new_z) / slope, 0)
        update = jnp.where(still, 0, new_w - w)
        return update, jnp.where(still, n, new_n), jnp.where(still, z, new_z)

    return elementwise(start, rule, solver=call)


def momentum(
    learning_rate: Scalar, momentum: Scalar = 0.9, *, use_nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Step along a decaying sum of the gradients.

    .. math:: a \leftarrow \mu a + g, \qquad w \leftarrow w - \eta \, a

    or, with ``use_nesterov``, :math:`w \leftarrow w - \eta \, (g + \mu a)`.

    Args:
        learning_rate: :math:`\eta`; may be traced. It is no part of :math:`a`.
        momentum: :math:`\mu`.
        use_nesterov: Whether to look one step ahead.

    Returns:
        A transform with a :class:`MomentumState`.

    Raises:
        ValueError: If a Python number is out of range.

    Example:
        >>> tx = momentum(0.1)
        >>> params = jnp.array([1.0])
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.array([5.0]), state)
        >>> print(updates, state.accumulator)
        [-0.95] [9.5]

    See also:
        ``optax.sgd(learning_rate, momentum, nesterov)``, which does the same, but sums
        bfloat16 gradients in bfloat16.

    References:
        Sutskever, Martens, Dahl and Hinton, *On the importance of initialization and
        momentum in deep learning*, ICML 2013.
    """
    call = "momentum"
    check_at_least_zero(call, learning_rate=learning_rate)
    check_finite(call, momentum=momentum)
    check_bool(call, "use_nesterov", use_nesterov)

    def start(params: optax.Params) -> MomentumState:
        return MomentumState(slots(params, 0))

    def rule(g: jax.Array, a: jax.Array) -> Rows:
        mu = scalar(g, momentum)
        a = mu * a + g
        return -scalar(g, learning_rate) * (g + mu * a if use_nesterov else a), a

    return elementwise(start, rule)


def rmsprop(
    learning_rate: Scalar,
    *,
    decay: Scalar = 0.9,
    momentum: Scalar = 0.0,
    epsilon: Scalar = 1e-10,
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide the gradient by the root of a mean of its squares.

    .. math:: s \leftarrow \rho s + (1 - \rho) g^2, \qquad
        d \leftarrow \mu d + \frac{\eta \, g}{\sqrt{s + \epsilon}}, \qquad
        w \leftarrow w - d

    with :math:`s = 1` at the start. With ``centered`` the root is that of
    :math:`s - \bar{g}^2 + \epsilon`, where :math:`\bar{g}` is a like mean of :math:`g`.

    Args:
        learning_rate: :math:`\eta`; may be traced. It is part of :math:`d`: a change of
            rate is felt gradually.
        decay: :math:`\rho`, of both means.
        momentum: :math:`\mu`.
        epsilon: :math:`\epsilon`, inside the root.
        centered: Whether to divide by an estimate of the standard deviation instead.

    Returns:
        A transform with an :class:`RMSPropState`.

    Raises:
        ValueError: If a Python number is out of range.

    Note:
        ``optax.rmsprop`` starts with :math:`s = 0`, so that its first step is three
        times the rate even where the gradient is 0.01; with ``eps=1e-10,
        initial_scale=1.0`` it is this one. Centered, the variance of a gradient that
        does not change may be rounded to below 0, which gives NaN in TensorFlow, and
        counts as 0 here.

    Example:
        >>> tx = rmsprop(0.1)
        >>> params = jnp.array([1.0])
        >>> updates, state = tx.update(jnp.array([1.0]), tx.init(params))
        >>> print(updates, state.mean_square)
        [-0.1] [1.]

    References:
        Tieleman and Hinton, *RMSProp*, COURSERA: Neural Networks for Machine Learning,
        lecture 6.5, 2012. Centered: Graves, 2013, arXiv:1308.0850, equations 38 to 45.
    """
    call = "rmsprop"
    check_at_least_zero(call, learning_rate=learning_rate, epsilon=epsilon)
    wanted = "a real number in [0, 1] or a 0-d array."
    check_number(call, "decay", decay, lambda n: 0 <= n <= 1, wanted)
    check_finite(call, momentum=momentum)
    check_bool(call, "centered", centered)
    carried = is_array(momentum) or momentum != 0

    def start(params: optax.Params) -> RMSPropState:
        mean_gradient = slots(params, 0) if centered else None
        d = slots(params, 0) if carried else None
        return RMSPropState(slots(params, 1, real=True), mean_gradient, d)

    def rule(g: jax.Array, s: jax.Array, mean: jax.Array, d: jax.Array) -> Rows:
        old = scalar(g, decay)
        s = old * s + (1 - old) * square(g)
        variance = s
        if centered:
            mean = old * mean + (1 - old) * g
            variance = jnp.maximum(s - square(mean), 0)
        step = scalar(g, learning_rate) * g / jnp.sqrt(variance + scalar(g, epsilon))
        if carried:
            d = step = scalar(g, momentum) * d + step
        return -step, s, mean, d

    return elementwise(start, rule)


def sgd(learning_rate: Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Step down the gradient.

    .. math:: w \leftarrow w - \eta \, g

    Args:
        learning_rate: :math:`\eta`; may be traced.

    Returns:
        A transform without a state.

    Raises:
        ValueError: If the rate is a Python number out of range.

    Example:
        >>> tx = sgd(0.1)
        >>> params = jnp.array([1.0])
        >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(params))
        >>> print(updates)
        [-0.5]
    """
    check_at_least_zero("sgd", learning_rate=learning_rate)

    def rule(g: jax.Array) -> Rows:
        return (-scalar(g, learning_rate) * g,)

    return elementwise(lambda params: optax.EmptyState(), rule)


OPTIMIZER_CLS_NAMES: Mapping[
    str, Callable[..., optax.GradientTransformationExtraArgs]
] = MappingProxyType(
    {
        "Adagrad": adagrad,
        "Adam": adam,
        "Ftrl": ftrl,
        "Momentum": momentum,
        "RMSProp": rmsprop,
        "SGD": sgd,
    }
)
"""The factories by the names they have in ``optimize_loss``."""


def _one_minus_power(beta: jax.Array, step: jax.Array) -> jax.Array:
    """Return 1 - beta**step to the last digit, which subtraction would not give."""
    return -jnp.expm1(step.astype(beta.dtype) * jnp.log1p(beta - 1))


def _root(accumulator: jax.Array, power: Scalar) -> jax.Array:
    if not is_array(power) and power == -0.5:
        return jnp.sqrt(accumulator)
    return accumulator ** -scalar(accumulator, power)

r"""TensorFlow's nine learning-rate decay functions.

Pure functions of a rate :math:`\eta` and a step :math:`s`, with the names, order and
defaults of TensorFlow 1.15, so that a ``functools.partial`` or a lambda ports unchanged
as ``learning_rate_decay_fn``. They compute in float32, or in float64 where the rate is
a float64 array, and return a strong-typed scalar; for an array of steps, an array.

With a whole number of ``decay_steps`` every stair, cycle and end falls on its exact
step, up to :math:`2^{31}`, because steps are divided as integers. As floats they would
not: XLA replaces division by a constant with multiplication by its rounded reciprocal,
which puts the first stair of ``decay_steps=41`` at step 42, and float32 knows no odd
number above :math:`2^{24}`. Between those steps, float32's rounding is all there is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optloss.fast.draws import split_key
from optloss.mesh import is_deleted
from optloss.messages import (
    argument_error,
    check_at_least_zero,
    check_bool,
    check_finite,
    check_key,
    check_number,
    check_positive,
    is_array,
    is_number,
    is_real,
    short_repr,
)
from optloss.typing import Scalar

MOST_TABULATED_CYCLES = 4096
LARGEST_STEP = np.iinfo(np.int32).max
LARGEST_FLOAT = float(np.finfo(np.float32).max)


def exponential_decay(
    learning_rate: Scalar,
    step: ArrayLike,
    decay_steps: Scalar,
    decay_rate: Scalar,
    staircase: bool = False,
) -> jax.Array:
    r"""Multiply the rate by ``decay_rate`` every ``decay_steps`` steps.

    .. math:: \eta \, r^{s / N}

    Args:
        learning_rate: :math:`\eta`, the rate at step 0: a number or a 0-d array.
        step: :math:`s`, an integer, Python's or traced.
        decay_steps: :math:`N`, in how many steps the rate falls once.
        decay_rate: :math:`r`, the factor. A negative one needs ``staircase=True``.
        staircase: Round :math:`s / N` down, for a rate that falls in jumps.

    Returns:
        The rate ``[]`` at ``step``.

    Raises:
        ValueError: If a Python number is out of range.

    Example:
        >>> print(exponential_decay(0.5, 2000, decay_steps=1000, decay_rate=0.5))
        0.125
    """
    call = "exponential_decay"
    rate, periods = _start(call, learning_rate, step, decay_steps, staircase)
    if staircase:
        check_finite(call, decay_rate=decay_rate)
    else:
        cure = "For one that alternates the sign, pass staircase=True."
        check_at_least_zero(call, cure, decay_rate=decay_rate)
    return rate * _as(rate, decay_rate) ** periods


def natural_exp_decay(
    learning_rate: Scalar,
    step: ArrayLike,
    decay_steps: Scalar,
    decay_rate: Scalar,
    staircase: bool = False,
) -> jax.Array:
    r"""Let the rate fall exponentially, with ``decay_rate`` as the exponent.

    .. math:: \eta \, e^{-r s / N}

    Args:
        learning_rate: :math:`\eta`, the rate at step 0: a number or a 0-d array.
        step: :math:`s`, an integer, Python's or traced.
        decay_steps: :math:`N`, the unit of time.
        decay_rate: :math:`r`, the exponent per unit.
        staircase: Round :math:`s / N` down, for a rate that falls in jumps.

    Returns:
        The rate ``[]`` at ``step``.

    Raises:
        ValueError: If a Python number is out of range.

    Example:
        >>> print(natural_exp_decay(1.0, 10, decay_steps=5, decay_rate=0.5))
        0.36787945
    """
    call = "natural_exp_decay"
    check_finite(call, decay_rate=decay_rate)
    rate, periods = _start(call, learning_rate, step, decay_steps, staircase)
    return rate * jnp.exp(-_as(rate, decay_rate) * periods)


def inverse_time_decay(
    learning_rate: Scalar,
    step: ArrayLike,
    decay_steps: Scalar,
    decay_rate: Scalar,
    staircase: bool = False,
) -> jax.Array:
    r"""Let the rate fall as one over the time.

    .. math:: \frac{\eta}{1 + r s / N}

    Args:
        learning_rate: :math:`\eta`, the rate at step 0: a number or a 0-d array.
        step: :math:`s`, an integer, Python's or traced.
        decay_steps: :math:`N`, the unit of time.
        decay_rate: :math:`r`, the growth of the divisor per unit.
        staircase: Round :math:`s / N` down, for a rate that falls in jumps.

    Returns:
        The rate ``[]`` at ``step``.

    Raises:
        ValueError: If a Python number is out of range.

    Example:
        >>> print(inverse_time_decay(1.0, 30, decay_steps=10, decay_rate=1.0))
        0.25
    """
    call = "inverse_time_decay"
    check_finite(call, decay_rate=decay_rate)
    rate, periods = _start(call, learning_rate, step, decay_steps, staircase)
    return rate / (1 + _as(rate, decay_rate) * periods)


def polynomial_decay(
    learning_rate: Scalar,
    step: ArrayLike,
    decay_steps: Scalar,
    end_learning_rate: Scalar = 1e-4,
    power: Scalar = 1.0,
    cycle: bool = False,
) -> jax.Array:
    r"""Let the rate fall to ``end_learning_rate`` along a polynomial.

    .. math:: (\eta - \eta_N) (1 - s / N)^p + \eta_N, \qquad s \leftarrow \min(s, N)

    Args:
        learning_rate: :math:`\eta`, the rate at step 0: a number or a 0-d array.
        step: :math:`s`, an integer, Python's or traced.
        decay_steps: :math:`N`, the steps to the end.
        end_learning_rate: :math:`\eta_N`, the rate from step :math:`N` on.
        power: :math:`p`; 1 is a straight line.
        cycle: Never end: where :math:`s` is beyond :math:`N`, take the next multiple of
            it. At :math:`N` the rate is at its end, one step later half way up again.

    Returns:
        The rate ``[]`` at ``step``.

    Raises:
        ValueError: If a Python number is out of range.

    Example:
        >>> print(polynomial_decay(0.5, 75, decay_steps=100, end_learning_rate=0.1))
        0.2
    """
    call = "polynomial_decay"
    check_bool(call, "cycle", cycle)
    check_finite(call, end_learning_rate=end_learning_rate)
    check_at_least_zero(call, "A negative one has no end.", power=power)
    rate, periods = _start(call, learning_rate, step, decay_steps)
    ends = jnp.maximum(jnp.ceil(periods), 1) if cycle else 1
    left = 1 - jnp.minimum(periods / ends, 1)
    end = _as(rate, end_learning_rate)
    return (rate - end) * left ** _as(rate, power) + end


def cosine_decay(
    learning_rate: Scalar, step: ArrayLike, decay_steps: Scalar, alpha: Scalar = 0.0
) -> jax.Array:
    r"""Let the rate fall along half a cosine, to ``alpha`` times its start.

    .. math:: \eta \left(\tfrac12 (1 - \alpha) (1 + \cos(\pi s / N)) + \alpha\right),
        \qquad s \leftarrow \min(s, N)

    Args:
        learning_rate: :math:`\eta`, the rate at step 0: a number or a 0-d array.
        step: :math:`s`, an integer, Python's or traced.
        decay_steps: :math:`N`, the steps to the end.
        alpha: :math:`\alpha`, the share of the rate that is left at the end.

    Returns:
        The rate ``[]`` at ``step``.

    Raises:
        ValueError: If a Python number is out of range.

    Example:
        >>> print(cosine_decay(0.5, 200, decay_steps=100, alpha=0.1))
        0.05

    References:
        Loshchilov and Hutter, *SGDR: Stochastic Gradient Descent with Warm Restarts*,
        2016, arXiv:1608.03983, equation 5.
    """
    call = "cosine_decay"
    check_finite(call, alpha=alpha)
    rate, periods = _start(call, learning_rate, step, decay_steps)
    low = _as(rate, alpha)
    return rate * ((1 - low) * _half_cosine(jnp.minimum(periods, 1)) + low)


def cosine_decay_restarts(
    learning_rate: Scalar,
    step: ArrayLike,
    first_decay_steps: Scalar,
    t_mul: Scalar = 2.0,
    m_mul: Scalar = 1.0,
    alpha: Scalar = 0.0,
) -> jax.Array:
    r"""Let the rate fall along half a cosine, again and again.

    .. math:: \eta \left(\tfrac12 (1 - \alpha) m^i (1 + \cos(\pi c)) + \alpha\right)

    with :math:`i` the cycle, which starts at :math:`F (t^i - 1) / (t - 1)` and lasts
    :math:`F t^i` steps, and :math:`c` the share of it that has passed.

    Args:
        learning_rate: :math:`\eta`, the rate at step 0: a number or a 0-d array.
        step: :math:`s`, an integer, Python's or traced.
        first_decay_steps: :math:`F`, the length of the first cycle.
        t_mul: :math:`t`, the length of a cycle over that of the one before. Below 1 the
            cycles come to an end at :math:`F / (1 - t)`, and the rate rests there.
        m_mul: :math:`m`, the height of a cycle over that of the one before.
        alpha: :math:`\alpha`, the share of the rate that is left at the end of a cycle.

    Returns:
        The rate ``[]`` at ``step``.

    Raises:
        ValueError: If a Python number is out of range.

    Note:
        The original takes :math:`i` from float32 logarithms. At some restarts, as at
        step 220 for ``first_decay_steps=100, t_mul=1.2``, it comes out one too low, and
        the rate is 0 for a step. Here the starts of the cycles are tabulated in double
        precision. A ``first_decay_steps`` or ``t_mul`` that is traced, or a ``t_mul``
        below 1 or less than 0.5 % above it, leaves them to the rate's dtype: in float32
        a restart may then be early by about a millionth of its step.

    Example:
        >>> print(cosine_decay_restarts(0.5, 220, first_decay_steps=100, t_mul=1.2))
        0.5

    References:
        Loshchilov and Hutter, as for :func:`cosine_decay`; ``m_mul`` and ``alpha`` are
        TensorFlow's.
    """
    call = "cosine_decay_restarts"
    check_positive(call, "Count in steps.", first_decay_steps=first_decay_steps)
    check_positive(call, "With 1 all cycles have one length.", t_mul=t_mul)
    check_finite(call, m_mul=m_mul, alpha=alpha)
    rate, step = _as_rate(call, learning_rate), _as_step(call, step)
    cycle, share = _cycle(step, first_decay_steps, t_mul, rate.dtype)
    low, height = _as(rate, alpha), _as(rate, m_mul) ** cycle
    return rate * ((1 - low) * height * _half_cosine(share) + low)


def linear_cosine_decay(
    learning_rate: Scalar,
    step: ArrayLike,
    decay_steps: Scalar,
    num_periods: Scalar = 0.5,
    alpha: Scalar = 0.0,
    beta: Scalar = 0.001,
) -> jax.Array:
    r"""Let the rate fall along a straight line times a cosine.

    .. math:: \eta \left(\tfrac12 (\alpha + 1 - s / N) (1 + \cos(2 \pi k s / N)) +
        \beta\right), \qquad s \leftarrow \min(s, N)

    It starts at :math:`\eta (1 + \alpha + \beta)`, not at :math:`\eta`.

    Args:
        learning_rate: :math:`\eta`, a number or a 0-d array.
        step: :math:`s`, an integer, Python's or traced.
        decay_steps: :math:`N`, the steps to the end.
        num_periods: :math:`k`, the periods of the cosine until then.
        alpha: :math:`\alpha`, what is added to the line.
        beta: :math:`\beta`, the share of the rate that is left where the cosine is -1.

    Returns:
        The rate ``[]`` at ``step``.

    Raises:
        ValueError: If a Python number is out of range.

    Example:
        >>> print(linear_cosine_decay(0.5, 0, decay_steps=100, beta=0.25))
        0.625

    References:
        Bello, Zoph, Vasudevan and Le, *Neural Optimizer Search with Reinforcement
        Learning*, 2017, arXiv:1709.07417, section 4; the arguments are TensorFlow's.
    """
    call = "linear_cosine_decay"
    check_finite(call, num_periods=num_periods, alpha=alpha, beta=beta)
    rate, periods = _start(call, learning_rate, step, decay_steps)
    share = jnp.minimum(periods, 1)
    cosine = jnp.cos(2 * jnp.pi * _as(rate, num_periods) * share)
    line = _as(rate, alpha) + (1 - share)
    return rate * (line * (1 + cosine) / 2 + _as(rate, beta))


def noisy_linear_cosine_decay(
    learning_rate: Scalar,
    step: ArrayLike,
    decay_steps: Scalar,
    initial_variance: Scalar = 1.0,
    variance_decay: Scalar = 0.55,
    num_periods: Scalar = 0.5,
    alpha: Scalar = 0.0,
    beta: Scalar = 0.001,
    *,
    key: int | jax.Array = 0,
) -> jax.Array:
    r"""Let the rate fall along a noisy line times a cosine.

    As :func:`linear_cosine_decay` with :math:`1 - s / N + e` for the line, where

    .. math:: e \sim \mathcal{N}\left(0, v / (1 + s)^d\right)

    The noise depends on ``key`` and ``step`` alone, so that a resumed run goes on as it
    would have. It does not end at step :math:`N`, but keeps the variance it has there.

    Args:
        learning_rate: :math:`\eta`, a number or a 0-d array.
        step: :math:`s`, an integer, Python's or traced.
        decay_steps: :math:`N`, the steps to the end.
        initial_variance: :math:`v`, the variance at step 0.
        variance_decay: :math:`d`, how fast the variance falls.
        num_periods: :math:`k`, the periods of the cosine until step :math:`N`.
        alpha: :math:`\alpha`, what is added to the line.
        beta: :math:`\beta`, the share of the rate that is left where the cosine is -1.
        key: An int or a JAX key: where the noise starts.

    Returns:
        The rate ``[]`` at ``step``. With the default variance it is now and then
        negative, as in the original.

    Raises:
        ValueError: If a Python number is out of range.

    Example:
        >>> rate, again, other = (
        ...     noisy_linear_cosine_decay(0.5, 3, decay_steps=100, key=key)
        ...     for key in (0, 0, 1)
        ... )
        >>> print(rate == again, rate == other)
        True False

    References:
        Bello, Zoph, Vasudevan and Le, as for :func:`linear_cosine_decay`.
    """
    call = "noisy_linear_cosine_decay"
    cure = "With 0 there is no noise."
    check_at_least_zero(call, cure, initial_variance=initial_variance)
    check_finite(call, variance_decay=variance_decay)
    check_finite(call, num_periods=num_periods, alpha=alpha, beta=beta)
    check_key(call, "key", key)
    rate, periods = _start(call, learning_rate, step, decay_steps)
    share = jnp.minimum(periods, 1)
    age = (1 + share * _as(rate, decay_steps)) ** _as(rate, variance_decay)
    std = jnp.sqrt(_as(rate, initial_variance) / age)
    noise = std * _normal(key, _as_step(call, step), rate.dtype)
    cosine = jnp.cos(2 * jnp.pi * _as(rate, num_periods) * share)
    line = _as(rate, alpha) + (1 - share + noise)
    return rate * (line * (1 + cosine) / 2 + _as(rate, beta))


def piecewise_constant(
    step: ArrayLike, boundaries: Sequence[Scalar], values: Sequence[Scalar]
) -> jax.Array:
    r"""Return the value of the interval that ``step`` lies in.

    .. math:: v_i, \qquad b_{i - 1} < s \le b_i

    At a boundary the *old* value still holds, unlike in ``optax``'s
    ``piecewise_constant_schedule``. There is no rate among the arguments: write
    ``lambda learning_rate, step: piecewise_constant(step, boundaries, values)``.

    Args:
        step: :math:`s`, an integer, Python's or traced.
        boundaries: :math:`b`, the last step of each interval but the last: integers
            that increase; floats only where ``step`` is one, an epoch for instance.
        values: :math:`v`, the rates, one more than there are boundaries.

    Returns:
        The rate ``[]`` at ``step``, float32, or float64 if a value is a float64 array.

    Raises:
        ValueError: If the boundaries do not increase or are no integers, or if there
            are not as many values as intervals.

    Example:
        >>> for step in (100, 101):
        ...     print(piecewise_constant(step, boundaries=[100], values=[0.5, 0.25]))
        0.5
        0.25
    """
    call = "piecewise_constant"
    step = _as_step(call, step)
    limits = _as_list(call, "boundaries", boundaries)
    rates = _as_list(call, "values", values)
    _check_boundaries(call, boundaries, limits, step.dtype)
    if len(rates) != len(limits) + 1:
        problem = (
            f"{len(rates)} for {len(limits)} boundaries. Give one more than those."
        )
        raise argument_error(call, "values", values, problem)
    dtype = jnp.result_type(jnp.float32, *(v.dtype for v in rates if is_array(v)))
    if _is_integer(step):  # no step gets beyond what its dtype holds
        most = int(np.iinfo(step.dtype).max)
        limits = [min(int(b), most) if is_number(b) else b for b in limits]
    bounds = jnp.asarray(limits, step.dtype)
    interval = jnp.searchsorted(bounds, step, method="compare_all")
    return jnp.stack([jnp.asarray(rate, dtype) for rate in rates])[interval]


def _start(
    call: str,
    learning_rate: Scalar,
    step: ArrayLike,
    decay_steps: Scalar,
    staircase: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the rate as an array, and how many ``decay_steps`` have passed."""
    check_positive(call, "Count in steps.", decay_steps=decay_steps)
    check_bool(call, "staircase", staircase)
    rate = _as_rate(call, learning_rate)
    whole, share = _divide(_as_step(call, step), decay_steps, rate.dtype)
    return rate, whole if staircase else whole + share


def _divide(
    step: jax.Array, period: Scalar, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Return how many whole periods have passed, and the share of the one under way."""
    if _is_integer(step) and _is_whole(period):
        unit = jnp.asarray(period, step.dtype)
        whole, rest = jnp.divmod(step, unit)
        return whole.astype(dtype), rest.astype(dtype) / unit.astype(dtype)
    s, length = step.astype(dtype), jnp.asarray(period, dtype)
    whole = jnp.floor(s / length)
    # The quotient is rounded, so that its floor may be one off.
    whole += ((whole + 1) * length <= s).astype(dtype)
    whole -= (whole * length > s).astype(dtype)
    return whole, (s - whole * length) / length


def _is_integer(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.integer))


def _is_whole(period: Scalar) -> bool:
    if is_array(period):
        return _is_integer(period)
    return bool(float(period).is_integer() and period <= LARGEST_STEP)


def _half_cosine(share: jax.Array) -> jax.Array:
    """Return (1 + cos(pi share)) / 2, which is exactly 0 at the end."""
    return jnp.square(jnp.sin(jnp.pi / 2 * (1 - share)))


def _cycle(
    step: jax.Array, first: Scalar, growth: Scalar, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Return the cycle ``step`` is in, from 0, and the share of it that has passed."""
    if is_number(growth) and growth == 1:
        return _divide(step, first, dtype)
    if is_number(growth) and growth > 1 and is_number(first) and _is_integer(step):
        last = min(int(np.iinfo(step.dtype).max), 2**53)
        cycles = np.log1p(last / first * (growth - 1)) / math.log(growth)
        if cycles < MOST_TABULATED_CYCLES:
            return _tabulated_cycle(step, first, growth, int(cycles) + 1, dtype)
    return _computed_cycle(step.astype(dtype), first, growth)


def _tabulated_cycle(
    step: jax.Array, first: float, growth: float, cycles: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    powers = np.float64(growth) ** np.arange(cycles)
    starts = first * (powers - 1) / (growth - 1)
    # For first=100, growth=1.1 the third cycle would start at 210.00000000000006.
    nearest = np.rint(starts)
    starts = np.where(np.abs(starts - nearest) < 1e-9 * (nearest + 1), nearest, starts)
    first_steps = np.ceil(starts)
    table = jnp.asarray(first_steps.astype(step.dtype))
    cycle = jnp.searchsorted(table[1:], step, side="right", method="compare_all")
    passed = (step - table[cycle]).astype(dtype)
    passed += jnp.asarray(first_steps - starts, dtype)[cycle]
    share = passed / jnp.asarray(first * powers, dtype)[cycle]
    return cycle.astype(dtype), jnp.minimum(share, 1)


def _computed_cycle(
    step: jax.Array, first: Scalar, growth: Scalar
) -> tuple[jax.Array, jax.Array]:
    c, excess = step / _as(step, first), _as(step, growth - 1)
    level, over = excess == 0, c * excess <= -1
    base = jnp.log1p(excess)

    def start(cycle: jax.Array) -> jax.Array:
        return jnp.where(
            level, cycle, jnp.expm1(cycle * base) / jnp.where(level, 1, excess)
        )

    logs = jnp.log1p(jnp.where(over, 0, c * excess)) / jnp.where(level, 1, base)
    cycle = jnp.floor(jnp.where(level, c, logs))
    # The logarithms are rounded, and so is the start: better early than at the old end.
    reached = c * (1 + 8 * jnp.finfo(step.dtype).eps)
    cycle += (start(cycle + 1) <= reached).astype(step.dtype)
    share = jnp.clip((c - start(cycle)) * jnp.exp(-cycle * base), 0, 1)
    return cycle, share


def _normal(key: int | jax.Array, step: jax.Array, dtype: DTypeLike) -> jax.Array:
    words, impl = split_key(key)
    key = jax.random.wrap_key_data(words, impl=impl)

    def draw(step: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, step), (), dtype)

    return jnp.vectorize(draw)(step.astype(jnp.uint32))


def _as(like: jax.Array, value: Scalar) -> jax.Array:
    return jnp.asarray(value, like.dtype)


def _as_rate(call: str, learning_rate: Scalar) -> jax.Array:
    check_finite(call, learning_rate=learning_rate)
    kind = jnp.asarray(learning_rate).dtype if is_array(learning_rate) else jnp.float32
    return jnp.asarray(learning_rate, jnp.promote_types(kind, jnp.float32))


def _as_step(call: str, step: ArrayLike) -> jax.Array:
    if is_number(step):
        good = abs(step) <= LARGEST_FLOAT
    else:
        good = is_array(step) and is_real(step.dtype) and not is_deleted(step)
    if isinstance(step, np.ndarray) and good:
        good = bool(np.all(np.isfinite(step)))
    if not good:
        problem = "must be an integer or an array of them. Pass the global step."
        raise argument_error(call, "step", step, problem)
    if is_number(step) and step > LARGEST_STEP:
        step = float(step)
    step = jnp.asarray(step)
    least = jnp.int32 if _is_integer(step) else jnp.float32
    return jnp.asarray(step, jnp.promote_types(step.dtype, least))


def _as_list(
    call: str, argument: str, value: Sequence[Scalar] | jax.Array
) -> list[Scalar]:
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not (listed or (is_array(value) and value.ndim == 1)):
        raise argument_error(call, argument, value, "must be a list.")
    numbers = list(value)
    for number in numbers:
        wanted = "finite real numbers or 0-d arrays."
        check_number(call, argument, number, np.isfinite, wanted)
    return numbers


def _check_boundaries(
    call: str, boundaries: object, limits: list[Scalar], dtype: DTypeLike
) -> None:
    """Refuse boundaries that are no integers, as the step is, or do not increase."""
    for limit in limits:
        of_integers = jnp.issubdtype(jnp.result_type(limit), jnp.integer)
        if jnp.issubdtype(dtype, jnp.integer) and not of_integers:
            problem = (
                f"{short_repr(limit)} is no integer, as the step is. Count in steps."
            )
            raise argument_error(call, "boundaries", boundaries, problem)
    numbers = [limit for limit in limits if is_number(limit)]
    if any(late <= early for early, late in itertools.pairwise(numbers)):
        problem = "must increase. Sort them, and leave out what is there twice."
        raise argument_error(call, "boundaries", boundaries, problem)

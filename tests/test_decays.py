"""The nine decay functions against float64 restatements, and at their exact steps."""

import functools
import inspect
import itertools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_reference import DECAYS

from optloss import decays

RATE = 0.3
SETTINGS = {
    "exponential_decay": [
        {"decay_steps": 7, "decay_rate": 0.5},
        {"decay_steps": 250.5, "decay_rate": 1.5},
        {"decay_steps": 41, "decay_rate": 0.1, "staircase": True},
        {"decay_steps": 41, "decay_rate": -0.5, "staircase": True},
    ],
    "natural_exp_decay": [
        {"decay_steps": 6, "decay_rate": 0.4},
        {"decay_steps": 600, "decay_rate": -0.4},
        {"decay_steps": 47, "decay_rate": 0.4, "staircase": True},
    ],
    "inverse_time_decay": [
        {"decay_steps": 4, "decay_rate": 0.5},
        {"decay_steps": 55, "decay_rate": 0.5, "staircase": True},
        {"decay_steps": 0.25, "decay_rate": 2, "staircase": True},
    ],
    "polynomial_decay": [
        {"decay_steps": 20},
        {"decay_steps": 20, "end_learning_rate": 0.01, "power": 2.0},
        {"decay_steps": 49, "end_learning_rate": 0.5, "power": 0.5},
        {"decay_steps": 9, "end_learning_rate": 0.01, "power": 0.7, "cycle": True},
        {"decay_steps": 4.5, "cycle": True},
        {"decay_steps": 20, "power": 0},
    ],
    "cosine_decay": [
        {"decay_steps": 22},
        {"decay_steps": 61, "alpha": 0.2},
        {"decay_steps": 10.5, "alpha": -0.2},
    ],
    "cosine_decay_restarts": [
        {"first_decay_steps": 6},
        {"first_decay_steps": 7, "t_mul": 1.5, "m_mul": 0.8, "alpha": 0.05},
        {"first_decay_steps": 8, "t_mul": 1.0, "m_mul": 0.5},
        {"first_decay_steps": 7.5, "t_mul": 3, "m_mul": -0.5},
        {"first_decay_steps": 600, "t_mul": 0.5, "m_mul": 1.5},
    ],
    "linear_cosine_decay": [
        {"decay_steps": 25},
        {"decay_steps": 47, "num_periods": 2.0, "alpha": 0.1, "beta": 0.01},
    ],
    "noisy_linear_cosine_decay": [
        {"decay_steps": 47, "initial_variance": 0.0, "num_periods": 1.5, "beta": 0.1},
    ],
    "piecewise_constant": [
        {"boundaries": [5, 12, 20], "values": [0.8, 0.4, 0.2, 0.05]},
        {"boundaries": [], "values": [0.8]},
    ],
}
CASES = [(name, settings) for name, group in SETTINGS.items() for settings in group]
STEPS = [*range(130), 255, 1000]


def label(value):
    if isinstance(value, dict):
        return ",".join(f"{key}={x}" for key, x in value.items())
    return None


every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=label)
one_case_each = pytest.mark.parametrize(
    ("name", "settings"),
    [(name, group[0]) for name, group in SETTINGS.items()],
    ids=label,
)


def bind(name, settings):
    """Return the decay as a function of the rate and the step."""
    fn = functools.partial(getattr(decays, name), **settings)
    return (lambda rate, step: fn(step)) if name == "piecewise_constant" else fn


def restated(name, settings, steps=STEPS, rate=RATE):
    return np.array([DECAYS[name](rate, step, **settings) for step in steps])


@every_case
def test_a_decay_equals_its_restatement(name, settings):
    decay = jax.jit(bind(name, settings))
    found = [decay(RATE, step) for step in STEPS]
    np.testing.assert_allclose(found, restated(name, settings), rtol=2e-6, atol=3e-7)


@one_case_each
def test_a_decay_needs_no_jit(name, settings):
    found = [bind(name, settings)(RATE, step) for step in (0, 5, 30)]
    expected = restated(name, settings, (0, 5, 30))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=3e-7)


@every_case
def test_a_float64_rate_is_decayed_in_float64(name, settings):
    with jax.enable_x64(True):
        if name == "piecewise_constant":
            values = [np.array(value) for value in settings["values"]]
            settings = settings | {"values": values}
        decay = jax.jit(bind(name, settings))
        found = [decay(np.array(RATE), step) for step in STEPS]
        assert {rate.dtype for rate in found} == {jnp.dtype("float64")}
        np.testing.assert_allclose(found, restated(name, settings), 1e-13, 1e-14)


@pytest.mark.wide
@one_case_each
@pytest.mark.parametrize("x64", [False, True])
def test_any_other_rate_is_decayed_in_float32(name, settings, x64):
    with jax.enable_x64(x64):
        decay = bind(name, settings)
        rates = [1, np.float64(0.25), jnp.bfloat16(0.25), jnp.int32(1)]
        steps = [3, np.int64(3), jnp.uint8(3), jnp.int32(3)]
        for rate, step in zip(rates, steps, strict=True):
            found = decay(rate, step)
            assert (found.dtype, found.shape) == (jnp.float32, ())
            assert not found.weak_type
            assert found == decay(jnp.float32(rate), 3)


@pytest.mark.wide
@one_case_each
def test_many_steps_at_once_and_vmap_give_what_single_steps_give(name, settings):
    decay, steps = bind(name, settings), jnp.arange(40)
    single = jax.jit(decay)
    expected = [single(RATE, step) for step in range(40)]
    for many, rate in ((decay, RATE), (jax.vmap(decay), jnp.full(40, RATE))):
        found = jax.jit(many)(rate, steps)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@one_case_each
def test_the_derivative_by_the_rate_is_a_difference_quotient(name, settings):
    decay = bind(name, settings)
    slope = jax.jit(jax.grad(decay))(jnp.float32(RATE), 5)
    quotient = (decay(RATE + 0.125, 5) - decay(RATE - 0.125, 5)) / 0.25
    np.testing.assert_allclose(slope, quotient, rtol=1e-5, atol=1e-6)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("exponential_decay", {"decay_steps": 7.0, "decay_rate": 0.5}),
        ("natural_exp_decay", {"decay_steps": 7.0, "decay_rate": 0.5}),
        ("inverse_time_decay", {"decay_steps": 7.0, "decay_rate": 0.5}),
        (
            "polynomial_decay",
            {"decay_steps": 7.0, "end_learning_rate": 0.1, "power": 2.0},
        ),
        ("cosine_decay", {"decay_steps": 7.0, "alpha": 0.1}),
        (
            "cosine_decay_restarts",
            {"first_decay_steps": 7.0, "t_mul": 1.5, "m_mul": 0.5, "alpha": 0.1},
        ),
        ("linear_cosine_decay", {"decay_steps": 7.0, "num_periods": 0.75, "beta": 0.1}),
    ],
    ids=label,
)
@pytest.mark.parametrize("step", [2, 10])
def test_the_other_arguments_may_be_traced_and_differentiated(name, settings, step):
    decay = getattr(decays, name)
    traced = jax.jit(lambda settings: decay(RATE, step, **settings))
    np.testing.assert_allclose(traced(settings), decay(RATE, step, **settings), 1e-5)
    slopes = jax.grad(traced)(jax.tree.map(jnp.float32, settings))
    for key, value in settings.items():
        ends = [settings | {key: value + change} for change in (1e-6, -1e-6)]
        above, below = (restated(name, end, [step])[0] for end in ends)
        quotient = (above - below) / 2e-6
        np.testing.assert_allclose(slopes[key], quotient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("decay_steps", [7, 41, 47, 55, 61, 1000])
def test_a_stair_is_on_its_step(decay_steps):
    def stairs(step):
        return decays.inverse_time_decay(1.0, step, decay_steps, 1.0, staircase=True)

    first = np.arange(1, 200) * decay_steps
    found = jax.jit(jax.vmap(stairs))(jnp.stack([first - 1, first]))
    expected = np.stack([np.arange(1, 200), np.arange(2, 201)])
    np.testing.assert_array_equal(np.round(1 / np.float64(found)), expected)


@pytest.mark.parametrize("decay_steps", [2**24 + 1, 2**31 - 2, 2.0**25 + 2])
def test_a_stair_is_on_its_step_where_float32_has_no_such_number(decay_steps):
    @jax.jit
    def stairs(step):
        return decays.exponential_decay(1.0, step, decay_steps, 0.5, staircase=True)

    first = int(decay_steps)
    assert [float(stairs(first + i)) for i in (-1, 0, 1)] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("decay_steps", "step", "stairs"),
    [(20.5, 40, 1), (20.5, 41, 2), (1.5, 8388517, 5592344), (2**33, 2**31 - 1, 0)],
)
def test_a_stair_of_a_fraction_of_steps_is_exact_too(decay_steps, step, stairs):
    @jax.jit
    def decay(step):
        return decays.inverse_time_decay(1.0, step, decay_steps, 1.0, staircase=True)

    assert np.round(1 / np.float64(decay(step))) == 1 + stairs


@pytest.mark.parametrize("decay_steps", [jnp.int32(41), jnp.float32(41)])
def test_a_traced_number_of_steps_keeps_stairs_on_their_steps(decay_steps):
    @jax.jit
    def stairs(step, decay_steps):
        return decays.exponential_decay(1.0, step, decay_steps, 0.5, staircase=True)

    found = [float(stairs(step, decay_steps)) for step in (40, 41, 81, 82)]
    assert found == [1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("decay_steps", [7, 41, 49, 4.9, 2**24 + 1])
def test_a_decay_is_at_its_end_from_the_last_step_on(decay_steps):
    last = int(np.ceil(decay_steps))
    ends = {
        "polynomial": lambda s: decays.polynomial_decay(0.5, s, decay_steps, 0.1, 0.25),
        "cosine": lambda s: decays.cosine_decay(0.5, s, decay_steps),
        "linear": lambda s: decays.linear_cosine_decay(0.5, s, decay_steps, beta=0.0),
    }
    for step in (last, last + 1, 2**31 - 1):
        found = {name: float(jax.jit(end)(step)) for name, end in ends.items()}
        assert found == {
            "polynomial": float(jnp.float32(0.1)),
            "cosine": 0,
            "linear": 0,
        }
    assert all(end(last - 1) != end(last) for end in ends.values()) or last > 2**24


@pytest.mark.parametrize("decay_steps", [7, 41, 1000])
def test_a_polynomial_cycle_ends_on_its_step_and_starts_half_way_up(decay_steps):
    decay = jax.jit(
        functools.partial(
            decays.polynomial_decay,
            1.0,
            decay_steps=decay_steps,
            end_learning_rate=0.0,
            cycle=True,
        )
    )
    assert decay(0) == 1
    for cycle in (1, 2, 20):
        assert decay(cycle * decay_steps) == 0
        rise = (decay_steps - 1) / ((cycle + 1) * decay_steps)
        np.testing.assert_allclose(decay(cycle * decay_steps + 1), rise, rtol=1e-5)


def exact_restarts(step, first, growth, m_mul, alpha):
    """Follow the cycles one by one, in fractions."""
    start, length, height = Fraction(0), Fraction(str(first)), 1.0
    while step >= start + length:
        start, length = start + length, length * Fraction(str(growth))
        height *= m_mul
    share = float((step - start) / length)
    return (1 - alpha) * height * 0.5 * (1 + np.cos(np.pi * share)) + alpha


@pytest.mark.wide
@pytest.mark.parametrize("growth", [1.1, 1.2, 1.7, 3])
@pytest.mark.parametrize("first", [1, 6.5, 100])
def test_restarts_are_those_of_exact_arithmetic(first, growth):
    steps = np.unique(np.geomspace(1, 1e6, 400).astype(int))
    decay = functools.partial(decays.cosine_decay_restarts, 1.0)
    found = jax.jit(lambda steps: decay(steps, first, growth, 0.75, 0.125))(steps)
    expected = [exact_restarts(step, first, growth, 0.75, 0.125) for step in steps]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("traced", [False, True], ids=["tabulated", "traced"])
@pytest.mark.parametrize("growth", [1, 1.1, 1.2, 1.5, 2])
@pytest.mark.parametrize("first", [5, 100, 1000])
def test_a_restart_is_on_its_step(first, growth, traced):
    def decay(step, first, growth):
        return decays.cosine_decay_restarts(1.0, step, first, growth, m_mul=0.5)

    decay = jax.jit(decay, static_argnums=() if traced else (1, 2))
    start, length = Fraction(0), Fraction(first)
    for cycle in range(5):
        if start.denominator == 1:
            np.testing.assert_allclose(
                decay(int(start), first, growth), 0.5**cycle, 1e-6
            )
            if cycle:
                assert decay(int(start) - 1, first, growth) < 0.3 * 0.5 ** (cycle - 1)
        start, length = start + length, length * Fraction(str(growth))


def test_a_traced_restart_is_never_late():
    decay = functools.partial(decays.cosine_decay_restarts, 1.0)
    decay = jax.jit(jax.vmap(decay, (0, None, None)))
    for first, growth in itertools.product((50, 100, 243, 10_000), (1.1, 1.2, 1.5, 2)):
        exact = Fraction(str(growth))
        starts = [first * sum(exact**i for i in range(cycle)) for cycle in range(7)]
        steps = jnp.array([int(s) if s.denominator == 1 else 0 for s in starts])
        np.testing.assert_allclose(decay(steps, first, growth), 1, 1e-5)


def test_the_originals_float32_accident_is_not_repeated():
    decay = jax.jit(
        lambda step: decays.cosine_decay_restarts(0.5, step, 100, t_mul=1.2)
    )
    assert decay(220) == 0.5
    assert 0 < decay(219) < 1e-3
    assert 0.499 < decay(221) < 0.5


def test_a_late_restart_is_on_its_step():
    decay = jax.jit(lambda step: decays.cosine_decay_restarts(1.0, step, 1000))
    start = 1000 * (2**20 - 1)
    assert [float(decay(start + i)) for i in (-1, 0)] == [0.0, 1.0]
    last = exact_restarts(2**31 - 1, 1000, 2, 1, 0)
    np.testing.assert_allclose(decay(2**31 - 1), last, rtol=1e-6)


@pytest.mark.parametrize("step", [99, 130, 999, 5000])
def test_a_growth_next_to_one_is_nearly_one(step):
    near = decays.cosine_decay_restarts(1.0, step, 100, t_mul=1 + 1e-9)
    np.testing.assert_allclose(near, exact_restarts(step, 100, 1, 1, 0), atol=1e-5)


def test_shrinking_cycles_end_at_the_lowest_rate():
    decay = functools.partial(
        decays.cosine_decay_restarts, 0.5, first_decay_steps=8, t_mul=0.5, alpha=0.25
    )
    assert [float(decay(step)) for step in (0, 8, 12, 14, 15)] == [0.5] * 5
    assert [float(decay(step)) for step in (16, 17, 2**31 - 1)] == [0.125] * 3


def test_a_boundary_belongs_to_the_old_value_however_large_it_is():
    boundaries = [10, 2**24 + 1, 2**31 - 2]
    piecewise = functools.partial(
        decays.piecewise_constant, boundaries=boundaries, values=[1, 2, 3, 4]
    )
    for i, boundary in enumerate(boundaries):
        for decay in (piecewise, jax.jit(piecewise)):
            assert decay(boundary) == i + 1
            assert decay(boundary + 1) == i + 2


def test_a_boundary_out_of_reach_is_never_reached():
    decay = functools.partial(decays.piecewise_constant, values=[1.0, 2.0])
    assert decay(2**31 - 1, boundaries=[2**40]) == 1
    assert decay(jnp.uint8(255), boundaries=[300]) == 1
    assert decay(-5, boundaries=[-6]) == 2


def test_pieces_may_be_cut_at_fractions_of_an_epoch_and_by_arrays():
    decay = decays.piecewise_constant
    assert [decay(epoch, [1.5], [1, 2]) for epoch in (1.5, jnp.float32(1.75))] == [1, 2]
    boundaries, values = jnp.array([3, 6]), jnp.array([1.0, 2.0, 3.0])
    found = jax.jit(jax.vmap(decay, (0, None, None)))(jnp.arange(8), boundaries, values)
    assert found.tolist() == [1, 1, 1, 1, 2, 2, 2, 3]
    assert decay(4, [3, jnp.int32(6)], [1, jnp.float32(2), 3]) == 2


def test_a_step_beyond_int32_is_taken_as_a_float():
    found = decays.inverse_time_decay(1.0, 2**33, 2**32, 1.0)
    np.testing.assert_allclose(found, 1 / 3, rtol=1e-6)
    assert decays.piecewise_constant(2**33, [5, 2**20], [1, 2, 3]) == 3


@functools.partial(jax.jit, static_argnums=1)
def noisy(steps, decay_steps=10**6, key=0, variance=1.0, variance_decay=0.55):
    """Return rates with no cosine, which are line + noise."""
    return decays.noisy_linear_cosine_decay(
        1.0, steps, decay_steps, variance, variance_decay, 0.0, beta=0.0, key=key
    )


def test_the_noise_is_normal_with_a_variance_that_falls():
    steps = np.arange(20_000)
    draws = noisy(steps, variance=0.25, variance_decay=0.5) - (1 - steps / 1e6)
    z = draws / (0.5 / (1 + steps) ** 0.25)
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.02
    assert abs((z**4).mean() - 3) < 0.2
    assert abs((z[1:] * z[:-1]).mean()) < 0.03


def test_after_the_end_the_noise_goes_on_with_the_last_variance():
    draws = np.asarray(noisy(np.arange(15, 8000), 15))
    assert len(np.unique(draws)) > 7900
    np.testing.assert_allclose(draws.std(), 16**-0.275, rtol=0.05)


@pytest.mark.wide
def test_the_noise_depends_on_key_and_step_alone():
    steps = np.arange(50)
    rates = noisy(steps)
    assert [noisy(step) for step in (0, 7)] == [rates[0], rates[7]]
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        np.testing.assert_array_equal(noisy(steps, key=key), rates)
    assert (noisy(steps, key=1) != rates).all()


def test_a_rate_may_be_negative_as_in_the_original():
    rates = noisy(np.arange(100), 100)
    assert rates.min() < 0 < rates.max()


def test_signatures_are_the_originals():
    expected = {
        "exponential_decay": "decay_steps decay_rate staircase=False",
        "natural_exp_decay": "decay_steps decay_rate staircase=False",
        "inverse_time_decay": "decay_steps decay_rate staircase=False",
        "polynomial_decay": "decay_steps end_learning_rate=0.0001 power=1.0 "
        "cycle=False",
        "cosine_decay": "decay_steps alpha=0.0",
        "cosine_decay_restarts": "first_decay_steps t_mul=2.0 m_mul=1.0 alpha=0.0",
        "linear_cosine_decay": "decay_steps num_periods=0.5 alpha=0.0 beta=0.001",
        "noisy_linear_cosine_decay": "decay_steps initial_variance=1.0 "
        "variance_decay=0.55 num_periods=0.5 alpha=0.0 beta=0.001 key=0",
        "piecewise_constant": "boundaries values",
    }
    for name, text in expected.items():
        parameters = list(inspect.signature(getattr(decays, name)).parameters.values())
        own = parameters[1 if name == "piecewise_constant" else 2 :]
        found = " ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default}" for p in own
        )
        assert found == text


POSITIVE = "must be a finite real number > 0 or a 0-d array."
NOT_NEGATIVE = "must be a finite real number >= 0 or a 0-d array."
FINITE = "must be a finite real number or a 0-d array."
REFUSED = [
    (
        lambda: decays.exponential_decay(0.1, 3, 0, 0.5),
        f"exponential_decay(decay_steps=0): {POSITIVE} Count in steps.",
    ),
    (
        lambda: decays.natural_exp_decay(0.1, 3, -5, 0.5),
        f"natural_exp_decay(decay_steps=-5): {POSITIVE} Count in steps.",
    ),
    (
        lambda: decays.cosine_decay(0.1, 3, float("inf")),
        f"cosine_decay(decay_steps=inf): {POSITIVE} Count in steps.",
    ),
    (
        lambda: decays.cosine_decay(0.1, 3, np.ones(2)),
        f"cosine_decay(decay_steps=float64[2]): {POSITIVE} Count in steps.",
    ),
    (
        lambda: decays.linear_cosine_decay(0.1, 3, True),
        f"linear_cosine_decay(decay_steps=True): {POSITIVE} Count in steps.",
    ),
    (
        lambda: decays.exponential_decay(0.1, 3, 10, -0.5),
        f"exponential_decay(decay_rate=-0.5): {NOT_NEGATIVE} For one that alternates "
        "the sign, pass staircase=True.",
    ),
    (
        lambda: decays.exponential_decay(0.1, 3, 10, float("nan"), True),
        f"exponential_decay(decay_rate=nan): {FINITE}",
    ),
    (
        lambda: decays.inverse_time_decay(0.1, 3, 10, float("inf")),
        f"inverse_time_decay(decay_rate=inf): {FINITE}",
    ),
    (
        lambda: decays.natural_exp_decay(0.1, 3, 10, "0.5"),
        f"natural_exp_decay(decay_rate='0.5'): {FINITE}",
    ),
    (
        lambda: decays.inverse_time_decay(0.1, 3, 10, 0.5, 1),
        "inverse_time_decay(staircase=1): must be True or False.",
    ),
    (
        lambda: decays.polynomial_decay(0.1, 3, 10, power=-1),
        f"polynomial_decay(power=-1): {NOT_NEGATIVE} A negative one has no end.",
    ),
    (
        lambda: decays.polynomial_decay(0.1, 3, 10, None),
        f"polynomial_decay(end_learning_rate=None): {FINITE}",
    ),
    (
        lambda: decays.polynomial_decay(0.1, 3, 10, cycle="yes"),
        "polynomial_decay(cycle='yes'): must be True or False.",
    ),
    (
        lambda: decays.cosine_decay_restarts(0.1, 3, 0),
        f"cosine_decay_restarts(first_decay_steps=0): {POSITIVE} Count in steps.",
    ),
    (
        lambda: decays.cosine_decay_restarts(0.1, 3, 10, t_mul=0.0),
        f"cosine_decay_restarts(t_mul=0.0): {POSITIVE} With 1 all cycles have one "
        "length.",
    ),
    (
        lambda: decays.cosine_decay_restarts(0.1, 3, 10, m_mul=float("nan")),
        f"cosine_decay_restarts(m_mul=nan): {FINITE}",
    ),
    (
        lambda: decays.linear_cosine_decay(0.1, 3, 10, beta=float("inf")),
        f"linear_cosine_decay(beta=inf): {FINITE}",
    ),
    (
        lambda: decays.noisy_linear_cosine_decay(0.1, 3, 10, initial_variance=-1.0),
        f"noisy_linear_cosine_decay(initial_variance=-1.0): {NOT_NEGATIVE} With 0 "
        "there is no noise.",
    ),
    (
        lambda: decays.cosine_decay(None, 3, 10),
        "cosine_decay(learning_rate=None): must be a finite real number or a 0-d "
        "array.",
    ),
    (
        lambda: decays.cosine_decay(0.1, None, 10),
        "cosine_decay(step=None): must be an integer or an array of them. Pass the "
        "global step.",
    ),
    (
        lambda: decays.piecewise_constant(3, [2.5], [1, 2]),
        "piecewise_constant(boundaries=[2.5]): 2.5 is no integer, as the step is. "
        "Count in steps.",
    ),
    (
        lambda: decays.piecewise_constant(3, [100.0], [1, 2]),
        "piecewise_constant(boundaries=[100.0]): 100.0 is no integer, as the step is. "
        "Count in steps.",
    ),
    (
        lambda: decays.piecewise_constant(3, [5, 5], [1, 2, 3]),
        "piecewise_constant(boundaries=[5, 5]): must increase. Sort them, and leave "
        "out what is there twice.",
    ),
    (
        lambda: decays.piecewise_constant(3, ["5"], [1, 2]),
        "piecewise_constant(boundaries='5'): must be finite real numbers or 0-d "
        "arrays.",
    ),
    (
        lambda: decays.noisy_linear_cosine_decay(0.1, 3, 10, key=1.5),
        "noisy_linear_cosine_decay(key=1.5): must be an int or a JAX random key.",
    ),
    (
        lambda: decays.cosine_decay(0.1, np.array(np.nan), 10),
        "cosine_decay(step=float64[]): must be an integer or an array of them. Pass "
        "the global step.",
    ),
    (
        lambda: decays.piecewise_constant(3, "100", [1, 2]),
        "piecewise_constant(boundaries='100'): must be a list.",
    ),
    (
        lambda: decays.piecewise_constant(3, 100, [1, 2]),
        "piecewise_constant(boundaries=100): must be a list.",
    ),
    (
        lambda: decays.piecewise_constant(3, [100], [1.0]),
        "piecewise_constant(values=[1.0]): 1 for 1 boundaries. Give one more than "
        "those.",
    ),
    (
        lambda: decays.piecewise_constant(3, [100], [1.0, None]),
        "piecewise_constant(values=None): must be finite real numbers or 0-d arrays.",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_a_bad_argument_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_traced_arguments_are_not_judged():
    found = jax.jit(decays.exponential_decay)(0.1, 3, jnp.int32(10), jnp.float32(-0.5))
    assert np.isnan(found)

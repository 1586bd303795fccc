"""Adaptive clipping: its formulas in NumPy, its spikes, and what cannot poison it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optloss import adaptive_clipping, get_summaries

BOTH = pytest.mark.parametrize("statistics", ["current", "previous"])


@functools.cache
def compiled(**options):
    """Return ``init`` and a run over norms, each the gradient of one parameter."""
    transform = adaptive_clipping(**options)

    def body(state, norm):
        clipped, state = transform.update(norm, state)
        return state, (clipped, state)

    return transform.init, jax.jit(
        lambda state, norms: jax.lax.scan(body, state, norms)
    )


def follow(norms, state=None, **options):
    """Return, for each of ``norms``, what it was clipped to and the state behind it."""
    init, run = compiled(**options)
    norms = jnp.asarray(norms, jnp.float32)
    last, (clipped, states) = run(init(norms[0]) if state is None else state, norms)
    return np.asarray(clipped), states, last


def restated(
    norms, k=2.0, decay=0.95, limit=np.inf, epsilon=1e-8, warmup=True, previous=False
):
    """The same in plain float64: clipped norms, thresholds, means, mean squares."""
    m = q = 0.0
    rows = []
    for t, norm in enumerate(norms):
        entry = np.log(norm + epsilon)
        bound = np.exp(m + k * np.sqrt(max(epsilon, q - m**2)))
        target = np.exp(m)
        if previous:
            bound = bound if t >= 5 else np.finfo(np.float32).max
            entry = min(entry, np.log(bound))
        d = min(decay, t / (t + 1)) if warmup or previous else decay
        m, q = d * m + (1 - d) * entry, d * q + (1 - d) * entry**2
        if not previous:
            bound, target = np.exp(m + k * np.sqrt(max(epsilon, q - m**2))), np.exp(m)
        clipped = min(target if norm >= bound else norm, limit)
        rows.append((clipped, bound, m, q))
    return [np.array(column) for column in zip(*rows, strict=True)]


def raw(*arrays):
    return [np.asarray(array).tobytes() for array in arrays]


STREAMS = {
    "wandering": np.exp(np.cumsum(np.random.default_rng(0).normal(size=60)) / 2),
    "spiky": 1 + 50.0 * (np.random.default_rng(1).uniform(size=60) > 0.9),
    "falling": 1e6 * 0.8 ** np.arange(60),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"std_factor": 0.7, "decay": 0.8}, {"k": 0.7, "decay": 0.8}),
        ({"static_max_norm": 3.0}, {"limit": 3.0}),
        ({"decay_warmup": False}, {"warmup": False}),
        ({"epsilon": 0.5}, {"epsilon": 0.5}),
        ({"statistics": "previous"}, {"previous": True}),
        (
            {"statistics": "previous", "decay_warmup": False, "decay": 0.5},
            {"previous": True, "decay": 0.5},
        ),
    ],
    ids=str,
)
def test_it_is_what_the_formulas_say(stream, options, same):
    norms = STREAMS[stream]
    clipped, states, _ = follow(norms, **options)
    expected = restated(norms, **same)
    # A norm within rounding of its threshold may fall on either side.
    clear = np.abs(norms / expected[1] - 1) > 1e-3
    assert clear.mean() > 0.5
    np.testing.assert_allclose(clipped[clear], expected[0][clear], rtol=1e-3)
    measured = (states.max_norm, states.mean, states.sq_mean)
    for found, column in zip(measured, expected[1:], strict=True):
        np.testing.assert_allclose(found[5:], column[5:], rtol=2e-3, atol=1e-4)


def test_all_leaves_shrink_by_one_factor():
    transform = adaptive_clipping(static_max_norm=5.0)
    grads = {"w": jnp.array([6.0, 0.0]), "b": jnp.array(8.0)}
    clipped, state = transform.update(grads, transform.init(grads))
    np.testing.assert_allclose(clipped["w"], [3, 0], rtol=1e-5)
    np.testing.assert_allclose(clipped["b"], 4, rtol=1e-5)
    assert (state.norm, state.clipped) == (10, 1)


def test_the_warm_up_follows_the_step_it_is_given():
    transform = adaptive_clipping(decay=0.95)
    start = transform.init(jnp.zeros(()))
    entry = np.log(7.0)
    for step, d in [(None, 0), (0, 0), (1, 0.5), (3, 0.75), (10**6, 0.95)]:
        _, state = transform.update(jnp.array(7.0), start, step=step)
        np.testing.assert_allclose(state.mean, (1 - d) * entry, rtol=1e-5)
    _, second = transform.update(jnp.array(7.0), state)
    np.testing.assert_allclose(second.mean, 0.5 * state.mean + 0.5 * entry, rtol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize("std_factor", [2, 3, 5, 8])
@pytest.mark.parametrize("noisy", [False, True], ids=["constant", "noisy"])
def test_a_spike_of_any_size_is_cut_by_previous_statistics(std_factor, noisy):
    random = np.random.default_rng(std_factor)
    norms = 3.0 * np.exp(random.normal(size=80) * 0.1 * noisy)
    options = {"std_factor": std_factor, "statistics": "previous"}
    _, states, _ = follow(norms, **options)
    for at in range(5, 55):
        spiked = norms.copy()
        spiked[at] *= 1000
        clipped, marked, _ = follow(spiked, **options)
        running_mean = np.exp(states.mean[at - 1])
        assert clipped[at] <= 1.5 * running_mean
        if not noisy:
            before, after = marked.max_norm[at], marked.max_norm[at + 20]
            assert abs(after / before - 1) < 0.05


def test_a_spike_that_current_statistics_let_through():
    """d / (1 - d) > k**2 decides, as the docstring says: here 1 is not above 9."""
    norms = np.ones(40)
    norms[30] = 1e6
    for statistics, expected in [("current", 1e6), ("previous", 1.0)]:
        clipped, _, _ = follow(norms, std_factor=3.0, decay=0.5, statistics=statistics)
        np.testing.assert_allclose(clipped[30], expected, rtol=1e-3)


def test_norms_that_go_on_being_high_raise_the_previous_threshold():
    norms = np.concatenate([np.ones(20), np.full(400, 100.0)])
    norms[:20] += 0.1 * (-1) ** np.arange(20)
    clipped, states, _ = follow(norms, statistics="previous")
    assert clipped[20] < 1.5
    assert clipped[-1] == 100
    assert int(states.clipped[-1]) < 200


@BOTH
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_leaves_the_statistics_alone(statistics, poison):
    _, _, before = follow(STREAMS["wandering"], statistics=statistics)
    clipped, _, after = follow([poison], before, statistics=statistics)
    assert raw(clipped) == raw(np.float32([poison]))
    kept = ("mean", "sq_mean", "observed", "clipped")
    assert raw(*(getattr(after, name) for name in kept)) == raw(
        *(getattr(before, name) for name in kept)
    )
    assert after.step == before.step + 1
    # It goes on as if that gradient had never been, but for the own count of steps.
    rest = STREAMS["spiky"]
    straight, _, _ = follow(rest, before, statistics=statistics)
    resumed, _, _ = follow(rest, after, statistics=statistics)
    assert raw(resumed) == raw(straight)


@pytest.mark.wide
@BOTH
@pytest.mark.parametrize(
    "norms",
    [
        np.zeros(12),
        [0, 0, 0, 0, 0, 0, 1, 0, 1e30, 0, 3e38, 1e-38, 0],
        [3e38] * 10 + [1e-38] * 10,
        [np.nan] * 10 + [1, 2, 3],
    ],
    ids=["zeros", "mixed", "extreme", "not a number at first"],
)
@pytest.mark.parametrize("epsilon", [1e-8, 1e-45])
def test_no_stream_makes_a_nan(statistics, norms, epsilon):
    clipped, states, _ = follow(norms, statistics=statistics, epsilon=epsilon)
    finite = np.isfinite(norms)
    assert np.isfinite(clipped[finite]).all()
    assert (np.abs(clipped) <= np.abs(np.float32(norms)))[finite].all()
    assert np.isfinite(states.mean).all()
    assert np.isfinite(states.sq_mean).all()


@pytest.mark.parametrize("bound", [-1.0, np.nan])
def test_a_traced_static_bound_that_is_none_turns_no_gradient_round(bound):
    @jax.jit
    def run(grads, bound):
        transform = adaptive_clipping(static_max_norm=bound)
        return transform.update(grads, transform.init(grads))[0]

    expected = 0.0 if bound < 0 else 3.0
    assert run(jnp.array(3.0), jnp.float32(bound)) == expected


def test_every_number_may_be_traced():
    def run(options, norms):
        transform = adaptive_clipping(**options, decay_warmup=True)
        state = transform.init(norms[0])
        for norm in norms:
            clipped, state = transform.update(norm, state)
        return clipped, state

    options = {"std_factor": 0.5, "decay": 0.9, "static_max_norm": 4.0, "epsilon": 1e-6}
    norms = jnp.array([1.0, 2.0, 9.0])
    given, given_state = run(options, norms)
    traced, traced_state = jax.jit(run)(jax.tree.map(jnp.float32, options), norms)
    np.testing.assert_allclose(traced, given, rtol=1e-6)
    for one, other in zip(traced_state, given_state, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_what_it_measured_is_published():
    _, _, state = follow([1.0, 1.0, 1000.0], std_factor=0.5)
    found = {tag: float(value) for tag, value in get_summaries(state).items()}
    assert list(found) == [
        "global_norm/gradient_norm",
        "global_norm/clipped_gradient_norm",
        "clip_factor",
        "clipped_share",
        "global_norm/adaptive_max_gradient_norm",
        "adaptive/mean",
        "adaptive/sq_mean",
        "clip_threshold",
    ]
    mean, sq_mean = np.log(1000) / 3, np.log(1000) ** 2 / 3
    bound = np.exp(mean + 0.5 * np.sqrt(sq_mean - mean**2))
    expected = [1000, 10, 0.01, 1 / 3, bound, mean, sq_mean, bound]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-4)


FINITE = "must be a finite real number >= 0 or a 0-d array."
DECAY = "must be a real number in [0, 1) or a 0-d array. "
DECAY += "0.95 averages over some 20 updates."
STATIC = "must be a real number >= 0 or a 0-d array, or None for no fixed bound."
EPSILON = "must be a finite real number > 0 or a 0-d array."


@pytest.mark.parametrize(
    ("argument", "value", "problem"),
    [
        ("std_factor", -1, FINITE),
        ("std_factor", float("inf"), FINITE),
        ("std_factor", True, FINITE),
        ("decay", 1.0, DECAY),
        ("decay", -0.1, DECAY),
        ("decay", "0.9", DECAY),
        ("static_max_norm", -1.0, STATIC),
        ("static_max_norm", float("nan"), STATIC),
        ("epsilon", 0, EPSILON),
        ("decay_warmup", 1, "must be True or False."),
        ("statistics", "future", "must be 'current' or 'previous'."),
    ],
)
def test_what_is_out_of_range_is_refused(argument, value, problem):
    message = f"adaptive_clipping({argument}={value!r}): {problem}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adaptive_clipping(**{argument: value})

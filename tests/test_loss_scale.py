"""Loss scales, against flax's step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.dynamic_scale import DynamicScale

import optloss
from optloss.loss_scale import as_loss_scale, dynamic_loss_scale, scale_loss, unscale


def run(loss_scale, outcomes):
    """The states after steps that were finite or not."""

    def step(state, finite):
        state = loss_scale.update(state, finite)
        return state, state

    return jax.lax.scan(step, loss_scale.init(), jnp.asarray(outcomes))[1]


def test_it_grows_after_the_interval_and_shrinks_at_once():
    outcomes = [True] * 3 + [False] + [True] * 4 + [False] * 2
    found = run(dynamic_loss_scale(8.0, growth_interval=3), outcomes)
    assert found.scale.tolist() == [8, 8, 16, 8, 8, 8, 16, 16, 8, 4]
    assert found.good.tolist() == [1, 2, 0, 0, 1, 2, 0, 1, 0, 0]


def test_it_never_shrinks_below_its_minimum_nor_grows_to_infinity():
    low = run(dynamic_loss_scale(8.0, minimum=3.0, factor=2.0), [False] * 3)
    assert low.scale.tolist() == [4, 3, 3]
    high = run(dynamic_loss_scale(2.0**126, growth_interval=1, factor=8.0), [True] * 2)
    assert high.scale.tolist() == [2.0**127] * 2


@pytest.mark.parametrize("interval", [2, 5])
def test_it_equals_that_of_flax(interval):
    """Which grows after one step more than it is told, so it is told one less."""
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float16)
    x[[7, 8, 30, 55]] = np.inf
    ours = dynamic_loss_scale(2.0**10, growth_interval=interval)
    theirs = DynamicScale(growth_interval=interval - 1, scale=jnp.float32(2.0**10))

    def loss(w, x):
        return jnp.sum(w.astype(jnp.float16) * x).astype(jnp.float32)

    @jax.jit
    def their_step(theirs, w, x):
        theirs, finite, value, gradient = theirs.value_and_grad(loss)(w, x)
        return theirs, finite, value, gradient

    @jax.jit
    def our_step(state, w, x):
        def scaled(w):
            return scale_loss(state.scale, loss(w, x))

        value, gradient = unscale(state.scale, jax.value_and_grad(scaled)(w))
        finite = jnp.isfinite(gradient).all()
        return ours.update(state, finite), finite, value, gradient

    state, w, scales = ours.init(), jnp.ones(4), []
    for row in x:
        theirs, *expected = their_step(theirs, w, row)
        state, *found = our_step(state, w, row)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        assert state.scale == theirs.scale
        assert state.good == theirs.fin_steps
        scales.append(float(state.scale))
    assert len(set(scales)) > 2


def test_a_number_never_changes():
    constant = as_loss_scale("optimize_loss", 1024)
    assert not constant.is_dynamic
    assert constant.init() is None
    assert constant.scale(None) == 1024
    assert constant.scale(None).dtype == jnp.float32


def test_other_scales_pass_as_they_are():
    assert as_loss_scale("optimize_loss", None) is None
    scale = dynamic_loss_scale()
    assert as_loss_scale("optimize_loss", scale) is scale


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_loss_is_multiplied_in_float32(dtype):
    scaled = scale_loss(jnp.float32(2.0**15), jnp.asarray(1000.0, dtype))
    assert scaled.dtype == jnp.float32
    assert scaled == 1000 * 2.0**15


def test_gradients_are_divided_in_float32_or_their_own_precision():
    gradients = {
        "half": jnp.asarray([6e-8], jnp.float16),
        "single": jnp.ones(2),
        "complex": jnp.asarray([complex(2, np.inf)], jnp.complex64),
        "count": jnp.ones((), jnp.int32),
    }
    found = unscale(jnp.float32(4.0), gradients)
    assert {name: leaf.dtype.name for name, leaf in found.items()} == {
        "half": "float32",
        "single": "float32",
        "complex": "complex64",
        "count": "int32",
    }
    assert found["half"] == np.float32(gradients["half"]) / 4 > 0
    assert found["complex"] == complex(0.5, np.inf)
    with jax.enable_x64(True):
        third = unscale(jnp.float32(3.0), jnp.ones(1, jnp.float64))
        assert third == 1 / 3
        assert scale_loss(jnp.float32(3.0), jnp.float64(1e300)) == 3e300


def test_small_float16_gradients_survive():
    def loss(w):
        return (w.astype(jnp.float16) * jnp.float16(1e-4) * 1e-4).astype(jnp.float32)

    scale = jnp.float32(2.0**15)
    assert jax.grad(loss)(1.0) == 0
    gradient = jax.grad(lambda w: scale_loss(scale, loss(w)))(1.0)
    np.testing.assert_allclose(unscale(scale, gradient), 1e-8, rtol=1e-3)


def test_it_is_measured():
    state = {"loss_scale": dynamic_loss_scale().init(), "other": ()}
    assert optloss.get_summaries(state) == {"loss_scale": 2.0**15}


MISTAKES = {
    "zero": (
        lambda: dynamic_loss_scale(0),
        "dynamic_loss_scale(initial=0): must be a number > 0.",
    ),
    "infinite": (
        lambda: dynamic_loss_scale(float("inf")),
        "dynamic_loss_scale(initial=inf): must be a number > 0.",
    ),
    "no interval": (
        lambda: dynamic_loss_scale(growth_interval=0),
        "dynamic_loss_scale(growth_interval=0): must be an int in [1, 2**31).",
    ),
    "no factor": (
        lambda: dynamic_loss_scale(factor=1.0),
        "dynamic_loss_scale(factor=1.0): must be a number > 1. For a constant scale, "
        "pass the number itself as loss_scale.",
    ),
    "a minimum too high": (
        lambda: dynamic_loss_scale(2.0, minimum=4.0),
        "dynamic_loss_scale(minimum=4.0): must not exceed the initial scale, 2.0.",
    ),
    "a bool": (
        lambda: as_loss_scale("optimize_loss", True),
        "optimize_loss(loss_scale=True): must be a number > 0, "
        "dynamic_loss_scale(...) or None.",
    ),
    "the factory itself": (
        lambda: as_loss_scale("optimize_loss", dynamic_loss_scale),
        "optimize_loss(loss_scale=dynamic_loss_scale): must be a number > 0, "
        "dynamic_loss_scale(...) or None.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert str(caught.value) == message

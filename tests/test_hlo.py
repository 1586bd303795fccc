"""What a step is compiled to: passes over the gradients, callbacks, branches."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from compiled import always_run

import optloss
from optloss.summaries import OPTIMIZER_SUMMARIES

PARAMS = {"a": jnp.ones(1009), "b": jnp.ones((7, 31)), "c": jnp.ones(2003)}
NORMS = ("loss", "learning_rate", "global_gradient_norm")


def total(params):
    """A loss that is one sum over every leaf."""
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in params.values())


def compiled(loss=total, **changed):
    """Return the step as XLA runs it, donated state and all."""
    arguments = {"global_step": 0, "learning_rate": 1e-3, "optimizer": "adam"}
    train_op = optloss.optimize_loss(loss, **arguments | {"summaries": []} | changed)
    step = jax.jit(train_op.update, donate_argnums=0)
    return step.lower(train_op.init(PARAMS)).compile()


def text_of(**changed):
    return compiled(**changed).as_text()


@functools.cache
def text_of_everything():
    return text_of(**EVERYTHING)


def sums(**changed):
    """Return how often a leaf is summed up, beside what the loss sums."""
    return always_run(text_of(**changed)).count(" reduce(") - len(PARAMS)


MEASURING = {
    "clip": {"clip_gradients": 1.0},
    "adaptive clip": {"clip_gradients": optloss.adaptive_clipping()},
    "norms": {"summaries": NORMS},
    "guard": {"skip_nonfinite": True},
    "clip and norms": {"clip_gradients": 1.0, "summaries": NORMS},
    "clip and guard": {"clip_gradients": 1.0, "skip_nonfinite": True},
    "norms and guard": {"summaries": NORMS, "skip_nonfinite": True},
    "all": {"clip_gradients": 1.0, "summaries": NORMS, "skip_nonfinite": True},
    "all, adaptive, with multipliers": {
        "clip_gradients": optloss.adaptive_clipping(),
        "gradient_multipliers": {"a": 2.0},
        "summaries": NORMS,
        "skip_nonfinite": True,
    },
    "clip with noise": {"clip_gradients": 1.0, "gradient_noise_scale": 0.1},
}


def test_what_measures_nothing_sums_nothing():
    assert sums() == 0
    assert sums(summaries=["loss", "learning_rate"]) == 0
    assert sums(gradient_multipliers={"a": 2.0}) == 0


@pytest.mark.wide
@pytest.mark.parametrize("case", MEASURING)
def test_each_gradient_is_summed_once(case):
    assert sums(**MEASURING[case]) == len(PARAMS)


def test_norms_of_single_parameters_come_from_the_same_sums():
    assert sums(clip_gradients=1.0, summaries=["gradient_norm"]) == len(PARAMS)


def test_the_chain_alone_sums_each_gradient_once():
    tx = optloss.make_optimizer(0.1, "adam", clip_gradients=1.0, skip_nonfinite=True)
    step = jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS), PARAMS).compile()
    assert always_run(step.as_text()).count(" reduce(") == len(PARAMS)


CALLBACK = re.compile(r"callback|infeed|outfeed| send\(| recv\(")
EVERYTHING = {
    "clip_gradients": optloss.adaptive_clipping(),
    "gradient_noise_scale": 0.1,
    "gradient_multipliers": {"a": 2.0},
    "learning_rate_decay_fn": lambda rate, step: rate * 0.9**step,
    "learning_rate_multipliers": {"b": 2.0},
    "summaries": OPTIMIZER_SUMMARIES,
    "histogram_every": 10,
    "skip_nonfinite": True,
}


def test_a_step_never_calls_the_host():
    def talkative(params):
        jax.debug.callback(lambda: None)
        return total(params)

    assert not CALLBACK.search(text_of_everything())
    assert CALLBACK.search(text_of(loss=talkative))


HISTOGRAM = "scatter-add"  # how the values are counted
ROOT = "f32[1009]{0} sqrt("  # Adam's, of the moment of leaf "a"


def test_histograms_now_and_then_are_work_inside_a_branch_alone():
    text = text_of(summaries=["gradients"], histogram_every=10, clip_gradients=1.0)
    assert HISTOGRAM in text
    assert HISTOGRAM not in always_run(text)
    # The other is the norm's, for a huge or a tiny one.
    assert text.count(" conditional(") == 2


def test_without_a_counter_there_are_histograms_at_every_step():
    text = text_of(summaries=["gradients"], histogram_every=10, global_step=None)
    assert HISTOGRAM in always_run(text)


def test_a_guarded_update_is_work_inside_a_branch_alone():
    text = text_of(clip_gradients=1.0, skip_nonfinite=True)
    assert text.count(ROOT) == 1
    assert ROOT not in always_run(text)
    assert ROOT in always_run(text_of(clip_gradients=1.0))


def test_with_everything_on_both_are_in_branches():
    text = text_of_everything()
    assert HISTOGRAM in text
    assert HISTOGRAM not in always_run(text)
    assert ROOT not in always_run(text)


def test_the_guard_around_a_clip_writes_no_gradient():
    large = {"w": jnp.ones(1_000_000)}
    train_op = optloss.optimize_loss(
        lambda params, gradients: jnp.vdot(params["w"], gradients["w"]),
        global_step=0,
        learning_rate=1e-3,
        optimizer="adam",
        clip_gradients=1.0,
        skip_nonfinite=True,
    )
    step = jax.jit(train_op.update, donate_argnums=0)
    program = step.lower(jax.eval_shape(train_op.init, large), large).compile()
    # XLA's CPU compiler of jax 0.10.0 writes what is summed up to memory, in float64.
    squares = 0 if jax.__version_info__ >= (0, 10, 2) else 8 * large["w"].size
    assert program.memory_analysis().temp_size_in_bytes < 1_000_000 + squares

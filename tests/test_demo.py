"""The demo, with few steps: it trains, draws, is interrupted, and goes on."""

import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from optloss import demo

STEPS = 60


def run(folder, *flags):
    return demo.main(
        [
            f"--steps={STEPS}",
            f"--logdir={folder / 'logs'}",
            f"--checkpoint={folder / 'saved'}",
            *flags,
        ]
    )


def saved(folder):
    with ocp.CheckpointManager(folder / "saved") as manager:
        restored = manager.restore(STEPS, args=ocp.args.StandardRestore())
    return jax.tree.leaves(restored)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("straight")
    assert run(folder) == 0
    return folder


@pytest.mark.wide
def test_events_hold_every_scalar_of_every_step(straight):
    events = EventAccumulator(
        str(straight / "logs"), {"scalars": 0, "histograms": 0}
    ).Reload()
    for tag in (
        "OptimizeLoss/loss",
        "OptimizeLoss/learning_rate",
        "OptimizeLoss/global_norm/gradient_norm",
        "OptimizeLoss/global_norm/clipped_gradient_norm",
        "global_norm/adaptive_max_gradient_norm",
        "noise_std",
        "skipped/total",
    ):
        assert [event.step for event in events.Scalars(tag)] == list(range(STEPS))
    rates = [event.value for event in events.Scalars("OptimizeLoss/learning_rate")]
    np.testing.assert_allclose(rates, 3e-3 * 0.8 ** (np.arange(STEPS) / 100), rtol=1e-5)
    histograms = events.Histograms("OptimizeLoss/gradients/head/kernel")
    assert [event.step for event in histograms] == [0, 50]
    assert all(event.histogram_value.num == 640 for event in histograms)


@pytest.mark.wide
def test_it_draws_a_picture(straight):
    picture = (straight / "logs" / "training.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


@pytest.mark.wide
def test_an_interrupted_run_goes_on_to_the_same_end(
    straight, tmp_path, monkeypatch, capsys
):
    batch = demo.batch

    def interrupting(digits, seed, step):
        if step == 20:
            signal.raise_signal(signal.SIGINT)
        return batch(digits, seed, step)

    monkeypatch.setattr(demo, "batch", interrupting)
    assert run(tmp_path) == 0
    assert "interrupted after step 20" in capsys.readouterr().err
    monkeypatch.setattr(demo, "batch", batch)
    assert run(tmp_path) == 0
    assert "goes on from step 21" in capsys.readouterr().out
    for one, other in zip(saved(straight), saved(tmp_path), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=0"], "argument --steps: must be at least 1, got 0"),
        (["--seed=x"], "argument --seed: invalid integer value: 'x'"),
        (["--clip=much"], "argument --clip: invalid clip value: 'much'"),
        (["--speed=9"], "unrecognized arguments: --speed=9"),
        (
            ["--optimizer=adm"],
            "optimize_loss(optimizer='adm'): no optimizer of that name. Did you mean "
            "'adam'? list_optimizers() prints them all.",
        ),
        (
            ["--noise=-1"],
            "optimize_loss(gradient_noise_scale=-1.0): must be a finite real number "
            ">= 0, a 0-d array or a transformation such as add_gradient_noise(0.1, "
            "annealing=0.55).",
        ),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"optloss: {message}\n"


@pytest.mark.wide
def test_without_its_packages_it_says_what_to_install():
    script = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from optloss.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        done.stderr == "optloss: the demo needs sklearn. pip install 'optloss[demo]'\n"
    )

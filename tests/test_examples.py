"""The programs and pictures of ``examples/`` run, the programs in a short form."""

import difflib
import runpy
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ADOPTING = ["linen", "nnx", "equinox"]


def changed_lines(before, after):
    """Return how many lines a reader of the diff has to type, and to delete."""
    texts = [path.read_text().splitlines() for path in (before, after)]
    diff = [line[0] for line in difflib.ndiff(*texts)]
    return diff.count("+"), diff.count("-")


def run(path):
    return runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("library", ADOPTING)
def test_a_loop_adopts_the_library_in_six_lines_at_most(library):
    before, after = (
        EXAMPLES / "adopt" / f"{library}_{x}.py" for x in ("before", "after")
    )
    typed, deleted = changed_lines(before, after)
    assert 0 < typed <= 6
    assert deleted <= typed


@pytest.mark.parametrize("library", ADOPTING)
def test_the_diff_that_the_docs_show_is_the_diff(library):
    texts = [
        (EXAMPLES / "adopt" / f"{library}_{name}.py").read_text().splitlines(True)
        for name in ("before", "after")
    ]
    diff = "".join(difflib.unified_diff(*texts, "before", "after"))
    assert (EXAMPLES / "adopt" / f"{library}.diff").read_text() == diff


@pytest.mark.wide
@pytest.mark.parametrize("library", ADOPTING)
def test_both_loops_train_alike(library, capsys):
    plain = run(EXAMPLES / "adopt" / f"{library}_before.py")
    adopted = run(EXAMPLES / "adopt" / f"{library}_after.py")
    assert "optloss" not in plain
    assert adopted["optloss"]
    np.testing.assert_allclose(adopted["loss"], plain["loss"], atol=0.01)
    assert plain["loss"] < 0.2
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"loss {plain['loss']:.3f}"
    assert 0 <= float(printed[1].split()[-1]) < 0.5  # the share that was clipped


@pytest.mark.wide
@pytest.mark.parametrize("library", ADOPTING)
def test_the_digits_are_learned(library, capsys):
    main = runpy.run_path(str(EXAMPLES / f"digits_{library}.py"))["main"]
    assert main(["--steps", "40"]) > 0.7
    assert "held-out accuracy" in capsys.readouterr().out


@pytest.mark.wide
def test_the_character_model_explodes_only_without_the_clip(capsys):
    main = runpy.run_path(str(EXAMPLES / "char_model.py"))["main"]
    clipped, exploded = (
        main(["--steps", "60"]),
        main(["--steps", "60", "--clip", "none"]),
    )
    assert np.isfinite(clipped).all()
    assert clipped[-10:].mean() < 3.5 < clipped[0]
    assert np.isnan(exploded[-1])
    assert "gradient norm" in capsys.readouterr().out


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_float16_survives_its_overflows(capsys):
    accuracy, skipped = main_of("float16_digits")(["--steps", "80"])
    assert accuracy > 0.75
    assert skipped >= 4
    assert "held-out accuracy" in capsys.readouterr().out


def test_the_averaged_model_has_the_lower_loss(capsys):
    latest, average = main_of("averaged_diffusion")(["--steps", "200"])
    assert average < latest < 0.5
    assert "averaged" in capsys.readouterr().out


def test_micro_batches_are_one_step(capsys):
    assert main_of("micro_batches")(["--steps", "60"]) > 0.8
    assert "step 60" in capsys.readouterr().out


@pytest.mark.wide
@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("plot_*.py")), ids=lambda path: path.stem
)
def test_a_picture_is_drawn(path, monkeypatch, capsys):
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = []

    def show():
        shown.extend(plt.figure(number) for number in plt.get_fignums())
        for figure in shown:
            figure.canvas.draw()
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    run(path)
    assert shown
    assert all(figure.axes and figure.axes[0].has_data() for figure in shown)
    capsys.readouterr()

"""The experiments of ``benchmarks/evidence/`` in short: the headline of each table."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks" / "evidence"
NAMES = ["gradient_noise", "adaptive_clipping", "fine_tuning", "precision"]
MOST = 9  # of ten seeds

pytestmark = [
    pytest.mark.skipif(not SCRIPTS.exists(), reason="the benchmarks are not shipped"),
    pytest.mark.wide,  # once is enough: CI runs it apart
]


@pytest.fixture(scope="module")
def script():
    """Import a script by its name."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def measured(script):
    """Return the rows of a script's short form, by its name."""

    def measure(name):
        module = script(name)
        rows = script("common").results(module, module.SHORT)
        assert module.table(rows).count("\n") > 2
        return rows

    return measure


def values(rows, name, **chosen):
    """Return a result of the rows that have all the values, NaN where there is none."""
    rows = [row for row in rows if all(row[key] == chosen[key] for key in chosen)]
    assert len(rows) == 10
    return np.array([row[name] for row in rows], float)


def test_weights_of_zero_learn_with_noise_only(measured):
    rows = measured("gradient_noise")
    assert np.sum(values(rows, "accuracy", eta=0) < 0.2) >= MOST
    assert np.sum(values(rows, "accuracy", eta=0.3) > 0.5) >= MOST


def test_a_clip_survives_bad_batches(measured):
    rows = measured("adaptive_clipping")
    guessing = np.log(95)
    assert np.sum(~(values(rows, "loss", clip="none") < guessing)) >= MOST
    for clip in ("bound 1", "autoclip"):
        assert np.sum(values(rows, "loss", clip=clip) < guessing) >= MOST


def test_a_frozen_body_forgets_less_at_the_same_rate(measured):
    rows = measured("fine_tuning")
    frozen = values(rows, "old", way="body frozen")
    free = values(rows, "old", way="one rate for all")
    assert np.sum(frozen > free + 0.1) >= MOST


def test_bfloat16_loses_small_updates(measured):
    rows = measured("precision")
    lost, kept = (
        values(rows, "unmoved", form=form) for form in ("bfloat16", "float32")
    )
    assert np.sum(lost > kept + 0.3) >= MOST


@pytest.mark.parametrize("name", NAMES)
def test_the_docs_print_what_was_measured(script, name):
    module = script(name)
    results = ROOT / "benchmarks" / "results" / f"evidence_{name}.json"
    rows = json.loads(results.read_text())["runs"]
    table = ROOT / "docs" / "tables" / f"evidence_{name}.md"
    assert module.table(rows) == table.read_text()
    assert (ROOT / "docs" / "_static" / f"evidence_{name}.png").exists()

"""The soak of ``benchmarks/soak.py``: shortly for everyone, in full for ``-m soak``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


@pytest.mark.wide
@pytest.mark.skipif(not SOAK.exists(), reason="the benchmarks are not shipped")
@pytest.mark.parametrize(
    ("steps", "kills"), [(300, 1), pytest.param(20_000, 10, marks=pytest.mark.soak)]
)
def test_nothing_is_lost(steps, kills, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    results = tmp_path / "soak.json"
    subprocess.run(
        [
            *(sys.executable, str(SOAK), "--results", str(results)),
            *("--steps", str(steps), "--kills", str(kills)),
        ],
        check=True,
    )
    found = json.loads(results.read_text())
    assert found["same bits"] == {
        "parameters": True,
        "model state": True,
        "optimizer state": True,
    }
    assert found["step counter"] == steps
    assert found["skipped"] == found["skips planned"] > 0
    assert len(found["killed after step"]) == kills

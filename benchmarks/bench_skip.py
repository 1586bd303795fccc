"""What the guard against NaN costs: ten million parameters in 16 leaves.

    python benchmarks/bench_skip.py

A training op with ``skip_nonfinite=True`` and one without make steps of Adam behind a
clip in the order ABBA, and so does the one without with another like itself: the
control; ratios are the medians of five such runs. Prints a table, and writes it to
``benchmarks/results/``.
"""

import argparse
import dataclasses
import json
import platform
import statistics

import jax
from bench_summaries import in_turns, make_loop, make_pool, median_bar
from bench_update import RESULTS, Cell

CELL = Cell("clip", 10**7, 16)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default=jax.default_backend())
    args = parser.parse_args()
    pool = make_pool(CELL)

    def against_none(**changed: bool) -> tuple[float, float]:
        a, b = in_turns(
            make_loop(CELL, pool, **changed), make_loop(CELL, pool), args.steps
        )
        return statistics.median(a), statistics.median(b)

    name = "skip_nonfinite=True: median step"
    bar = median_bar(name, 1.05, against_none, {"skip_nonfinite": True})
    print("| guard | with, ms | without, ms | ratio | to itself | bar | within |")
    print("|---|---|---|---|---|---|---|")
    print(bar.row())
    about = {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"skip-{args.output}.json"
    path.write_text(
        json.dumps({"about": about, "rows": [dataclasses.asdict(bar)]}, indent=1)
    )


if __name__ == "__main__":
    main()

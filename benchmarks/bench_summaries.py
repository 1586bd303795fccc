"""What summaries cost a step: a million parameters in 16 leaves, Adam behind a clip.

    python benchmarks/bench_summaries.py

Two training ops, one with summaries and one without, make steps in the order ABBA, and
so does the one without with another like itself: the control. Scalars are judged by the
median step; histograms every 100 steps by all of 300 steps, three of which make one.
Ratios are the medians of five such runs.
Prints a table, and writes it and the raw figures to ``benchmarks/results/``.
"""

import argparse
import dataclasses
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from bench_update import POOL, RESULTS, Cell, linear
from timing import seconds

import optloss

SCALARS = ("loss", "learning_rate", "global_gradient_norm")
EVERY = 100
REPEATS = 5
WARM_UP = 2  # a step with histograms, and one without
CELL = Cell("clip", 10**6, 16)


@dataclasses.dataclass
class Bar:
    """What was measured, against what it may be at most."""

    name: str
    bar: float
    ratio: float
    control: float
    with_ms: float
    without_ms: float

    def row(self) -> str:
        """Return a line of the table."""
        verdict = "yes" if self.ratio <= self.bar else "no"
        return (
            f"| {self.name} | {self.with_ms:.2f} | {self.without_ms:.2f} | "
            f"{self.ratio:.3f} | {self.control:.3f} | {self.bar:.2f} | {verdict} |"
        )


def make_op(**changed: Any) -> optloss.TrainOp:
    """Return the op, whose gradient is its argument."""
    arguments: dict[str, Any] = {"clip_gradients": 1.0, "summaries": []}
    return optloss.optimize_loss(
        linear,
        global_step=0,
        learning_rate=1e-3,
        optimizer="adam",
        **arguments | changed,
    )


def make_loop(cell: Cell, pool: Sequence[Any], **changed: Any) -> Callable[[], None]:
    """Return what makes a step of a run of its own, and waits for it."""
    train_op, turn = make_op(**changed), 0
    state = train_op.init(cell.tree(0))

    def step() -> None:
        nonlocal state, turn
        turn = (turn + 1) % POOL
        state, output = train_op(state, pool[turn])
        jax.block_until_ready((state.params, output.loss))

    return step


def make_pool(cell: Cell) -> list[Any]:
    """Return gradients on the device."""
    return [jax.device_put(cell.tree(seed)) for seed in range(1, POOL + 1)]


def in_turns(
    a: Callable[[], None], b: Callable[[], None], steps: int
) -> tuple[list[float], list[float]]:
    """Return the times of ``steps`` steps of each, taken in the order ABBA."""
    times: tuple[list[float], list[float]] = ([], [])
    for step in (a, b) * WARM_UP:
        step()
    for _ in range(steps // 2):
        for side in (0, 1, 1, 0):
            times[side].append(seconds((a, b)[side]))
    return times


def total(times: Sequence[float]) -> float:
    """Return the time of all steps, every one taken for the median of its kind."""
    numbers = np.arange(len(times)) + WARM_UP
    kinds = [np.array(times)[(numbers % EVERY == 0) == due] for due in (True, False)]
    return float(sum(len(kind) * np.median(kind) for kind in kinds))


def compare(
    name: str, bar: float, judge: Callable[..., float], steps: int, **changed: Any
) -> Bar:
    """Return how an op with ``changed`` does against one with no summaries."""
    pool = make_pool(CELL)

    def against_none(**changed: Any) -> tuple[float, float]:
        a, b = in_turns(make_loop(CELL, pool, **changed), make_loop(CELL, pool), steps)
        return judge(a), judge(b)

    return median_bar(name, bar, against_none, changed)


def median_bar(
    name: str,
    bar: float,
    against_none: Callable[..., tuple[float, float]],
    changed: Any,
) -> Bar:
    """Return the median of several runs, each with buffers and programs of its own.

    Where its buffers happen to lie makes a run up to a tenth faster than its like.
    """
    ours = [against_none(**changed) for _ in range(REPEATS)]
    same = [against_none() for _ in range(REPEATS)]
    ratio, control = (
        statistics.median(a / b for a, b in times) for times in (ours, same)
    )
    a, b = (1e3 * statistics.median(times) for times in zip(*ours, strict=True))
    return Bar(name, bar, ratio, control, a, b)


def reductions(**changed: Any) -> int:
    """Return how many reductions the compiled step holds."""
    train_op, params = make_op(**changed), CELL.tree(0)
    step = jax.jit(train_op.update, donate_argnums=0)
    shapes = jax.eval_shape(train_op.init, params)
    return step.lower(shapes, params).compile().as_text().count(" reduce(")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", default=jax.default_backend())
    args = parser.parse_args()
    histograms = {"summaries": [*SCALARS, "gradients"], "histogram_every": EVERY}
    bars = [
        compare(
            "loss, rate, global norms: median step",
            1.02,
            statistics.median,
            args.steps,
            summaries=SCALARS,
        ),
        compare(
            f"and histograms every {EVERY}: all of {args.steps} steps",
            1.08,
            total,
            args.steps,
            **histograms,
        ),
    ]
    # The loss is a sum over every leaf, and the rest is what the step itself measures.
    of_the_loss = reductions(clip_gradients=None)
    counted = {
        "loss alone": of_the_loss,
        "clip": reductions() - of_the_loss,
        "clip and norms": reductions(summaries=SCALARS) - of_the_loss,
        "clip, norms and the guard": reductions(summaries=SCALARS, skip_nonfinite=True)
        - of_the_loss,
    }
    print("| summaries | with, ms | without, ms | ratio | to itself | bar | within |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(bar.row() for bar in bars))
    print(f"\nreductions over the {CELL.leaves} gradients: {counted}")
    about = {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
    }
    rows = [dataclasses.asdict(bar) for bar in bars]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"summaries-{args.output}.json"
    path.write_text(
        json.dumps({"about": about, "rows": rows, "reductions": counted}, indent=1)
    )


if __name__ == "__main__":
    main()

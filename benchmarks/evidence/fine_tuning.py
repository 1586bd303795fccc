"""Do slower layers near the input learn new digits and forget fewer old ones?

    python benchmarks/evidence/fine_tuning.py

Question: in fine-tuning one trains the body of a network more slowly than its head, or
not at all, to keep what it knows. Does that keep more than a smaller rate for all?

Set-up: a network of three hidden layers of 64 ReLUs is trained on scikit-learn's images
of the digits 0 to 7. It is then trained for 100 steps of Adam on 40 images of 8 and 9,
and never sees an old digit again. Every way is tried at nine rates, each with 40 seeds,
and scored by the mean of two accuracies on images held out: that of the new digits and
that of the old ones, among all ten answers. Half of the seeds choose the rate of each
way, the others give the figures.

Source: Howard and Ruder, *Universal Language Model Fine-tuning for Text
Classification*, 2018, arXiv:1801.06146, section 3.2, for layer-wise rates. They
fine-tune a language model on text, so there is no figure of theirs to compare with.
"""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    Row,
    accuracies,
    batch_of,
    choose,
    column,
    cross_entropy,
    digits,
    grid,
    main,
    markdown,
    new_layer,
    spread,
    stack,
    train,
)
from matplotlib.figure import Figure

import optloss

WIDTH, HIDDEN, CLASSES = 64, 3, 10
OLD = 8  # digits below it are old
NEW_IMAGES = 40
BATCH = 20

WAYS: dict[str, dict[str, Any]] = {
    "one rate for all": {},
    "body frozen": {"variables": "head/*"},
    "body at a tenth of the rate": {"learning_rate_multipliers": {"body_*/*": 0.1}},
    "layer-wise decay, 0.5": {
        "learning_rate_multipliers": optloss.layerwise_decay(0.5, "body_{}/*", HIDDEN)
    },
    "layer-wise decay, 0.2": {
        "learning_rate_multipliers": optloss.layerwise_decay(0.2, "body_{}/*", HIDDEN)
    },
    "gradient of the body times 0.1": {"gradient_multipliers": {"body_*/*": 0.1}},
}


class Plan(NamedTuple):
    """Which runs are made."""

    ways: tuple[str, ...] = tuple(WAYS)
    rates: tuple[float, ...] = (
        *(1e-4, 1.8e-4, 3.2e-4, 5.6e-4),
        *(1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2),
    )
    seeds: int = 40
    first_steps: int = 1000
    steps: int = 100


FULL = Plan()
SHORT = Plan(
    ways=("one rate for all", "body frozen"),
    rates=(1e-3,),
    seeds=10,
    first_steps=300,
)
COMMON_RATE = 1e-3  # at which the ways are compared, too


def new_params(key: jax.Array) -> Any:
    """Return He et al.'s weights."""
    sizes = [64, *[WIDTH] * HIDDEN, CLASSES]
    names = [*(f"body_{i}" for i in range(HIDDEN)), "head"]
    return {
        name: new_layer(jax.random.fold_in(key, i), sizes[i], sizes[i + 1])
        for i, name in enumerate(names)
    }


def new_and_old(params: Any) -> Row:
    """Return each run's accuracy on new and on old digits that were held out."""
    _, _, x, y = digits()
    new = np.asarray(y) >= OLD
    return {
        "new": accuracies(params, x[new], y[new]),
        "old": accuracies(params, x[~new], y[~new]),
    }


def first_training(plan: Plan) -> tuple[Any, Row]:
    """Train on the old digits; return parameters and accuracies, each ``[seeds]``."""
    x, y, _, _ = digits()
    old = np.asarray(y) < OLD
    x, y = x[old], y[old]
    op = optloss.optimize_loss(cross_entropy, 0, 1e-3, "Adam", summaries=[])

    def start(seed: jax.Array) -> Any:
        return op.init(new_params(jax.random.key(seed)))

    def advance(
        seed: jax.Array, state: Any, step: jax.Array, data: Any
    ) -> tuple[Any, None]:
        x, y = data
        seen = batch_of(seed, step, 64, len(y))
        return op.update(state, x[seen], y[seen])[0], None

    seeds = jnp.arange(plan.seeds)
    state, _ = train(start, advance, seeds, (x, y), plan.first_steps, "old digits")
    return state.params, new_and_old(state.params)


def fine_tune(way: str, rows: list[Row], params: Any, steps: int) -> Row:
    """Train the rows on the new digits, all in one way; return their accuracies."""
    x, y, _, _ = digits()
    new = np.flatnonzero(np.asarray(y) >= OLD)[:NEW_IMAGES]
    x, y = x[new], y[new]

    def train_op(run: Any) -> optloss.TrainOp:
        return optloss.optimize_loss(
            cross_entropy, 0, run["rate"], "Adam", summaries=[], **WAYS[way]
        )

    def start(run: Any) -> Any:
        return train_op(run).init(run["params"])

    def advance(run: Any, state: Any, step: jax.Array, data: Any) -> tuple[Any, None]:
        x, y = data
        seen = batch_of(run["seed"], step, BATCH, NEW_IMAGES)
        return train_op(run).update(state, x[seen], y[seen])[0], None

    runs = stack(rows, "rate", "seed")
    seeds = runs["seed"]
    runs["params"] = jax.tree.map(lambda leaf: leaf[seeds], params)
    state, _ = train(start, advance, runs, (x, y), steps, way)
    return new_and_old(state.params)


def measure(plan: Plan) -> list[Row]:
    """Return both accuracies of every run, and those before the fine-tuning."""
    params, before = first_training(plan)
    rows = [
        {"way": "before", "rate": 0.0, "seed": seed}
        | {name: values[seed] for name, values in before.items()}
        for seed in range(plan.seeds)
    ]
    for way in plan.ways:
        runs = grid(way=[way], rate=plan.rates, seed=range(plan.seeds))
        found = fine_tune(way, runs, params, plan.steps)
        rows += [
            row | {name: values[i] for name, values in found.items()}
            for i, row in enumerate(runs)
        ]
    return rows


def score(rows: list[Row]) -> np.ndarray:
    """Return the mean of both accuracies of each run, in per cent."""
    return 50 * (column(rows, "new") + column(rows, "old"))


def best_rate(rows: list[Row]) -> float:
    """Return the rate of the best mean score over the even seeds."""
    choosing = [row for row in rows if row["seed"] % 2 == 0]
    rates = sorted({row["rate"] for row in rows})
    scores = [float(score(choose(choosing, rate=rate)).mean()) for rate in rates]
    return float(rates[np.argmax(scores)])


def table(rows: list[Row]) -> str:
    """Return what each way gives at one rate and at its best, over the odd seeds."""

    def cells(rows: list[Row]) -> list[str]:
        judged = [row for row in rows if row["seed"] % 2]
        return [spread(100 * column(judged, name), 1) for name in ("new", "old")] + [
            spread(score(judged), 1)
        ]

    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        runs = choose(rows, way=way)
        rate = best_rate(runs)
        new, old, _ = cells(choose(runs, rate=COMMON_RATE if rate else 0))
        lines.append(
            [
                way,
                new,
                old,
                f"{rate:g}" if rate else "",
                *cells(choose(runs, rate=rate)),
            ]
        )
    titles = [
        *("way", f"new % at {COMMON_RATE:g}", f"old % at {COMMON_RATE:g}"),
        *("best rate", "new %", "old %", "mean of both %"),
    ]
    return markdown(titles, lines)


def draw(rows: list[Row], figure: Figure) -> None:
    """Draw the mean accuracies of each way, along its rates."""
    axes = figure.subplots()
    ways = [way for way in dict.fromkeys(row["way"] for row in rows) if way != "before"]
    for i, way in enumerate(ways):
        runs = choose(rows, way=way)
        new, old = (
            [
                100 * column(choose(runs, rate=rate), name).mean()
                for rate in sorted({row["rate"] for row in runs})
            ]
            for name in ("new", "old")
        )
        style = "o--" if way.startswith("gradient") else "o-"
        axes.plot(old, new, style, color=f"C{i}", label=way)
    axes.set_xlabel("accuracy on the old digits, %")
    axes.set_ylabel("accuracy on the new digits, %")
    axes.set_title("A dot per rate, mean over the seeds")
    axes.legend(loc="lower left", fontsize=11)


if __name__ == "__main__":
    main(sys.modules[__name__], "fine_tuning")

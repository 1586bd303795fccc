"""How many elements of bfloat16 parameters does an optimizer fail to move?

    python benchmarks/evidence/precision.py

Question: a bfloat16 number has eight significant bits. An update below 1/512 of a
parameter is lost to rounding. How often does that happen with each of TensorFlow's six
optimizers, and does it cost accuracy?

Set-up: a network of two hidden layers of 64 ReLUs reads scikit-learn's digits for 1,500
steps of 32 images. It is trained three times: with float32 parameters, with bfloat16
parameters, and with float32 parameters that the loss casts to bfloat16 (kept in
float32). Each at the optimizer's own rate and at a tenth of it, with ten seeds. An
element counts as unmoved at a step if it has the same value after it. Weights of a
pixel that is 0 in a whole batch have a gradient of 0, so float32 parameters are the
baseline.

Source: no paper's table. The rates are those that train the float32 network well.
"""

import itertools
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

SIZES = (64, 64, 64, 10)
BATCH = 32
LAST = 100  # steps over which the end of a run is averaged
CURVE = 20  # points of the curve that is drawn
RATES = {
    "SGD": 0.1,
    "Momentum": 0.02,
    "Adam": 0.002,
    "Adagrad": 0.05,
    "RMSProp": 0.002,
    "Ftrl": 0.1,
}
FLOAT32, BFLOAT16, KEPT = "float32", "bfloat16", "kept in float32"


class Plan(NamedTuple):
    """Which runs are made."""

    optimizers: tuple[str, ...] = tuple(RATES)
    forms: tuple[str, ...] = (FLOAT32, BFLOAT16, KEPT)
    factors: tuple[float, ...] = (1.0, 0.1)  # of the rate
    seeds: int = 10
    steps: int = 1500


FULL = Plan()
SHORT = Plan(optimizers=("Adam",), forms=(FLOAT32, BFLOAT16), factors=(0.1,), steps=200)


def cast(tree: Any, dtype: Any) -> Any:
    """Return the tree with leaves of another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def new_params(key: jax.Array) -> Any:
    """Return He et al.'s weights."""
    return {
        f"layer_{i}": new_layer(jax.random.fold_in(key, i), *sizes)
        for i, sizes in enumerate(itertools.pairwise(SIZES))
    }


def unmoved(before: Any, after: Any) -> jax.Array:
    """Return the share of all elements that have the same value."""
    same = jax.tree.map(lambda a, b: jnp.sum(a == b), before, after)
    sizes = [leaf.size for leaf in jax.tree.leaves(after)]
    return sum(jax.tree.leaves(same)) / sum(sizes)


def train_form(name: str, form: str, rows: list[Row], steps: int) -> Row:
    """Train the rows with an optimizer and a form of parameters; return the results."""
    x, y, x_test, y_test = digits()
    compute = jnp.float32 if form == FLOAT32 else jnp.bfloat16
    stored = jnp.bfloat16 if form == BFLOAT16 else jnp.float32

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(cast(params, compute), images.astype(compute), labels)

    def train_op(run: Any) -> optloss.TrainOp:
        return optloss.optimize_loss(loss, 0, run["rate"], name, summaries=[])

    def start(run: Any) -> Any:
        params = new_params(jax.random.key(run["seed"]))
        return train_op(run).init(cast(params, stored))

    def advance(run: Any, state: Any, step: jax.Array, data: Any) -> tuple[Any, Any]:
        x, y = data
        seen = batch_of(run["seed"], step, BATCH, len(y))
        after, output = train_op(run).update(state, x[seen], y[seen])
        return after, (output.loss, unmoved(state.params, after.params))

    runs = stack(rows, "rate", "seed")
    title = f"{name}, {form}"
    state, (losses, shares) = train(start, advance, runs, (x, y), steps, title)
    curve = shares.reshape(len(rows), CURVE, -1).mean(axis=2)
    return {
        "accuracy": accuracies(cast(state.params, compute), x_test, y_test),
        "loss": losses[:, -LAST:].mean(axis=1),
        "unmoved": shares.mean(axis=1),
        "unmoved_last": shares[:, -LAST:].mean(axis=1),
    } | {f"unmoved_{i:02}": curve[:, i] for i in range(CURVE)}


def measure(plan: Plan) -> list[Row]:
    """Return accuracy, loss and the shares of unmoved elements of every run."""
    rows = []
    for name in plan.optimizers:
        for form in plan.forms:
            settings = grid(factor=plan.factors, seed=range(plan.seeds))
            runs = [
                {"optimizer": name, "form": form, "rate": RATES[name] * row["factor"]}
                | row
                for row in settings
            ]
            found = train_form(name, form, runs, plan.steps)
            rows += [
                row | {key: values[i] for key, values in found.items()}
                for i, row in enumerate(runs)
            ]
    return rows


def table(rows: list[Row]) -> str:
    """Return unmoved elements and accuracy of each optimizer and rate."""
    lines = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        for factor in sorted({row["factor"] for row in rows}, reverse=True):
            runs = choose(rows, optimizer=name, factor=factor)
            forms = [
                choose(runs, form=form)
                for form in dict.fromkeys(r["form"] for r in runs)
            ]
            lines.append(
                [
                    f'`"{name}"`',
                    f"{runs[0]['rate']:g}",
                    *(
                        f"{100 * column(some, 'unmoved_last').mean():.1f}"
                        for some in forms[:2]
                    ),
                    *(spread(100 * column(some, "accuracy"), 1) for some in forms),
                ]
            )
    forms = list(dict.fromkeys(row["form"] for row in rows))
    titles = [
        *("optimizer", "rate"),
        *(f"unmoved %, {form}" for form in forms[:2]),
        *(f"accuracy %, {form}" for form in forms),
    ]
    return markdown(titles, lines)


def draw(rows: list[Row], figure: Figure) -> None:
    """Draw the share of unmoved elements over the training."""
    steps = np.linspace(0, 1, 2 * CURVE + 1)[1::2] * FULL.steps
    panels = figure.subplots(1, 2, sharey=True)
    for axes, factor in zip(panels, sorted(FULL.factors, reverse=True), strict=True):
        for i, name in enumerate(RATES):
            for form, style in ((BFLOAT16, "-"), (FLOAT32, ":")):
                runs = choose(rows, optimizer=name, form=form, factor=factor)
                curve = [column(runs, f"unmoved_{j:02}").mean() for j in range(CURVE)]
                axes.plot(
                    steps,
                    100 * np.array(curve),
                    style,
                    color=f"C{i}",
                    label=name if form == BFLOAT16 else None,
                )
        axes.set_xlabel("step")
        axes.set_title("usual rate" if factor == 1 else f"{factor:g} of the usual rate")
    panels[0].set_ylabel("elements that did not move, %")
    panels[0].set_ylim(0, 100)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    figure.suptitle("bfloat16 (lines) and float32 (dotted)", fontsize=13)


if __name__ == "__main__":
    main(sys.modules[__name__], "precision")

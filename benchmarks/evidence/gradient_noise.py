"""Does noise on the gradient train a very deep network from a poor start?

    python benchmarks/evidence/gradient_noise.py

Question: Neelakantan et al. report that a network of 20 hidden layers learns from
weights that are all zero if Gaussian noise is added to its gradient, and does not
otherwise. Is it so?

Set-up: 20 hidden layers of 50 ReLUs on two small sets of handwritten digits, 2,500
steps of 25 images of plain SGD at the rates 0.1 and 0.01, 20 seeds each, so 40 runs per
row as in the paper. The weights start at zero (zero), from N(0, 0.1^2) (simple) or from
N(0, 2 / inputs) (good, as He et al., 2015), the biases at zero. The global norm is
clipped. The variance of the noise is eta / (1 + t)^0.55. The paper chooses eta among
0.01, 0.3 and 1.

Source: *Adding Gradient Noise Improves Learning for Very Deep Networks*, 2015,
arXiv:1511.06807, section 4.1 and table 1. The paper trained on the whole of MNIST.
"""

import itertools
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    Images,
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
    mnist,
    new_layer,
    stack,
    train,
)
from matplotlib.figure import Figure

import optloss

DATA = {"digits": digits, "MNIST": mnist}
WIDTH, CLASSES = 50, 10
BATCH = 25
ANNEALING = 0.55
LEARNED = 0.5  # accuracy above which a run counts as having learned; chance is 0.1
NONE = math.inf  # the bound that clips nothing

CELLS = [  # start, clip and eta
    *(("zero", 10, eta) for eta in (0, 0.01, 0.3, 1)),
    *(("simple", clip, eta) for clip in (NONE, 100) for eta in (0, 0.01, 0.3)),
    *(("simple", 10, eta) for eta in (0, 0.3)),
    *(("good", 10, eta) for eta in (0, 0.01, 0.3)),
]


class Plan(NamedTuple):
    """Which runs are made."""

    data: tuple[str, ...] = ("digits", "MNIST")
    layers: int = 20
    rates: tuple[float, ...] = (0.1, 0.01)
    seeds: int = 20
    steps: int = 2500
    cells: tuple[tuple[str, float, float], ...] = tuple(CELLS)


FULL = Plan()
SHORT = Plan(
    data=("digits",),
    layers=3,
    rates=(0.1,),
    seeds=10,
    steps=400,
    cells=(("zero", 10, 0), ("zero", 10, 0.3)),
)
# MNIST takes as long as the digits: it has the rows that differ most.
ON_MNIST = {
    (start, 10, eta) for start in ("zero", "simple", "good") for eta in (0, 0.3)
}

# Best and mean accuracy over 40 runs in table 1, by start, clip and whether with noise.
PAPER = {
    ("simple", NONE, False): (89.9, 43.1),
    ("simple", NONE, True): (96.7, 52.7),
    ("simple", 100, False): (90.0, 46.3),
    ("simple", 100, True): (96.7, 52.3),
    ("simple", 10, False): (95.7, 51.6),
    ("simple", 10, True): (97.0, 53.6),
    ("good", 10, False): (97.4, 91.7),
    ("good", 10, True): (97.2, 91.7),
    ("zero", 10, False): (11.4, 10.1),
    ("zero", 10, True): (94.5, 49.7),
}


def new_params(
    key: jax.Array, std: jax.Array, good: jax.Array, pixels: int, layers: int
) -> Any:
    """Return the weights: of a given deviation, or where ``good`` of He et al.'s."""
    sizes = [pixels, *[WIDTH] * layers, CLASSES]
    params = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        scale = jnp.where(good, math.sqrt(2 / inputs), std)
        key_i = jax.random.fold_in(key, i)
        params[f"layer_{i:02}"] = new_layer(key_i, inputs, outputs, scale)
    return params


def train_op(run: Any, noisy: bool) -> optloss.TrainOp:
    """Return the training step of a run, whose settings may be traced."""
    noise = optloss.add_gradient_noise(
        jnp.sqrt(run["eta"]), annealing=ANNEALING, key=jax.random.key(run["seed"])
    )
    return optloss.optimize_loss(
        cross_entropy,
        global_step=0,
        learning_rate=run["rate"],
        optimizer="SGD",
        gradient_noise_scale=noise if noisy else None,
        clip_gradients=optloss.clip_by_global_norm(run["clip"]),
        summaries=[],
    )


def final_accuracy(
    images: Images, rows: list[Row], plan: Plan, title: str
) -> jax.Array:
    """Train the rows, either all with noise or all without; return ``[rows]``."""
    pixels, noisy = images.x.shape[1], rows[0]["eta"] > 0

    def start(run: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(run["seed"]), plan.steps)
        params = new_params(key, run["std"], run["good"], pixels, plan.layers)
        return train_op(run, noisy).init(params)

    def advance(
        run: Any, state: Any, step: jax.Array, images: Images
    ) -> tuple[Any, None]:
        seen = batch_of(run["seed"], step, BATCH, len(images.y))
        op = train_op(run, noisy)
        return op.update(state, images.x[seen], images.y[seen])[0], None

    runs = stack(rows, "rate", "eta", "clip", "seed")
    runs["std"] = jnp.array([0.1 * (row["start"] == "simple") for row in rows])
    runs["good"] = jnp.array([row["start"] == "good" for row in rows])
    state, _ = train(start, advance, runs, images, plan.steps, title)
    return accuracies(state.params, images.x_test, images.y_test)


def measure(plan: Plan) -> list[Row]:
    """Return the accuracy of every run on the images held out."""
    rows = []
    for name in plan.data:
        cells = [c for c in plan.cells if name == "digits" or c in ON_MNIST]
        every: list[Row] = [
            {"data": name, "start": start, "clip": float(clip), "eta": float(eta)} | row
            for start, clip, eta in cells
            for row in grid(rate=plan.rates, seed=range(plan.seeds))
        ]
        for noisy in (False, True):
            some = [row for row in every if (row["eta"] > 0) == noisy]
            title = f"{name}, {'with' if noisy else 'without'} noise"
            found = final_accuracy(DATA[name](), some, plan, title)
            rows += [
                row | {"accuracy": got} for row, got in zip(some, found, strict=True)
            ]
    return rows


def cells_of(rows: list[Row]) -> list[tuple[Row, list[Row]]]:
    """Return what the rows of each cell have in common, and these rows."""
    keys = ("data", "start", "clip", "eta")
    names = [tuple(row[key] for key in keys) for row in rows]
    order = {"zero": 0, "simple": 1, "good": 2}
    distinct = sorted(
        dict.fromkeys(names),
        key=lambda name: (name[0] == "MNIST", order[name[1]], -(name[2] or NONE)),
    )
    cells = [dict(zip(keys, name, strict=True)) for name in distinct]
    return [(cell, choose(rows, **cell)) for cell in cells]


def table(rows: list[Row]) -> str:
    """Return best and mean accuracy of each cell, and the paper's."""
    lines = []
    for cell, runs in cells_of(rows):
        clip = cell["clip"] or NONE
        paper: tuple[object, object] = ("", "")
        if cell["eta"] in (0, 0.3):
            paper = PAPER[cell["start"], clip, cell["eta"] > 0]
        found = 100 * column(runs, "accuracy")
        fast = choose(runs, rate=0.1)
        learned = sum(row["accuracy"] > LEARNED for row in fast)
        low, high = np.percentile(100 * column(fast, "accuracy"), [10, 90])
        lines.append(
            [
                f"{cell['data']}, {cell['start']}",
                "none" if clip == NONE else f"{clip:g}",
                f"{cell['eta']:g}",
                f"{found.max():.1f}",
                f"{found.mean():.1f}",
                f"{learned} of {len(fast)}",
                f"{low:.1f} to {high:.1f}",
                *paper,
            ]
        )
    titles = [
        *("data, start", "clip", "η", "best %", "mean %"),
        *("learned at 0.1", "10th to 90th percentile at 0.1"),
        *("paper: best %", "paper: mean %"),
    ]
    return markdown(titles, lines)


def draw(rows: list[Row], figure: Figure) -> None:
    """Draw a point per run at the larger rate, without and with noise."""
    axes = figure.subplots()
    cells = [(cell, runs) for cell, runs in cells_of(rows) if cell["eta"] in (0, 0.3)]
    groups = list(
        dict.fromkeys((c["data"], c["start"], c["clip"] or NONE) for c, _ in cells)
    )
    for cell, runs in cells:
        place = groups.index((cell["data"], cell["start"], cell["clip"] or NONE))
        found = 100 * column(choose(runs, rate=0.1), "accuracy")
        noisy = cell["eta"] > 0
        places = place + (0.18 if noisy else -0.18) + np.linspace(-0.1, 0.1, len(found))
        axes.plot(
            found,
            places,
            "o",
            color="C0" if noisy else "C3",
            alpha=0.6,
            label=("with noise" if noisy else "without noise") if place == 0 else None,
        )
    clips = ["no clip" if clip == NONE else f"clip {clip:g}" for *_, clip in groups]
    names = [f"{d}, {s}, {c}" for (d, s, _), c in zip(groups, clips, strict=True)]
    axes.set_yticks(range(len(groups)), names)
    axes.invert_yaxis()
    axes.axvline(10, color="black", linestyle=":", linewidth=1)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy on held-out digits, %")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2
    )
    axes.set_title("20 hidden layers, SGD at 0.1, a dot per seed")


if __name__ == "__main__":
    main(sys.modules[__name__], "gradient_noise")

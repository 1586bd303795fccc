"""How long an update takes: optloss against an optax chain, PyTorch, and a plain copy.

    python benchmarks/bench_update.py                     every cell, some minutes
    python benchmarks/bench_update.py --cells noise/1e7/16 clip/1e6/400

Two things at a time in the order ABBA, donated buffers, fresh random gradients, ratios
of medians, and optloss against itself as the control. Cells with 400 leaves pack them.
What is measured of optloss is a training op, gradients and application included, whose
loss costs nothing: its gradient is its argument.
Prints a table, and writes the raw figures to ``benchmarks/results/``; a run of all
cells on a CPU writes the table and the plot of the documentation, too.
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from large_model import given
from timing import abba
from tqdm import tqdm

import optloss

RESULTS = Path(__file__).parent / "results"
TABLES = Path(__file__).parents[1] / "docs" / "tables"
FEATURES = ("adam", "clip", "noise", "everything")
POOL = 3  # gradients that take turns, so that no two updates in a row see the same
ROUNDS = 12
REPEATS = 3
PACK = 4096
EVERYTHING = {
    "gradient_multipliers": {"layer_0": 0.1, "layer_1": 2.0},
    "learning_rate_decay_fn": functools.partial(
        optloss.exponential_decay, decay_steps=1000, decay_rate=0.9
    ),
    "summaries": ["loss", "learning_rate", "global_gradient_norm"],
    "skip_nonfinite": True,
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the table."""

    feature: str
    parameters: int
    leaves: int

    @property
    def name(self) -> str:
        """Return for example ``noise/1e7/16``."""
        exponent = len(str(self.parameters)) - 1
        return f"{self.feature}/1e{exponent}/{self.leaves}"

    def tree(self, seed: int) -> dict[str, np.ndarray]:
        """Return random leaves ``[parameters / leaves]``."""
        random = np.random.default_rng(seed)
        size = self.parameters // self.leaves
        return {
            f"layer_{i}": random.standard_normal(size, np.float32)
            for i in range(self.leaves)
        }


def optloss_step(cell: Cell, pack: int) -> tuple[Callable, Any]:
    """Return ``step(params, state, gradients) -> params, state, seen`` and ``init``."""
    features: dict[str, Any] = {"pack_small_leaves": pack, "summaries": []}
    if cell.feature != "adam":
        features["clip_gradients"] = 1.0
    if cell.feature in ("noise", "everything"):
        features["gradient_noise_scale"] = 0.01
    if cell.feature == "everything":
        features |= EVERYTHING
    train_op = optloss.optimize_loss(
        linear if cell.feature == "everything" else given,
        global_step=0,
        learning_rate=1e-3,
        optimizer="adam",
        **features,
    )

    def step(params: Any, state: Any, gradients: Any) -> Any:
        full = optloss.TrainOpState(state[0], params, None, state[1])
        full, output = train_op.update(full, gradients)
        return full.params, (full.step, full.opt_state), output.summaries

    def init(params: Any) -> Any:
        state = train_op.init(params)
        return state.step, state.opt_state

    return step, init


def optax_step(cell: Cell) -> tuple[Callable, Any]:
    """Return the same step as an expert writes it with optax."""
    clip, adam = optax.clip_by_global_norm(1.0), optax.adam(1e-3)
    noise = optax.add_noise(1e-4, 0.0, 0)
    if cell.feature == "adam":
        return plain_step(adam), adam.init
    if cell.feature == "clip":
        tx = optax.chain(clip, adam)
        return plain_step(tx), tx.init
    if cell.feature == "noise":
        tx = optax.chain(noise, clip, adam)
        return plain_step(tx), tx.init

    def multiply(updates: Any, params: Any = None) -> Any:
        del params
        return {
            **updates,
            "layer_0": updates["layer_0"] * 0.1,
            "layer_1": updates["layer_1"] * 2.0,
        }

    schedule = optax.exponential_decay(1e-3, 1000, 0.9)
    first = optax.chain(noise, optax.stateless(multiply))
    guarded = optax.apply_if_finite(optax.adam(schedule), 10**6)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        loss, gradients = jax.value_and_grad(linear)(params, gradients)
        noisy, before = first.update(gradients, state[0], params)
        clipped, _ = clip.update(noisy, optax.EmptyState())
        updates, after = guarded.update(clipped, state[1], params)
        seen = {
            "loss": loss,
            "learning_rate": schedule(after.inner_state[0].count),
            "norm": optax.global_norm(noisy),
            "clipped": optax.global_norm(clipped),
        }
        return optax.apply_updates(params, updates), (before, after), seen

    return step, lambda params: (first.init(params), guarded.init(params))


def linear(params: Any, gradients: Any) -> jax.Array:
    """Return a loss whose gradient is ``gradients``."""
    products = jax.tree.map(jnp.vdot, params, gradients)
    return jax.tree.reduce(jnp.add, products)


def plain_step(tx: optax.GradientTransformation) -> Callable:
    """Return the step of a transform: update and apply."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, {}

    return step


class Compiled:
    """A compiled step that carries its state, and what compiling it told."""

    def __init__(self, step: Callable, init: Callable, cell: Cell, pool: list) -> None:
        self.params = jax.device_put(cell.tree(0))
        self.state = jax.jit(init)(self.params)
        self.pool, self.turn = pool, 0
        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.run = jitted.lower(self.params, self.state, pool[0]).compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporary_bytes = self.run.memory_analysis().temp_size_in_bytes

    def __call__(self) -> None:
        """Make one update."""
        self.turn = (self.turn + 1) % POOL
        gradients = self.pool[self.turn]
        self.params, self.state, seen = self.run(self.params, self.state, gradients)
        jax.block_until_ready((self.params, seen))


def torch_step(cell: Cell) -> Callable[[], None] | None:
    """Return PyTorch's fused update, or None without PyTorch or a counterpart."""
    try:
        import torch
    except ImportError:
        return None
    if cell.feature == "everything" or jax.default_backend() != "cpu":
        return None
    params = [torch.nn.Parameter(torch.tensor(v)) for v in cell.tree(0).values()]
    pool = [
        [torch.tensor(v) for v in cell.tree(seed).values()]
        for seed in range(1, POOL + 1)
    ]
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)
    turn = 0

    def step() -> None:
        nonlocal turn
        turn = (turn + 1) % POOL
        for parameter, gradient in zip(params, pool[turn], strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            if cell.feature == "noise":
                for parameter in params:
                    noise = torch.randn_like(parameter.grad)
                    parameter.grad = parameter.grad.add(noise, alpha=0.01)
            if cell.feature != "adam":
                torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()

    return step


def copy_step(cell: Cell) -> Callable[[], None]:
    """Return a copy, by all cores, of the bytes that Adam behind a clip must move."""
    if jax.default_backend() != "cpu":
        source = jnp.zeros(4 * cell.parameters)
        copy = jax.jit(lambda x, by: x + by)
        by = jnp.float32(1)
        return lambda: jax.block_until_ready(copy(source, by))
    # Read: gradient twice, parameter, two moments. Written: the last three. A copy of
    # four arrays reads four and writes four.
    cores = 2
    source = np.ones((cores, 4 * cell.parameters // cores), np.float32)
    target = np.empty_like(source)
    pool = ThreadPoolExecutor(cores)

    def step() -> None:
        list(pool.map(np.copyto, target, source))

    return step


def measure(cell: Cell) -> dict[str, Any]:
    """Return the row of a cell."""
    pack = PACK if cell.leaves > 100 else 0
    pool = [jax.device_put(cell.tree(seed)) for seed in range(1, POOL + 1)]
    ours = Compiled(*optloss_step(cell, pack), cell, pool)
    again = Compiled(*optloss_step(cell, pack), cell, pool)
    theirs = Compiled(*optax_step(cell), cell, pool)
    a, control = abba(ours, again, ROUNDS)
    ours_ms, theirs_ms = abba(ours, theirs, ROUNDS)
    row = {
        "cell": cell.name,
        "ms": ours_ms * 1e3,
        "optax_ms": theirs_ms * 1e3,
        "to_optax": ours_ms / theirs_ms,
        "control": a / control,
        "compile_s": ours.compile_seconds,
        "compile_to_optax": ours.compile_seconds / theirs.compile_seconds,
        "temporary_bytes": ours.temporary_bytes,
        "optax_temporary_bytes": theirs.temporary_bytes,
    }
    del again, theirs
    torch = torch_step(cell)
    if torch is not None:
        ours_ms, torch_ms = abba(ours, torch, ROUNDS)
        row |= {"torch_ms": torch_ms * 1e3, "to_torch": ours_ms / torch_ms}
    del torch
    ours_ms, copy_ms = abba(ours, copy_step(cell), ROUNDS)
    return row | {"copy_ms": copy_ms * 1e3, "to_copy": ours_ms / copy_ms}


def host_time(rounds: int = 200) -> dict[str, float]:
    """Return the time per call of a train_op to those of bare jitted functions.

    400 tiny leaves, so that the time is that of handing arrays in and out. The one bare
    function makes the same step, written by hand; the other adds 1 to every leaf of as
    large a tree.
    """
    params = {f"layer_{i}": np.ones(2, np.float32) for i in range(400)}
    adam = optax.adam(1e-3)

    def total(tree: Any) -> jax.Array:
        return sum(jnp.sum(leaf) for leaf in tree.values())

    def by_hand(tree: Any) -> Any:
        params, state = tree
        loss, gradients = jax.value_and_grad(total)(params)
        updates, state = adam.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def plus_one(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf + 1, tree), None

    def bare(function: Callable[[Any], Any]) -> Callable[[], None]:
        moved = jax.jit(function, donate_argnums=0)
        tree = jax.tree.map(jnp.copy, (params, adam.init(params)))

        def step() -> None:
            nonlocal tree
            tree, _ = moved(tree)
            jax.block_until_ready(tree)

        return step

    def op(pack: int) -> Callable[[], None]:
        train_op = optloss.optimize_loss(
            total,
            global_step=0,
            learning_rate=1e-3,
            optimizer="adam",
            pack_small_leaves=pack,
        )
        state = train_op.init(params)

        def step() -> None:
            nonlocal state
            state, _ = train_op(state)
            jax.block_until_ready(state)

        return step

    found = {}
    for name, pack in (("plain", 0), ("packed", PACK)):
        for function in (by_hand, plus_one):
            times = [abba(op(pack), bare(function), rounds) for _ in range(REPEATS)]
            found[f"{name}_to_{function.__name__}"] = statistics.median(
                ours / other for ours, other in times
            )
    return found


COLUMNS = {
    "cell": ("cell", "{}"),
    "to_optax": ("to optax", "{:.2f}"),
    "to_torch": ("to PyTorch", "{:.2f}"),
    "to_copy": ("to a copy", "{:.2f}"),
    "control": ("to itself", "{:.2f}"),
    "compile_s": ("compile s", "{:.1f}"),
    "compile_to_optax": ("to optax", "{:.2f}"),
    "temporary_bytes": ("temporary MB", "{:.1f}"),
    "optax_temporary_bytes": ("optax's", "{:.1f}"),
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        shown = {
            key: value / 1e6 if key.endswith("_bytes") else value
            for key, value in row.items()
        }
        texts = [
            form.format(shown[key]) if key in shown else ""
            for key, (_, form) in COLUMNS.items()
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def page(rows: list[dict[str, Any]], host: dict[str, float]) -> str:
    """Return what the documentation shows."""
    shares = {key: f"{share:.2f}" for key, share in host.items()}
    same = f"{shares['plain_to_by_hand']} | {shares['packed_to_by_hand']}"
    adds = f"{shares['plain_to_plus_one']} | {shares['packed_to_plus_one']}"
    return f"""{table(rows)}

With 400 leaves of two elements all time goes into handing arrays in and out. The time
of a call of the training op is then, as a share of that of a bare jitted function:

| the function | plain | with `pack_small_leaves` |
|---|---|---|
| makes the same step | {same} |
| only adds 1 to every leaf | {adds} |
"""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw each cell's time as a share of optax's and PyTorch's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 6), layout="constrained")  # to read at 400 px
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    for shift, key, label in (
        (-0.2, "to_optax", "optax"),
        (0.2, "to_torch", "PyTorch"),
    ):
        shares = [row.get(key, np.nan) for row in rows]
        axes.barh(places + shift, shares, 0.4, label=f"time / {label}'s")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, [row["cell"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of the other's time (less is faster)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Measure, print and write."""
    cells = [
        Cell(feature, parameters, leaves)
        for parameters in (10**6, 10**7)
        for leaves in (16, 400)
        for feature in FEATURES
    ]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in cells])
    parser.add_argument("--output", default=jax.default_backend())
    args = parser.parse_args()
    chosen = [cell for cell in cells if cell.name in args.cells]
    rows = [measure(cell) for cell in tqdm(chosen, unit="cell")]
    host = host_time()
    device = jax.devices()[0].device_kind
    about = {"device": device, "machine": platform.machine(), "jax": jax.__version__}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"update-{args.output}.json"
    path.write_text(json.dumps({"about": about, "rows": rows, "host": host}, indent=1))
    if chosen == cells and args.output == "cpu":
        (TABLES / "performance.md").write_text(page(rows, host))
        plot(rows, TABLES.parent / "_static" / "performance.png")
    print(table(rows))
    print(f"\nhost time per call, to a bare jitted function: {host}")


if __name__ == "__main__":
    main()

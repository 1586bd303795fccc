"""Whether a long run survives bad batches and kill -9, to the last bit.

    python benchmarks/soak.py                          20,000 steps, ten kills
    python benchmarks/soak.py --steps 600 --kills 2    a quick look

A small network trains with everything on, in a process of its own. Into one step in
twelve a fault is put: NaN or infinity in the batch or in the gradient alone, a gradient
1e30 times too large, a gradient of zero. The process is killed at random steps and
begun anew from its last checkpoint. In the end its parameters, the model's state and
the whole optimizer state are compared, bit for bit, with those of a straight run that
was never killed and in which the steps with NaN or infinity were left out. Prints the
figures, and writes them to ``benchmarks/results/``.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

import optloss

RESULTS = Path(__file__).parent / "results"
SEED = 6
FAULTY = 1 / 12
SKIPPED = ("NaN batch", "infinite batch", "NaN gradient", "infinite gradient")
FAULTS = (*SKIPPED, "gradient x 1e30", "zero gradient")
SLOPES = {
    "NaN gradient": np.nan,
    "infinite gradient": np.inf,
    "gradient x 1e30": 1e30,
    "zero gradient": 0.0,
}
BATCHES = {"NaN batch": np.nan, "infinite batch": np.inf}
CHECKPOINT_EVERY = 100
REPORT_EVERY = 20
LAST = "last.npz"


@dataclasses.dataclass(frozen=True)
class Soak:
    """How long, how often killed, and where its files lie."""

    steps: int
    kills: int
    folder: Path

    @functools.cached_property
    def plan(self) -> list[str]:
        """The fault of each step; ``""`` for none."""
        random = np.random.default_rng(SEED)
        faults = random.choice(FAULTS, self.steps)
        faulty = random.uniform(size=self.steps) < FAULTY
        return [str(f) if bad else "" for f, bad in zip(faults, faulty, strict=True)]

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
        """Return the inputs, the targets, and what the gradient is multiplied by."""
        fault = self.plan[step]
        x = np.random.default_rng([SEED, step]).normal(size=(16, 8)).astype(np.float32)
        y = np.sin(x.sum(1))
        x[3, 5] += BATCHES.get(fault, 0.0)
        return x, y, np.float32(SLOPES.get(fault, 1.0))


@jax.custom_vjp
def with_slope(params: Any, slope: jax.Array) -> Any:
    """Return ``params``, and make their gradient ``slope`` times as large."""
    del slope
    return params


with_slope.defvjp(
    lambda params, slope: (params, slope),
    lambda slope, g: (jax.tree.map(lambda leaf: leaf * slope, g), jnp.zeros(())),
)


def loss(
    params: Any, seen: Any, x: jax.Array, y: jax.Array, slope: jax.Array
) -> tuple[jax.Array, Any]:
    """A network with a BatchNorm, whose statistics are the model's state."""
    params = with_slope(params, slope)
    hidden = x @ params["in"]["kernel"] + params["in"]["bias"]
    mean, var = hidden.mean(0), hidden.var(0)
    hidden = jnp.tanh((hidden - mean) / jnp.sqrt(var + 1e-3) * params["scale"])
    seen = {
        "mean": 0.99 * seen["mean"] + 0.01 * mean,
        "var": 0.99 * seen["var"] + 0.01 * var,
    }
    out = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    return jnp.mean((out - y) ** 2), seen


def make_train_op() -> optloss.TrainOp:
    """Return a training op with everything on."""
    return optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=0.003,
        optimizer="Adam",
        gradient_noise_scale=optloss.add_gradient_noise(0.01, annealing=0.55, key=SEED),
        gradient_multipliers={"out/*": 0.5},
        clip_gradients=optloss.adaptive_clipping(statistics="previous"),
        learning_rate_decay_fn=functools.partial(
            optloss.exponential_decay, decay_steps=5000, decay_rate=0.5
        ),
        learning_rate_multipliers={"in/*": 2.0},
        skip_nonfinite=True,
    )


def start(train_op: optloss.TrainOp) -> optloss.TrainOpState:
    """Return the state before the first step."""
    random = np.random.default_rng(SEED)
    params = {
        "in": {"kernel": random.normal(size=(8, 32)) / 3, "bias": np.zeros(32)},
        "scale": np.ones(32),
        "out": {"kernel": random.normal(size=32) / 6, "bias": np.zeros(())},
    }
    seen = {"mean": np.zeros(32), "var": np.ones(32)}
    return train_op.init(*jax.tree.map(np.float32, (params, seen)))


def train(soak: Soak) -> None:
    """Train on from the last checkpoint, and print where it is."""
    train_op = make_train_op()
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=CHECKPOINT_EVERY, max_to_keep=2
    )
    with ocp.CheckpointManager(soak.folder / "checkpoints", options=options) as manager:
        state, done = start(train_op), manager.latest_step() or 0
        if done:
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
        print(done, flush=True)
        for step in range(done, soak.steps):
            state, _ = train_op(state, *soak.batch(step))
            manager.save(step + 1, args=ocp.args.StandardSave(state))
            if (step + 1) % REPORT_EVERY == 0:
                print(step + 1, flush=True)
    np.savez(soak.folder / LAST, *jax.tree.leaves(state))


class Life(NamedTuple):
    """One process of the disturbed run: the step it began at, and the last it told."""

    began: int
    ended: int


def live(soak: Soak, until: float, bar: tqdm) -> Life:
    """Train in a new process, and kill it soon after it has made step ``until``."""
    command = [sys.executable, __file__, "--child", str(soak.folder)]
    with (
        (soak.folder / "errors.txt").open("a") as errors,
        subprocess.Popen(
            [*command, "--steps", str(soak.steps)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as child,
    ):
        told = []
        for line in child.stdout or ():
            told.append(int(line))
            bar.update(max(told[-1] - bar.n, 0))
            if told[-1] >= until:
                # At any moment, that of a checkpoint's writing included.
                time.sleep(np.random.default_rng([SEED, told[-1]]).uniform(0, 0.3))
                child.kill()
                break
    if child.returncode not in (0, -signal.SIGKILL):
        text = (soak.folder / "errors.txt").read_text()
        raise RuntimeError(f"the run ended with code {child.returncode}:\n{text}")
    return Life(told[0], told[-1])


def disturbed_run(soak: Soak) -> list[Life]:
    """Train to the end through all kills; what is left lies in the folder."""
    random = np.random.default_rng(SEED)
    aims = sorted(random.uniform(0, 0.97 * soak.steps, soak.kills))
    with tqdm(total=soak.steps, desc="disturbed run", mininterval=1) as bar:
        return [live(soak, until, bar) for until in [*aims, math.inf]]


def straight_run(soak: Soak) -> tuple[optloss.TrainOpState, list[float]]:
    """Train without kills and without the steps that the other run had to skip."""
    train_op = make_train_op()
    state, losses = start(train_op), []
    for step in tqdm(range(soak.steps), "straight run", mininterval=1):
        if soak.plan[step] in SKIPPED:
            state = state._replace(step=state.step + 1)
        else:
            state, output = train_op(state, *soak.batch(step))
            losses.append(float(output.loss))
    return state, losses


def same_bits(one: Any, other: Any) -> bool:
    """Tell whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def compare(soak: Soak) -> dict[str, Any]:
    """Make both runs, and return what is to be told about them."""
    began = time.perf_counter()
    lives = disturbed_run(soak)
    straight, losses = straight_run(soak)
    with np.load(soak.folder / LAST) as saved:
        leaves = [saved[name] for name in saved.files]
    last = jax.tree.unflatten(jax.tree.structure(straight), leaves)
    skipped = sum(fault in SKIPPED for fault in soak.plan)
    return {
        "steps": soak.steps,
        "faults": collections.Counter(filter(None, soak.plan)),
        "killed after step": [life.ended for life in lives[:-1]],
        "went on from step": [life.began for life in lives[1:]],
        "steps made again": sum(
            before.ended - after.began for before, after in itertools.pairwise(lives)
        ),
        "step counter": int(last.step),
        "skipped": int(last.opt_state.total),
        "skips planned": skipped,
        "loss, first and last 100 steps": [
            float(np.mean(part)) for part in (losses[:100], losses[-100:])
        ],
        "same bits": {
            "parameters": same_bits(last.params, straight.params),
            "model state": same_bits(last.model_state, straight.model_state),
            "optimizer state": same_bits(
                last.opt_state.inner, straight.opt_state.inner
            ),
        },
        "seconds": round(time.perf_counter() - began),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def verdict(found: dict[str, Any]) -> bool:
    """Tell whether nothing was lost."""
    return (
        all(found["same bits"].values())
        and found["step counter"] == found["steps"]
        and found["skipped"] == found["skips planned"]
    )


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS / "soak.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        train(Soak(given.steps, given.kills, given.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Soak(given.steps, given.kills, Path(folder)))
    text = json.dumps(found, indent=2)
    print(text)
    given.results.parent.mkdir(exist_ok=True)
    given.results.write_text(text + "\n")
    if not verdict(found):
        sys.exit("something was lost")


if __name__ == "__main__":
    main()

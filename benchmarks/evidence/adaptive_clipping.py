"""Do clips that follow the run save the search for a bound, and bad batches?

    python benchmarks/evidence/adaptive_clipping.py

Question: a fixed bound has to be tuned. Chorowski et al. and their successors promise a
bound that finds itself. Does it train as well as the best fixed bound, at as many
learning rates, and with bad batches?

Set-up: a recurrent network without gates, of 48 ReLUs, predicts the next character of
Python's own documentation, in batches of 8 pieces of 40 characters, by plain SGD. Its
gradient is a product of 40 matrices and explodes. The rates are 1/8 to 4 times the
tuned one, which is the best for the bound 1. Every clip has its default settings. In
the second half of the runs one batch in a hundred is corrupted: its labels are shuffled
and its inputs are multiplied by 1,000.

A run has diverged if the loss on the text held out is in the end above that of guessing
every character with the same probability, or is not finite.

Sources: Chorowski et al., *End-to-end Continuous Speech Recognition using
Attention-based Recurrent NN*, 2014, arXiv:1412.1602, section 3.2.1
(``adaptive_clipping``); AutoClip, arXiv:2007.14469; AdaGC, arXiv:2502.11034; ZClip,
arXiv:2504.02507.
"""

import math
import sys
from collections.abc import Callable
from fractions import Fraction
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from common import (
    Row,
    batch_of,
    choose,
    column,
    grid,
    main,
    markdown,
    spread,
    stack,
    train,
)
from matplotlib.figure import Figure

import optloss

WIDTH, LENGTH, BATCH = 48, 40, 8
TUNED = 2.0
HELD_OUT = 200 * LENGTH  # characters
CORRUPTED = 1000.0

FIXED = {"bound 0.1": 0.1, "bound 1": 1.0, "bound 10": 10.0, "none": math.inf}
CLIPS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adaptive_clipping, current": optloss.adaptive_clipping,
    "adaptive_clipping, previous": lambda: optloss.adaptive_clipping(
        statistics="previous"
    ),
    "adaptive_clipping, previous, at most 10": lambda: optloss.adaptive_clipping(
        static_max_norm=10.0, statistics="previous"
    ),
    "zclip": optloss.zclip,
    "autoclip": optloss.autoclip,
    "adagc": optloss.adagc,
}
# The bound, and whether spikes are skipped.
SKIPS = {
    "skip_spikes": math.inf,
    "skip_spikes and bound 1": 1.0,
    "skip_spikes and bound 10": 10.0,
}
GUARDED = "with skip_spikes"  # the kind of these
SHORTER = {  # in the table and the picture
    "adaptive_clipping, current": "adaptive, current",
    "adaptive_clipping, previous": "adaptive, previous",
    "adaptive_clipping, previous, at most 10": "adaptive, at most 10",
    "skip_spikes and bound 1": "skip_spikes, bound 1",
    "skip_spikes and bound 10": "skip_spikes, bound 10",
}


class Plan(NamedTuple):
    """Which runs are made."""

    clips: tuple[str, ...] = (*FIXED, *CLIPS, *SKIPS)
    rates: tuple[float, ...] = (0.125, 0.25, 0.5, 1, 2, 4)  # times the tuned one
    corrupted: tuple[float, ...] = (0.0, 0.01)  # share of the batches
    seeds: int = 10
    steps: int = 500


FULL = Plan()
SHORT = Plan(
    clips=("none", "bound 1", "autoclip"),
    rates=(0.25,),
    corrupted=(0.05,),
    steps=200,
)


def load_text() -> tuple[np.ndarray, int]:
    """Return the text as indices into its characters, and how many there are."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    characters, indices = np.unique(codes, return_inverse=True)
    return indices.astype(np.int32), len(characters)


TEXT, CHARACTERS = load_text()
GUESSING = math.log(CHARACTERS)


def new_params(key: jax.Array) -> Any:
    """Return the weights of the network."""

    def normal(place: int, shape: tuple[int, int], std: float) -> jax.Array:
        return std * jax.random.normal(jax.random.fold_in(key, place), shape)

    return {
        "embed": normal(0, (CHARACTERS, WIDTH), 0.5),
        "recur": {
            "kernel": 0.5 * jnp.eye(WIDTH) + normal(1, (WIDTH, WIDTH), 0.05),
            "bias": jnp.zeros(WIDTH),
        },
        "read": {
            "kernel": normal(2, (WIDTH, CHARACTERS), 0.02),
            "bias": jnp.zeros(CHARACTERS),
        },
    }


def loss(
    params: Any, text: jax.Array, labels: jax.Array, scale: jax.Array
) -> jax.Array:
    """Return the cross-entropy per character, in nats."""

    def step(hidden: jax.Array, character: jax.Array) -> tuple[jax.Array, jax.Array]:
        entering = scale * params["embed"][character] + params["recur"]["bias"]
        hidden = jax.nn.relu(hidden @ params["recur"]["kernel"] + entering)
        return hidden, hidden

    _, hidden = jax.lax.scan(step, jnp.zeros((len(text), WIDTH)), text.T)
    logits = hidden @ params["read"]["kernel"] + params["read"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.T).mean()


def train_op(run: Any, kind: str) -> optloss.TrainOp:
    """Return the training step of a run, whose settings may be traced."""
    if kind in CLIPS:
        transform = CLIPS[kind]()
    else:
        transform = optloss.clip_by_global_norm(run["bound"])
    return optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=run["rate"],
        optimizer="SGD",
        clip_gradients=transform,
        skip_spikes=True if kind == GUARDED else None,
        summaries=["global_gradient_norm"],
        name="",
    )


def pieces(text: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return pieces of the text and the characters that follow each of theirs."""
    piece = text[starts[:, None] + jnp.arange(LENGTH + 1)]
    return piece[:, :-1], piece[:, 1:]


def batch_at(run: Any, text: jax.Array, step: jax.Array) -> tuple[jax.Array, ...]:
    """Return a batch and the factor of its inputs."""
    starts = batch_of(run["seed"], step, BATCH, len(text) - LENGTH)
    inputs, labels = pieces(text, starts)
    key = jax.random.fold_in(jax.random.key(run["seed"] + 1_000_000), step)
    which, order = jax.random.split(key)
    bad = jax.random.uniform(which) < run["corrupted"]
    shuffled = jax.random.permutation(order, labels.reshape(-1)).reshape(labels.shape)
    return inputs, jnp.where(bad, shuffled, labels), jnp.where(bad, CORRUPTED, 1.0)


def kind_of(clip: str) -> str:
    """Return what a clip shares its program with: bounds differ in a number alone."""
    if clip in CLIPS:
        return clip
    return GUARDED if clip in SKIPS else "fixed bounds"


def train_kind(kind: str, rows: list[Row], steps: int) -> list[Row]:
    """Train the rows, whose clips are of one kind, and return what they gave."""
    held_out, text = jnp.asarray(TEXT[:HELD_OUT]), jnp.asarray(TEXT[HELD_OUT:])

    def start(run: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(run["seed"]), steps)
        return train_op(run, kind).init(new_params(key))

    def advance(
        run: Any, state: Any, step: jax.Array, text: jax.Array
    ) -> tuple[Any, Any]:
        batch = batch_at(run, text, step)
        state, output = train_op(run, kind).update(state, *batch)
        return state, output.summaries["global_norm/gradient_norm"]

    def result(state: Any) -> Row:
        test = pieces(held_out, jnp.arange(0, HELD_OUT - LENGTH, LENGTH))
        found = optloss.get_summaries(state)
        return {
            "loss": loss(state.params, *test, jnp.float32(1)),
            "clipped": found["clipped_share"],
            "skipped": found.get("skipped/total", jnp.int32(0)) / steps,
        }

    runs = stack(rows, "rate", "corrupted", "bound", "seed")
    state, norms = train(start, advance, runs, text, steps, kind)
    found = jax.device_get(jax.jit(jax.vmap(result))(state))
    found["largest_norm"] = norms.max(axis=1)
    return [
        row | {name: values[i] for name, values in found.items()}
        for i, row in enumerate(rows)
    ]


def measure(plan: Plan) -> list[Row]:
    """Return each run's loss, and the shares of its updates clipped and skipped."""
    settings = grid(
        corrupted=plan.corrupted,
        rate=[TUNED * rate for rate in plan.rates],
        seed=range(plan.seeds),
    )
    rows = []
    for kind in dict.fromkeys(kind_of(clip) for clip in plan.clips):
        runs = [
            {"clip": clip, "bound": (FIXED | SKIPS).get(clip, math.inf)} | row
            for clip in plan.clips
            if kind_of(clip) == kind
            for row in settings
        ]
        rows += train_kind(kind, runs, plan.steps)
    return rows


def diverged(rows: list[Row]) -> np.ndarray:
    """Tell which runs are in the end worse than guessing."""
    losses = column(rows, "loss")
    return ~(losses < GUESSING)


def table(rows: list[Row]) -> str:
    """Return, for each clip, how it went at each rate, without and with bad batches."""
    rates = sorted({row["rate"] for row in rows})
    texts = []
    for corrupted in sorted({row["corrupted"] for row in rows}):
        lines = []
        for clip in dict.fromkeys(row["clip"] for row in rows):
            runs = choose(rows, clip=clip, corrupted=corrupted)
            cells = []
            for rate in rates:
                some = choose(runs, rate=rate)
                lost = diverged(some)
                text = spread(column(some, "loss")[~lost], 2)
                cells.append(f"{text} ({lost.sum()})" if lost.any() else text)
            kept = ~diverged(runs)
            for name in ("clipped", "skipped"):
                share = 100 * column(runs, name)[kept]
                cells.append(f"{share.mean():.1f}" if kept.any() else "-")
            lines.append([SHORTER.get(clip, clip), *cells])
        titles = [
            "clip",
            *(f"x {Fraction(rate / TUNED)}" for rate in rates),
            "clipped %",
            "skipped %",
        ]
        share = f"{100 * corrupted:g} % of the batches corrupted"
        texts.append(f"{share if corrupted else 'Clean batches'}:\n\n")
        texts.append(markdown(titles, lines) + "\n")
    return "".join(texts).rstrip("\n") + "\n"


def median_loss(rows: list[Row]) -> float:
    """Return the median loss, NaN if half of the runs diverged or more."""
    lost = diverged(rows)
    losses = np.where(lost, np.inf, column(rows, "loss"))
    return float(np.median(losses)) if lost.mean() < 0.5 else math.nan


def draw(rows: list[Row], figure: Figure) -> None:
    """Draw the median loss of each clip at each rate; black where half diverged."""
    clips = list(dict.fromkeys(row["clip"] for row in rows))
    rates = sorted({row["rate"] for row in rows})
    shares = sorted({row["corrupted"] for row in rows})
    colours = mpl.colormaps["viridis_r"].with_extremes(bad="black")
    panels = figure.subplots(1, len(shares), sharey=True)
    for axes, corrupted in zip(panels, shares, strict=True):
        medians = [
            [
                median_loss(choose(rows, clip=clip, rate=rate, corrupted=corrupted))
                for rate in rates
            ]
            for clip in clips
        ]
        image = axes.imshow(medians, colours, aspect="auto", vmin=2.1, vmax=3.2)
        axes.grid(visible=False)
        axes.set_xticks(
            range(len(rates)), [str(Fraction(rate / TUNED)) for rate in rates]
        )
        axes.set_xlabel("rate / tuned rate")
        axes.set_title(f"{100 * corrupted:g} % corrupted" if corrupted else "clean")
    panels[0].set_yticks(range(len(clips)), [SHORTER.get(clip, clip) for clip in clips])
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.6, aspect=30)
    bar.set_label("loss, nats per character; black: half diverged")


if __name__ == "__main__":
    main(sys.modules[__name__], "adaptive_clipping")

"""The main job on real data: a network with BatchNorm learns to read digits.

``python -m optloss`` trains a small Flax network on scikit-learn's 1,797 images of
handwritten digits with everything on: noise, multipliers, adaptive clipping, a decaying
rate, summaries and, if asked, checkpoints. It is a program to look at and to copy from.
"""

import argparse
import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from matplotlib.figure import Figure
from sklearn import datasets
from tqdm import tqdm

import optloss
from optloss.integrations.tensorboard import SummaryWriter
from optloss.typing import Clip, PyTree

BATCH = 64
LOOK_EVERY = 10
SAVE_EVERY = 100
Images = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Manager: TypeAlias = ocp.CheckpointManager | None


class Digits(NamedTuple):
    """Images ``[n, 8, 8, 1]`` and labels ``[n]``, to train on and held out."""

    images: Images
    labels: Images
    held_out_images: Images
    held_out_labels: Images


class Look(NamedTuple):
    """What the picture shows of a step."""

    step: int
    loss: float
    rate: float
    norm: float
    threshold: float


class Net(nn.Module):
    """Two convolutions with BatchNorm and a head."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits ``[n, 10]`` of images ``[n, 8, 8, 1]``."""
        for i, features in enumerate((16, 32)):
            x = nn.Conv(features, (3, 3), strides=1 + i, name=f"conv_{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"norm_{i}")(x)
            x = nn.relu(x)
        x = nn.relu(nn.Dense(64, name="dense")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


NET = Net()


def main(argv: list[str] | None = None) -> int:
    """Train, and say where to look; return the exit status."""
    args = parse(argv)
    digits = load_digits(args.seed)
    train_op = make_train_op(args)
    variables = NET.init(jax.random.key(args.seed), digits.images[:1], train=True)
    state = train_op.init(variables["params"], variables["batch_stats"])
    print(train_op.describe(state.params), end="\n\n")

    manager = open_checkpoints(args.checkpoint)
    state = restore(manager, state)
    state, history = train(train_op, state, digits, args, manager)
    save(manager, state)

    correct = accuracy(state, digits)
    print(f"\nheld-out accuracy: {correct:.2%} of {len(digits.held_out_labels)} images")
    print(f"TensorBoard events: {args.logdir}   (tensorboard --logdir {args.logdir})")
    if history:
        print(f"picture:            {draw(history, args.logdir / 'training.png')}")
    if manager:
        print(f"checkpoint:         {args.checkpoint} at step {state.step}")
    return 0


def load_digits(seed: int) -> Digits:
    """Return the bundled digits, a third of them held out."""
    bunch: Any = datasets.load_digits()
    images = (bunch.images[..., None] / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    held_out, kept = np.split(order, [len(order) // 3])
    labels = bunch.target.astype(np.int32)
    return Digits(images[kept], labels[kept], images[held_out], labels[held_out])


def loss(
    params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, PyTree]:
    """Return the cross-entropy of a batch, and the statistics BatchNorm moved."""
    logits, moved = NET.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), moved["batch_stats"]


def make_train_op(args: argparse.Namespace) -> optloss.TrainOp:
    """Return the whole training step, from the flags."""
    try:
        return optloss.optimize_loss(
            loss,
            global_step=0,
            learning_rate=args.learning_rate,
            optimizer=args.optimizer,
            gradient_noise_scale=args.noise,
            gradient_multipliers={"**/bias": 0.5},
            clip_gradients=args.clip,
            learning_rate_decay_fn=functools.partial(
                optloss.exponential_decay, decay_steps=100, decay_rate=0.8
            ),
            learning_rate_multipliers={"head/*": 0.5},
            summaries=["loss", "learning_rate", "global_gradient_norm", "gradients"],
            histogram_every=50,
            skip_nonfinite=True,
            seed=args.seed,
        )
    except ValueError as error:
        refuse(str(error))


def train(
    train_op: optloss.TrainOp,
    state: optloss.TrainOpState,
    digits: Digits,
    args: argparse.Namespace,
    manager: Manager,
) -> tuple[optloss.TrainOpState, list[Look]]:
    """Make the steps that are left, or those before a Ctrl-C."""
    history: list[Look] = []
    first = step_of(state)
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step")
    with SummaryWriter(args.logdir) as writer, interruptions() as interrupted:
        for step in bar:
            state, output = train_op(state, *batch(digits, args.seed, step))
            measured = output.summaries | optloss.get_summaries(state)
            writer.write(step, measured)
            if step % LOOK_EVERY == 0:
                history.append(look(step, measured))
                bar.set_postfix(loss=history[-1].loss, rate=f"{history[-1].rate:.1e}")
            if step % SAVE_EVERY == SAVE_EVERY - 1:
                save(manager, state)
            if interrupted.is_set():
                bar.close()
                print(f"interrupted after step {step}", file=sys.stderr)
                break
    return state, history


@contextlib.contextmanager
def interruptions() -> Generator[threading.Event]:
    """Turn a Ctrl-C into an event: a step under way owns the only copy of the state."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def batch(digits: Digits, seed: int, step: int) -> tuple[Images, Images]:
    """Return the batch of a step: a function of seed and step, so that runs resume."""
    epoch, place = divmod(step, len(digits.labels) // BATCH)
    order = np.random.default_rng([seed, epoch]).permutation(len(digits.labels))
    rows = order[place * BATCH : (place + 1) * BATCH]
    return digits.images[rows], digits.labels[rows]


def look(step: int, measured: Mapping[str, object]) -> Look:
    """Fetch what the picture and the progress bar show."""
    tags = (
        "OptimizeLoss/loss",
        "OptimizeLoss/learning_rate",
        "OptimizeLoss/global_norm/gradient_norm",
        "global_norm/adaptive_max_gradient_norm",
    )
    values = jax.device_get([measured.get(tag, np.inf) for tag in tags])
    return Look(step, *map(float, values))


def step_of(state: optloss.TrainOpState) -> int:
    """Return how many steps were made."""
    return int(jnp.asarray(state.step))


def open_checkpoints(folder: Path | None) -> Manager:
    """Return what saves into ``folder`` and restores from it, if one is given."""
    if folder is None:
        return None
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def restore(manager: Manager, state: optloss.TrainOpState) -> optloss.TrainOpState:
    """Return the latest saved state, or ``state`` if there is none."""
    if manager is None or manager.latest_step() is None:
        return state
    target = ocp.args.StandardRestore(state)
    restored: Any = manager.restore(manager.latest_step(), args=target)
    print(f"goes on from step {restored.step}\n")
    return optloss.TrainOpState(*restored)


def save(manager: Manager, state: optloss.TrainOpState) -> None:
    """Save ``state``, unless its step is saved already, and wait until it is."""
    if manager is None or step_of(state) == manager.latest_step():
        return
    manager.save(step_of(state), args=ocp.args.StandardSave(state), force=True)
    manager.wait_until_finished()


def accuracy(state: optloss.TrainOpState, digits: Digits) -> float:
    """Return the share of held-out images that are read right."""
    variables = {"params": state.params, "batch_stats": state.model_state}
    logits = jnp.asarray(NET.apply(variables, digits.held_out_images, train=False))
    return float(jnp.mean(logits.argmax(axis=-1) == digits.held_out_labels))


def draw(history: list[Look], path: Path) -> Path:
    """Draw the loss, the rate, and the gradient's norm against the clip's threshold."""
    step, loss, rate, norm, threshold = np.array(history).T
    figure = Figure(figsize=(7, 7), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True)
    top.semilogy(step, loss, color="C0")
    top.set_ylabel("loss")
    middle.plot(step, rate, color="C2")
    middle.set_ylabel("learning rate")
    bottom.semilogy(step, norm, color="C1", label="gradient norm")
    if np.isfinite(threshold).any():
        bottom.semilogy(step, threshold, color="C3", label="adaptive threshold")
    bottom.set_ylabel("global norm")
    bottom.set_xlabel("step")
    bottom.legend()
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    top.set_title("Training on handwritten digits")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


class OneLineParser(argparse.ArgumentParser):
    """A parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and leave."""
        refuse(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags; refuse bad ones in one line, with exit status 2."""
    parser = OneLineParser("python -m optloss", description=__doc__)
    parser.add_argument("--steps", type=whole(1), default=600)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--optimizer", default="adam", help="a name, with keywords")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--noise", type=float, default=3e-4, help="std on the gradient")
    parser.add_argument(
        "--clip",
        type=clip,
        default="adaptive",
        help="'adaptive', 'none' or the largest norm",
    )
    parser.add_argument("--logdir", type=Path, default=Path("runs/digits"))
    parser.add_argument(
        "--checkpoint", type=Path, help="save here, and go on from here"
    )
    return parser.parse_args(argv)


def whole(least: int) -> Callable[[str], int]:
    """Return a parser of integers of at least ``least``."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return integer


def clip(text: str) -> Clip:
    """Return what ``clip_gradients`` takes for a flag's text."""
    if text == "adaptive":
        return optloss.adaptive_clipping(statistics="previous")
    return None if text == "none" else float(text)


def refuse(message: str) -> NoReturn:
    """Say what is wrong in one line, and leave."""
    print(f"optloss: {message}", file=sys.stderr)
    sys.exit(2)

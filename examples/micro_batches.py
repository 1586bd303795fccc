"""
Micro-batches from a loader
===========================

A loader yields batches that fit into memory, and four of them make one step. The clip
and the optimizer run once, on the mean gradient::

    python examples/micro_batches.py --steps 200
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/micro_batches.png'

import argparse
import itertools

import jax
import numpy as np
import optax
from sklearn import datasets

import optloss

SLICES, HELD_OUT = 4, 300


def network(params, images):
    return jax.nn.relu(images @ params["in"]) @ params["out"]


def loss(params, images, labels):
    logits = network(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loader(images, labels, size):
    random = np.random.default_rng(0)
    while True:
        rows = random.integers(len(images), size=size)
        yield images[rows], labels[rows]


def joined(loader):
    """Yield the examples of several micro-batches in one; slice i is every fourth."""
    while pieces := list(itertools.islice(loader, SLICES)):
        yield [
            np.stack(part, axis=1).reshape(-1, *part[0].shape[1:])
            for part in zip(*pieces, strict=True)
        ]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train on digits in micro-batches.")
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(argv).steps
    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = np.float32(images / 16), labels.astype(np.int32)
    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=1e-2,
        optimizer="adam",
        clip_gradients=1.0,
        value_and_grad=optloss.accumulate_gradients(SLICES),
    )
    random = np.random.default_rng(1)
    kernels = [np.float32(random.normal(size=(64, n)) / 8) for n in (64, 10)]
    state = train_op.init({"in": kernels[0], "out": kernels[1]})
    batches = joined(loader(images[HELD_OUT:], labels[HELD_OUT:], size=16))
    for batch in itertools.islice(batches, steps):
        state, output = train_op(state, *batch)

    logits = network(state.params, images[:HELD_OUT])
    accuracy = np.mean(logits.argmax(-1) == labels[:HELD_OUT])
    print(
        f"step {state.step}: loss {output.loss:.3f}, held-out accuracy {accuracy:.1%}"
    )
    return accuracy


if __name__ == "__main__":
    main()

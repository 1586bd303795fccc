"""
Digits with Flax nnx
====================

The same task with an nnx module: ``optimize_loss`` of ``optloss.integrations.nnx``
takes the model itself and updates it in place, with its BatchNorm statistics and the
random stream of its dropout::

    python examples/digits_nnx.py --steps 400
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/digits_nnx.png'

import argparse
from functools import partial

import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import optloss
from optloss.integrations.nnx import optimize_loss


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv_0 = nnx.Conv(1, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm_0 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv_1 = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm_0(self.conv_0(x)))
        x = nnx.relu(self.norm_1(self.conv_1(x)))
        return self.head(self.dropout(x.reshape(len(x), -1)))


def loss(model, images, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
    return losses.mean()


def evaluate(model, images, labels):
    model.eval()  # BatchNorm uses its statistics, Dropout drops nothing
    accuracy = np.mean(model(images).argmax(-1) == labels)
    model.train()
    return accuracy


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train on digits, with Flax nnx.")
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args(argv).steps

    bunch = datasets.load_digits()
    images = (bunch.images[..., None] / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    random, held_out = np.random.default_rng(0), 300

    model = Net(nnx.Rngs(0))
    op = optimize_loss(
        model,
        loss,
        global_step=0,
        learning_rate=3e-3,
        optimizer="adamw(weight_decay=0.01)",
        clip_gradients=optloss.adaptive_clipping(),
        learning_rate_decay_fn=partial(optloss.cosine_decay, decay_steps=steps),
        skip_nonfinite=True,
    )
    print(op.describe())

    for step in range(steps):
        batch = random.integers(held_out, len(images), size=64)
        output = op(images[batch], labels[batch])
        if step % 100 == 0 or step == steps - 1:
            norm = optloss.get_summaries(op.state)["global_norm/gradient_norm"]
            accuracy = evaluate(model, images[:held_out], labels[:held_out])
            print(f"step {step:4}: loss {output.loss:.3f}, gradient norm {norm:.3f}")
            print(f"           held-out accuracy: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()

"""
Digits with Flax linen
======================

A small convolutional network with BatchNorm and dropout learns to read scikit-learn's
1,797 handwritten digits. The statistics of BatchNorm are the ``model_state``; the key
of the dropout is passed with the batch::

    python examples/digits_linen.py --steps 400
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/digits_linen.png'

import argparse
from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn import datasets

import optloss


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


net = Net()


def loss(params, batch_stats, images, labels, key):
    logits, moved = net.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), moved["batch_stats"]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train on digits, with Flax linen.")
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args(argv).steps

    bunch = datasets.load_digits()
    images = (bunch.images[..., None] / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    random, held_out = np.random.default_rng(0), 300

    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=3e-3,
        optimizer="adamw(weight_decay=0.01)",
        clip_gradients=optloss.adaptive_clipping(),
        learning_rate_decay_fn=partial(optloss.cosine_decay, decay_steps=steps),
        skip_nonfinite=True,
    )
    variables = net.init(jax.random.key(0), images[:1], train=False)
    state = train_op.init(variables["params"], variables["batch_stats"])
    print(train_op.describe(state.params))

    keys = jax.random.split(jax.random.key(1), steps)
    for step in range(steps):
        batch = random.integers(held_out, len(images), size=64)
        state, output = train_op(state, images[batch], labels[batch], keys[step])
        if step % 100 == 0 or step == steps - 1:
            norm = optloss.get_summaries(state)["global_norm/gradient_norm"]
            print(f"step {step:4}: loss {output.loss:.3f}, gradient norm {norm:.3f}")

    trained = {"params": state.params, "batch_stats": state.model_state}
    logits = net.apply(trained, images[:held_out], train=False)
    accuracy = np.mean(logits.argmax(-1) == labels[:held_out])
    print(f"held-out accuracy: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()

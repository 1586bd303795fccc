"""
Training in float16
===================

The network computes in float16, whose largest number is 65,504 and whose smallest is
6e-8. The loss is multiplied by a scale that follows the run. Here it starts too high:
the first steps overflow, are skipped and halve it. Later it grows again::

    python examples/float16_digits.py --steps 400
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/float16_digits.png'

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import optloss


def network(params, images):
    x = images.astype(jnp.float16)
    for i, layer in enumerate(params):
        kernel, bias = (layer[name].astype(jnp.float16) for name in ("kernel", "bias"))
        x = x @ kernel + bias
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def loss(params, images, labels):
    logits = network(params, images).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def start(random, sizes=(64, 128, 64, 10)):
    def layer(n, m):
        kernel = np.float32(random.normal(size=(n, m)) * np.sqrt(2 / n))
        return {"kernel": kernel, "bias": np.zeros(m, np.float32)}

    return [layer(*pair) for pair in itertools.pairwise(sizes)]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train on digits in float16.")
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args(argv).steps

    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = np.float32(images / 16), labels.astype(np.int32)
    random, held_out = np.random.default_rng(0), 300

    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=1e-3,
        optimizer="adam",
        clip_gradients=1.0,
        loss_scale=optloss.dynamic_loss_scale(2.0**24, growth_interval=50),
    )
    state = train_op.init(start(random))
    for step in range(steps):
        batch = random.integers(held_out, len(images), size=64)
        state, output = train_op(state, images[batch], labels[batch])
        if step % 50 == 0 or step == steps - 1:
            seen = optloss.get_summaries(state)
            scale, skipped = seen["loss_scale"], int(seen["skipped/total"])
            print(f"step {step:4}: loss {output.loss:.3f}, scale {scale}, {skipped=}")

    logits = network(state.params, images[:held_out])
    accuracy = np.mean(logits.argmax(-1) == labels[:held_out])
    print(f"held-out accuracy: {accuracy:.1%}")
    return accuracy, skipped


if __name__ == "__main__":
    main()

"""
An averaged generative model
============================

A small diffusion model learns to remove noise from scikit-learn's digits. The moving
average of its parameters has the lower loss, and is what to draw samples with::

    python examples/averaged_diffusion.py --steps 2000
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/averaged_diffusion.png'

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

import optloss


def denoiser(params, noisy, angle):
    """Predict the noise in images ``[n, 64]`` at the angles ``[n, 1]``."""
    features = [f(k * angle) for k in (1, 2, 4) for f in (jnp.sin, jnp.cos)]
    x = jnp.concatenate([noisy, *features], axis=-1)
    for layer in params[:-1]:
        x = jax.nn.silu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss(params, images, key):
    keys = jax.random.split(key)
    noise = jax.random.normal(keys[0], images.shape)
    # From the image alone at 0 to noise alone at pi / 2.
    angle = jax.random.uniform(keys[1], (len(images), 1), maxval=jnp.pi / 2)
    noisy = jnp.cos(angle) * images + jnp.sin(angle) * noise
    return jnp.mean((denoiser(params, noisy, angle) - noise) ** 2)


def start(random, sizes=(64 + 6, 256, 256, 64)):
    def layer(n, m):
        kernel = np.float32(random.normal(size=(n, m)) / np.sqrt(n))
        return {"kernel": kernel, "bias": np.zeros(m, np.float32)}

    return [layer(*pair) for pair in itertools.pairwise(sizes)]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train a diffusion model on digits.")
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args(argv).steps

    images = np.float32(datasets.load_digits().data / 8 - 1)
    random, held_out = np.random.default_rng(0), 300

    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=3e-3,
        optimizer="adam",
        clip_gradients=1.0,
        moving_average=0.99,
    )
    state = train_op.init(start(random))
    for key in jax.random.split(jax.random.key(0), steps):
        batch = random.integers(held_out, len(images), size=64)
        state, _ = train_op(state, images[batch], key)

    # The same noise for both, forty draws for each image.
    many = np.tile(images[:held_out], (40, 1))
    held_out_loss = jax.jit(lambda params: loss(params, many, jax.random.key(1)))
    latest = held_out_loss(state.params)
    average = held_out_loss(train_op.averaged(state))
    print(f"held-out loss: {latest:.4f}, of the averaged parameters {average:.4f}")
    return float(latest), float(average)


if __name__ == "__main__":
    main()

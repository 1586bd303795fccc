"""
Digits with Equinox
===================

The same task with Equinox, which needs no integration. Its modules are trees:
``eqx.partition`` separates the arrays to train, and ``eqx.combine`` puts them back
inside the loss. The ``State`` that its BatchNorm returns is the ``model_state``::

    python examples/digits_equinox.py --steps 400
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/digits_equinox.png'

import argparse
from functools import partial

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn import datasets

import optloss


class Net(eqx.Module):
    convs: list
    norms: list
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.convs = [
            eqx.nn.Conv2d(1, 16, 3, 2, 1, use_bias=False, key=keys[0]),
            eqx.nn.Conv2d(16, 32, 3, 2, 1, use_bias=False, key=keys[1]),
        ]
        self.norms = [
            eqx.nn.BatchNorm(n, "batch", mode="batch", momentum=0.9) for n in (16, 32)
        ]
        self.dropout = eqx.nn.Dropout(0.2)
        self.head = eqx.nn.Linear(128, 10, key=keys[2])

    def __call__(self, x, state, key=None):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x, state = norm(conv(x), state)
            x = jax.nn.relu(x)
        return self.head(self.dropout(x.reshape(-1), key=key)), state


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train on digits, with Equinox.")
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args(argv).steps

    bunch = datasets.load_digits()
    images = (bunch.images[:, None] / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    random, held_out = np.random.default_rng(0), 300

    model, model_state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, model_state, images, labels, key):
        model = eqx.combine(params, static)
        keys = jax.random.split(key, len(images))
        batched = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
        logits, model_state = batched(images, model_state, keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), model_state

    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=3e-3,
        optimizer="adamw(weight_decay=0.01)",
        clip_gradients=optloss.adaptive_clipping(),
        learning_rate_decay_fn=partial(optloss.cosine_decay, decay_steps=steps),
        skip_nonfinite=True,
    )
    state = train_op.init(params, model_state)
    print(train_op.describe(state.params))

    keys = jax.random.split(jax.random.key(1), steps)
    for step in range(steps):
        batch = random.integers(held_out, len(images), size=64)
        state, output = train_op(state, images[batch], labels[batch], keys[step])
        if step % 100 == 0 or step == steps - 1:
            norm = optloss.get_summaries(state)["global_norm/gradient_norm"]
            print(f"step {step:4}: loss {output.loss:.3f}, gradient norm {norm:.3f}")

    trained = eqx.nn.inference_mode(eqx.combine(state.params, static))
    logits, _ = jax.vmap(trained, (0, None))(images[:held_out], state.model_state)
    accuracy = np.mean(logits.argmax(-1) == labels[:held_out])
    print(f"held-out accuracy: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()

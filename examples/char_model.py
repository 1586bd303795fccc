"""
A character model that explodes without the clip
================================================

A recurrent network without gates learns to write Python's documentation, character by
character; the text comes with Python. Its gradient is a product of 100 matrices, so it
is sometimes huge: within 20 steps of plain SGD everything is NaN. The usual cure is to
clip the norm::

    python examples/char_model.py                 # the norm is clipped at 1
    python examples/char_model.py --clip none     # watch it explode
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/char_model.png'

import argparse
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optloss

WIDTH, LENGTH, BATCH = 96, 100, 16


def load_text():
    """Return the text as indices into its characters, and the characters."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    text = "".join(c if c.isascii() else "?" for c in text)
    characters = sorted(set(text))
    indices = np.zeros(128, np.int32)
    indices[[ord(c) for c in characters]] = np.arange(len(characters))
    return indices[np.frombuffer(text.encode("ascii"), np.uint8)], characters


def new_params(key, characters):
    keys = jax.random.split(key, 3)
    return {
        "embed": 0.5 * jax.random.normal(keys[0], (characters, WIDTH)),
        "recur": {
            "kernel": 0.5 * jnp.eye(WIDTH)
            + 0.05 * jax.random.normal(keys[1], (WIDTH, WIDTH)),
            "bias": jnp.zeros(WIDTH),
        },
        "read": {
            "kernel": 0.02 * jax.random.normal(keys[2], (WIDTH, characters)),
            "bias": jnp.zeros(characters),
        },
    }


def advance(params, hidden, character):
    recur, read = params["recur"], params["read"]
    total = hidden @ recur["kernel"] + params["embed"][character] + recur["bias"]
    hidden = jax.nn.relu(total)
    return hidden, hidden @ read["kernel"] + read["bias"]


def loss(params, text):
    def step(hidden, character):
        return advance(params, hidden, character)

    _, logits = jax.lax.scan(step, jnp.zeros((len(text), WIDTH)), text[:, :-1].T)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:].T)
    return losses.mean()


def write(params, characters, length=200, seed=0):
    def step(carry, key):
        hidden, logits = advance(params, *carry)
        character = jax.random.categorical(key, logits)
        return (hidden, character), character

    start = jnp.zeros(WIDTH), jnp.array(characters.index("\n"))
    _, written = jax.lax.scan(
        step, start, jax.random.split(jax.random.key(seed), length)
    )
    return "".join(characters[i] for i in written)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train a character model.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--clip", default="1.0", help="a number, or none")
    args = parser.parse_args(argv)

    text, characters = load_text()
    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=0.5,
        optimizer="SGD",
        clip_gradients=None if args.clip == "none" else float(args.clip),
        summaries=["global_gradient_norm"],
        name="",
    )
    state = train_op.init(new_params(jax.random.key(0), len(characters)))
    print(train_op)

    random, losses = np.random.default_rng(0), []
    for step in range(args.steps):
        starts = random.integers(len(text) - LENGTH, size=BATCH)
        batch = text[starts[:, None] + np.arange(LENGTH + 1)]
        state, output = train_op(state, batch)
        losses.append(output.loss)
        if step % 100 == 0 or step == args.steps - 1:
            norm = output.summaries["global_norm/gradient_norm"]
            print(f"step {step:4}: loss {output.loss:.3f}, gradient norm {norm:.3g}")
    if np.isfinite(losses[-1]):
        print(write(state.params, characters))
    return np.array(losses)


if __name__ == "__main__":
    main()

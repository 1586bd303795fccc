"""
Multipliers in fine-tuning
==========================

A network that has learned to tell the digits 0 to 4 apart gets a new head and is
fine-tuned on 25 images of the digits 5 to 9. Its lower layers know strokes, which the
new digits are made of, too. Four ways to train it on with Adam, over 20 draws of the 25
images:

* every layer at the whole rate;
* slower towards the input: ``learning_rate_multipliers`` made by
  :func:`optloss.layerwise_decay`;
* the same rules as ``gradient_multipliers``: Adam divides each gradient by its own
  size, and the multipliers cancel;
* the new head alone, by ``variables="head/*"``.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn import datasets

import optloss

LAYERS, STEPS, DRAWS, SHOTS = 3, 100, 20, 5
WIDTHS = {
    "layer_0": (64, 64),
    "layer_1": (64, 64),
    "layer_2": (64, 64),
    "head": (64, 5),
}
images, labels = datasets.load_digits(return_X_y=True)
images, labels = np.float32(images / 16), labels.astype(np.int32)
old, new = labels < 5, labels >= 5


def new_layer(key, shape):
    kernel = jax.random.normal(key, shape) * np.sqrt(2 / shape[0])
    return {"kernel": kernel, "bias": jnp.zeros(shape[1])}


def new_params(key):
    keys = jax.random.split(key, len(WIDTHS))
    return {
        name: new_layer(key, shape)
        for key, (name, shape) in zip(keys, WIDTHS.items(), strict=True)
    }


def logits(params, x):
    for i in range(LAYERS):
        layer = params[f"layer_{i}"]
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params, x, y):
    scores = logits(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def train(params, x, y, held_out, learning_rate, steps, **options):
    """Return the parameters, and the accuracy on ``held_out`` before each step."""
    train_op = optloss.optimize_loss(
        loss, global_step=0, learning_rate=learning_rate, optimizer="Adam", **options
    )

    def step(state, _):
        right = logits(state.params, held_out[0]).argmax(-1) == held_out[1]
        return train_op.update(state, x, y)[0], right.mean()

    state, accuracy = jax.lax.scan(step, train_op.init(params), None, length=steps)
    return state.params, accuracy


def pretrain():
    x, y = images[old], labels[old]
    return train(new_params(jax.random.key(0)), x, y, (x, y), 3e-3, 200)


pretrained, accuracy = jax.jit(pretrain)()
print(f"digits 0 to 4 that are read: {accuracy[-1]:.1%}")

# %%
# ``describe`` shows what applies to what, before anything is trained.

slower_below = optloss.layerwise_decay(0.3, "layer_{}/*", LAYERS)
train_op = optloss.optimize_loss(
    loss,
    global_step=0,
    learning_rate=0.01,
    optimizer="Adam",
    learning_rate_multipliers=slower_below,
)
print(train_op.describe(pretrained))

# %%
WAYS = {
    "whole rate": {},
    "slower below": {"learning_rate_multipliers": slower_below},
    "slower below, on gradients": {"gradient_multipliers": slower_below},
    "head alone": {"variables": "head/*"},
}


def draw(seed):
    """Return the places of five images of each new digit."""
    choose = np.random.default_rng(seed).choice
    return np.concatenate(
        [
            choose(np.flatnonzero(labels == d), SHOTS, replace=False)
            for d in range(5, 10)
        ]
    )


def fine_tune(key, few, options):
    params = pretrained | {"head": new_layer(key, WIDTHS["head"])}
    held_out = images[new], labels[new] - 5
    x, y = jnp.asarray(images)[few], jnp.asarray(labels)[few] - 5
    return train(params, x, y, held_out, 0.01, STEPS, **options)[1]


keys = jax.random.split(jax.random.key(1), DRAWS)
draws = np.stack([draw(seed) for seed in range(DRAWS)])
figure, axis = plt.subplots(figsize=(9, 4.5))
for i, (label, options) in enumerate(WAYS.items()):
    run = jax.jit(
        jax.vmap(lambda key, few, options=options: fine_tune(key, few, options))
    )
    accuracy = np.asarray(run(keys, draws))
    mean, error = accuracy.mean(0), accuracy.std(0) / np.sqrt(DRAWS)
    style = "--" if "gradients" in label else "-"
    axis.plot(mean, style, color=f"C{i}", label=f"{label}: {mean[-1]:.1%}")
    between = mean - error, mean + error
    axis.fill_between(np.arange(STEPS), *between, color=f"C{i}", alpha=0.15)
axis.set(xlabel="step", ylabel="digits 5 to 9 that are read", ylim=(0.2, 0.95))
axis.legend(fontsize=9, loc="lower right")
figure.tight_layout()
plt.show()

# %%
# Lines are means over the draws, bands the standard error of the mean.

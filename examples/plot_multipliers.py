"""
Multipliers in fine-tuning
==========================

A network that reads the digits 0 to 4 gets a second head, for 5 to 9, and is fine-tuned
on 25 images of these. The more its lower layers change, the sooner they fit the new
digits, and the more they forget of the old ones. Four ways to fine-tune it with Adam,
over ten draws of the 25 images:

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

plt.rcParams.update({"font.size": 12, "lines.linewidth": 1.5})  # to read at 400 px
LAYERS, STEPS, DRAWS, SHOTS = 3, 100, 10, 5
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


def accuracy(params, x, y):
    return (logits(params, x).argmax(-1) == y).mean()


def train(params, x, y, look, learning_rate, steps, **options):
    """Return the parameters, and what ``look`` saw in them before each step."""
    train_op = optloss.optimize_loss(
        loss, global_step=0, learning_rate=learning_rate, optimizer="Adam", **options
    )

    def step(state, _):
        return train_op.update(state, x, y)[0], look(state.params)

    state, seen = jax.lax.scan(step, train_op.init(params), None, length=steps)
    return state.params, seen


def pretrain():
    x, y = images[old], labels[old]
    start = new_params(jax.random.key(0))
    return train(start, x, y, lambda params: accuracy(params, x, y), 3e-3, 200)


pretrained, seen = jax.jit(pretrain)()
print(f"digits 0 to 4 that are read: {seen[-1]:.1%}")

# %%
# ``describe`` shows which rule applies to which parameter, before anything is trained.

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

    def look(params):
        back = params | {"head": pretrained["head"]}
        return (
            accuracy(params, images[new][::2], labels[new][::2] - 5),
            accuracy(back, images[old][::2], labels[old][::2]),
        )

    x, y = jnp.asarray(images)[few], jnp.asarray(labels)[few] - 5
    return train(params, x, y, look, 0.01, STEPS, **options)[1]


keys = jax.random.split(jax.random.key(1), DRAWS)
draws = np.stack([draw(seed) for seed in range(DRAWS)])
figure, axes = plt.subplots(2, 1, figsize=(6, 10), sharex=True, sharey=True)
axes[0].set(title="accuracy on the new digits, 5 to 9", ylim=(0.0, 1.02))
axes[1].set(xlabel="step", title="accuracy on the old digits, 0 to 4")
for i, (label, options) in enumerate(WAYS.items()):
    runs = jax.vmap(lambda key, few, options=options: fine_tune(key, few, options))
    for axis, shares in zip(axes, jax.jit(runs)(keys, draws), strict=True):
        mean, error = shares.mean(0), shares.std(0) / np.sqrt(DRAWS)
        # Two of the ways are the same to Adam: a thin line on a thick one.
        width = 5 if label == "whole rate" else 1.5
        axis.plot(
            mean, color=f"C{i}", linewidth=width, label=f"{label}: {mean[-1]:.1%}"
        )
        between = mean - error, mean + error
        axis.fill_between(np.arange(STEPS), *between, color=f"C{i}", alpha=0.15)
for axis in axes:
    axis.legend(loc="lower right")
figure.tight_layout()
plt.show()

# %%
# Lines are means over the draws, bands the standard error of the mean. The line of the
# multipliers on the gradient lies on the line of the whole rate: Adam cancels them.

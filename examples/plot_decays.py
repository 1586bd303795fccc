"""
The decays in one picture
=========================

TensorFlow's nine decay functions, from a rate of 0.1 over 1,000 steps. Each takes the
rate and the step first. Bind its other arguments, and it is a
``learning_rate_decay_fn``.
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/plot_decays.png'

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import optloss

plt.rcParams.update({"font.size": 12, "lines.linewidth": 1.5})  # to read at 400 px
N = 1000
DECAYS = {
    "exponential_decay": [
        partial(optloss.exponential_decay, decay_steps=200, decay_rate=0.5),
        partial(
            optloss.exponential_decay, decay_steps=200, decay_rate=0.5, staircase=True
        ),
    ],
    "natural_exp_decay": [
        partial(optloss.natural_exp_decay, decay_steps=200, decay_rate=0.5),
        partial(
            optloss.natural_exp_decay, decay_steps=200, decay_rate=0.5, staircase=True
        ),
    ],
    "inverse_time_decay": [
        partial(optloss.inverse_time_decay, decay_steps=200, decay_rate=0.5),
        partial(
            optloss.inverse_time_decay, decay_steps=200, decay_rate=0.5, staircase=True
        ),
    ],
    "polynomial_decay": [
        partial(optloss.polynomial_decay, decay_steps=N, power=1.0),
        partial(optloss.polynomial_decay, decay_steps=250, power=2.0, cycle=True),
    ],
    "cosine_decay": [
        partial(optloss.cosine_decay, decay_steps=N),
        partial(optloss.cosine_decay, decay_steps=500, alpha=0.2),
    ],
    "cosine_decay_restarts": [
        partial(optloss.cosine_decay_restarts, first_decay_steps=150),
        partial(
            optloss.cosine_decay_restarts, first_decay_steps=250, t_mul=1.0, m_mul=0.6
        ),
    ],
    "linear_cosine_decay": [
        partial(optloss.linear_cosine_decay, decay_steps=N),
        partial(optloss.linear_cosine_decay, decay_steps=N, num_periods=3.5),
    ],
    "noisy_linear_cosine_decay": [
        partial(optloss.noisy_linear_cosine_decay, decay_steps=N),
        partial(
            optloss.noisy_linear_cosine_decay, decay_steps=N, initial_variance=0.05
        ),
    ],
    "piecewise_constant": [
        lambda rate, step: optloss.piecewise_constant(
            step, [300, 600, 800], [0.1, 0.05, 0.02, 0.005]
        ),
    ],
}

steps = jnp.arange(N + 1)
figure, axes = plt.subplots(9, 1, figsize=(6, 22), sharex=True, sharey=True)
for axis, (name, functions) in zip(axes.flat, DECAYS.items(), strict=True):
    axis.set_title(name, family="monospace", size=13)
    for function in functions:
        rates = jax.vmap(partial(function, 0.1))(steps)
        arguments = getattr(function, "keywords", {})
        label = ", ".join(f"{key}={value}" for key, value in arguments.items())
        axis.plot(steps, rates, label=label)
    if label:
        axis.legend(fontsize=10, loc="upper right", frameon=False)
axes[0].set_ylim(0, 0.2)
figure.supxlabel("step")
figure.supylabel("learning rate")
figure.tight_layout()
plt.show()

# %%
# Each panel is one function. The legends show its arguments besides the rate, 0.1, and
# the step.
#
# In a training op the step is the one before the counter is incremented, so the first
# update uses the decay at step 0.

train_op = optloss.optimize_loss(
    lambda w: w**2,
    global_step=0,
    learning_rate=0.1,
    optimizer="SGD",
    learning_rate_decay_fn=DECAYS["exponential_decay"][0],
)
state = train_op.init(jnp.array(1.0))
for _ in range(3):
    state, output = train_op(state)
    print(output.summaries["OptimizeLoss/learning_rate"])

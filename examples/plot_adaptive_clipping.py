"""
An adaptive threshold follows a run
===================================

A regression is trained by SGD. A few batches hold outliers, which raise the gradient's
norm by two orders of magnitude. No fixed bound is right here, because the ordinary norm
falls to a hundredth during the run. ``adaptive_clipping`` follows it, and clips what
lies far above.

``statistics="current"``, TensorFlow's algorithm, compares each norm with averages that
contain it. So a spike raises the threshold that it is compared with.
``statistics="previous"`` compares with the averages before it, so the threshold does
not move.
"""

# sphinx_gallery_thumbnail_number = 2

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import optloss

plt.rcParams.update({"font.size": 12, "lines.linewidth": 1.5})  # to read at 400 px
STEPS, SPIKES = 400, jnp.array([60, 150, 151, 152, 300])
true_weights = jnp.linspace(-3, 3, 16)


def loss(weights, step):
    x = jax.random.normal(jax.random.key(step), (32, 16))
    y = x @ true_weights + 0.1 * jax.random.normal(jax.random.key(STEPS + step), (32,))
    y = y.at[0].add(jnp.where(jnp.isin(step, SPIKES), 2000.0, 0.0))
    return jnp.mean((x @ weights - y) ** 2)


def run(clip):
    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=0.01,
        optimizer="SGD",
        clip_gradients=clip,
        name="",
    )

    def step(state, number):
        state, output = train_op.update(state, number)
        return state, output.summaries | optloss.get_summaries(state)

    start = train_op.init(jnp.zeros(16))
    return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(STEPS))[1])()


histories = {
    statistics: run(optloss.adaptive_clipping(std_factor=3.0, statistics=statistics))
    for statistics in ("current", "previous")
}

# %%
# The norm as it came, the threshold, and the norm as it was let through:

figure, axes = plt.subplots(2, 1, figsize=(6, 8), sharex=True, sharey=True)
for axis, (statistics, history) in zip(axes, histories.items(), strict=True):
    norm = history["global_norm/gradient_norm"]
    threshold = history["global_norm/adaptive_max_gradient_norm"]
    axis.semilogy(norm, color="0.75", linewidth=4, label="norm")
    axis.semilogy(threshold, color="C3", label="threshold")
    clipped = history["global_norm/clipped_gradient_norm"]
    axis.semilogy(clipped, color="C0", linewidth=1, label="norm after the clip")
    axis.set_title(f'statistics="{statistics}"', family="monospace", size=13)
axes[0].legend()
axes[0].set_ylim(1e-2, 1e7)  # in the warm-up of "previous" nothing is clipped
figure.supxlabel("step")
figure.tight_layout()
plt.show()

# %%
# Where the thin blue line covers the grey one, nothing was clipped. Under ``"current"``
# most spikes raise the red threshold above themselves and pass.
#
# A spike that passes throws the weights far away, and the loss has to fall again:

figure, axis = plt.subplots(figsize=(6, 4.5))
histories["no clip"] = run(None)
for width, (statistics, history) in zip((4, 2, 1), histories.items(), strict=True):
    axis.semilogy(history["loss"], linewidth=width, label=statistics)
axis.set(xlabel="step", ylabel="loss", ylim=(5e-3, 1e6))
axis.legend()
figure.tight_layout()
plt.show()

# %%
# The loss of the three runs. The peaks are the losses of the batches with outliers
# themselves; what differs is the loss after them.
#
# The largest norm that passed at a spike:

for statistics, history in histories.items():
    passed = history.get("global_norm/clipped_gradient_norm")
    passed = jnp.full(STEPS, jnp.inf) if passed is None else passed
    print(f"{statistics:10} {passed[SPIKES].max():10.2f}")

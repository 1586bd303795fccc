"""
An adaptive threshold follows a run
===================================

A regression trained by SGD on batches of which a few hold outliers: they throw the
gradient's norm up by two orders of magnitude. No fixed bound is right here, because the
ordinary norm falls a hundredfold during the run. ``adaptive_clipping`` follows it, and
clips what lies far above.

``statistics="current"``, TensorFlow's algorithm, compares each norm with averages that
contain it, so that a spike raises the very threshold it is held against.
``statistics="previous"`` compares with the averages from before: the threshold stays
where it was.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import optloss

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

figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, sharey=True)
for axis, (statistics, history) in zip(axes, histories.items(), strict=True):
    norm = history["global_norm/gradient_norm"]
    threshold = history["global_norm/adaptive_max_gradient_norm"]
    axis.semilogy(norm, color="0.7", label="norm")
    axis.semilogy(threshold, color="C3", label="threshold")
    clipped = history["global_norm/clipped_gradient_norm"]
    axis.semilogy(clipped, color="C0", linewidth=1, label="norm after the clip")
    axis.set_title(f'statistics="{statistics}"', family="monospace", size=10)
axes[0].legend(fontsize=8)
figure.supxlabel("step")
figure.tight_layout()
plt.show()

# %%
# And what it did to the training: a spike that passes leaves the weights elsewhere.

figure, axis = plt.subplots(figsize=(9, 3.5))
histories["no clip"] = run(None)
for statistics, history in histories.items():
    axis.semilogy(history["loss"], linewidth=1, label=statistics)
axis.set(xlabel="step", ylabel="loss", ylim=(5e-3, 1e6))
axis.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %%
# The largest norm that was let through at a spike:

for statistics, history in histories.items():
    passed = history.get("global_norm/clipped_gradient_norm")
    passed = jnp.full(STEPS, jnp.inf) if passed is None else passed
    print(f"{statistics:10} {passed[SPIKES].max():10.2f}")

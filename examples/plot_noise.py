"""
Noise leaves a saddle, and a poor minimum
=========================================

At a saddle point the gradient is zero, so a run that starts exactly there stays there.
In a shallow minimum it stays, too. With noise on the gradient it leaves both. Noise
that becomes weaker, by ``annealing``, lets the run come to rest afterwards.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import optloss

plt.rcParams.update({"font.size": 12, "lines.linewidth": 1.5})  # to read at 400 px
STEPS, SEEDS = 600, 20


def saddle(p):
    """Slope down to both sides along x, from (0, 0), and up along y."""
    return p["x"] ** 4 / 4 - p["x"] ** 2 / 2 + p["y"] ** 2 / 2


def two_wells(p):
    """Have a minimum of 0.11 near 0.84 and one of -0.38 near -1.11."""
    return p["x"] ** 4 / 4 - p["x"] ** 2 / 2 + p["x"] / 4 + 0.13


def run(loss, start, noise, learning_rate):
    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=learning_rate,
        optimizer="SGD",
        gradient_noise_scale=noise,
    )

    def step(state, _):
        state, output = train_op.update(state)
        return state, output.loss

    return jax.lax.scan(step, train_op.init(start), None, length=STEPS)[1]


def over_seeds(loss, start, scale, annealing, learning_rate):
    def one(key):
        noise = optloss.add_gradient_noise(scale, annealing=annealing, key=key)
        return run(loss, start, noise, learning_rate)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS))


NOISES = {
    "no noise": (0.0, 0.0),
    "constant": (1.0, 0.0),
    "annealing=0.55": (1.0, 0.55),
    "annealing=1.0": (1.0, 1.0),
}
PROBLEMS = {  # loss, start, learning rate, noise that is needed
    "a saddle": (saddle, {"x": jnp.array(0.0), "y": jnp.array(1.0)}, 0.02, 2.0),
    "a poor minimum": (two_wells, {"x": jnp.array(0.84)}, 0.1, 4.0),
}

figure, axes = plt.subplots(2, 1, figsize=(6, 8.5))
lowest = {}
for axis, (title, (loss, start, rate, size)) in zip(
    axes, PROBLEMS.items(), strict=True
):
    for label, (scale, annealing) in NOISES.items():
        losses = np.asarray(over_seeds(loss, start, size * scale, annealing, rate))
        mean, std = losses.mean(0), losses.std(0)
        (line,) = axis.plot(mean, label=label)
        axis.fill_between(
            np.arange(STEPS), mean - std, mean + std, color=line.get_color(), alpha=0.15
        )
        lowest[title, label] = losses[:, -50:].mean(1)
    axis.set(title=title, xlabel="step", ylabel="loss")
axes[0].legend(frameon=False)
axes[0].set_ylim(-0.35, 0.6)
axes[1].set_ylim(-0.6, 0.6)
figure.tight_layout()
plt.show()

# %%
# Each line is the mean over 20 seeds, each band one standard deviation to either side.
#
# The loss over the last 50 steps: its mean over the seeds, its standard deviation, and
# how many of the 20 runs ended in the lower minimum.

for (title, label), losses in lowest.items():
    away = int((losses < -0.1).sum())
    print(f"{title:15} {label:15} {losses.mean():6.3f} +- {losses.std():5.3f} {away:3}")

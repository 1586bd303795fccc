"""
What clipping does to a gradient
================================

Three ways to bound a gradient of two elements. By the global norm, every gradient keeps
its direction and is drawn back to the circle. Element by element, gradients are drawn to
a square, and most of them turn. A function of your own may do anything: this one clips
each parameter by its own norm, which with two scalar parameters is the square again.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optloss

key = jax.random.key(1)
gradients = 1.6 * jax.random.normal(key, (40, 2)) * jnp.array([1.0, 0.6])


def clip_each(pairs):
    return [(g / jnp.maximum(1.0, jnp.linalg.norm(g)), v) for g, v in pairs]


CLIPS = {
    "optloss.clip_by_global_norm(1.0)": optloss.clip_by_global_norm(1.0),
    "optax.clip(1.0)": optax.clip(1.0),
    "optloss.clip_by_function(clip_each)": optloss.clip_by_function(clip_each),
}


def clipped(clip, gradient):
    tree = {"x": gradient[0], "y": gradient[1]}
    result, _ = clip.update(tree, clip.init(tree), tree)
    return jnp.stack([result["x"], result["y"]])


figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharex=True, sharey=True)
circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
for axis, (name, clip) in zip(axes, CLIPS.items(), strict=True):
    after = jax.vmap(lambda g, clip=clip: clipped(clip, g))(gradients)
    for g, c in zip(gradients, after, strict=True):
        axis.plot(*np.array([g, c]).T, color="0.8", linewidth=1, zorder=1)
    axis.scatter(*gradients.T, s=10, color="0.6", label="before")
    axis.scatter(*after.T, s=10, color="C0", label="after")
    axis.plot(circle.real, circle.imag, color="C3", linewidth=1)
    axis.set_title(name, family="monospace", size=8)
    axis.set_aspect("equal")
axes[0].legend(fontsize=8, frameon=False)
figure.tight_layout()
plt.show()

# %%
# How far the direction turns, in degrees, over the gradients that were clipped:


def angle(a, b):
    cosine = (
        jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
    )
    return jnp.degrees(jnp.arccos(jnp.clip(cosine, -1, 1)))


for name, clip in CLIPS.items():
    after = jax.vmap(lambda g, clip=clip: clipped(clip, g))(gradients)
    changed = jnp.any(after != gradients, -1)
    turned = angle(gradients, after)[changed]
    print(f"{name:36} mean {turned.mean():4.1f}  largest {turned.max():4.1f}")

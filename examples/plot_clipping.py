"""
What clipping does to a gradient
================================

Three ways to bound a gradient, for 60 gradients of two elements.

* By the global norm, every gradient keeps its direction. One that is too long ends on
  the circle.
* Element by element, it ends on a square, and most gradients change their direction.
* A function of your own may do anything. This one shortens every gradient, the long
  ones more.
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/plot_clipping.png'

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optloss

plt.rcParams.update({"font.size": 12, "lines.linewidth": 1.5})  # to read at 400 px
gradients = 1.5 * jax.random.normal(jax.random.key(3), (60, 2))


def soft_clip(pairs):
    norm = optloss.global_norm([gradient for gradient, _ in pairs])
    factor = jnp.tanh(norm) / norm
    return [(gradient * factor, variable) for gradient, variable in pairs]


CLIPS = {
    "optloss.clip_by_global_norm(1.0)": optloss.clip_by_global_norm(1.0),
    "optax.clip(1.0)": optax.clip(1.0),
    "optloss.clip_by_function(soft_clip)": optloss.clip_by_function(soft_clip),
}


@jax.vmap
def clip_all(gradient):
    tree = {"x": gradient[0], "y": gradient[1]}
    results = [clip.update(tree, clip.init(tree), tree)[0] for clip in CLIPS.values()]
    return jnp.array([[result["x"], result["y"]] for result in results])


figure, axes = plt.subplots(3, 1, figsize=(5, 13), sharex=True, sharey=True)
circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
clipped = jnp.moveaxis(clip_all(gradients), 1, 0)
for axis, name, after in zip(axes, CLIPS, clipped, strict=True):
    axis.plot(*np.stack([gradients, after], 1).T, color="0.85", linewidth=1, zorder=1)
    axis.scatter(*gradients.T, s=8, color="0.5", label="before")
    axis.scatter(*after.T, s=12, color="C0", label="after")
    axis.plot(circle.real, circle.imag, color="C3", linewidth=1, zorder=1)
    axis.set_title(name, family="monospace", size=11)
    axis.set_aspect("equal")
axes[0].legend(loc="lower right")
figure.tight_layout()
plt.show()

# %%
# Grey: the gradients before the clip. Blue: after it. The red circle has radius 1, the
# bound of the first two clips.
#
# How far the clip turns a gradient that it changes, in degrees:

for name, after in zip(CLIPS, clipped, strict=True):
    ends = [jnp.degrees(jnp.arctan2(g[:, 1], g[:, 0])) for g in (gradients, after)]
    turned = jnp.abs((ends[1] - ends[0] + 180) % 360 - 180)
    changed = jnp.any(after != gradients, axis=-1)
    mean, largest = turned[changed].mean(), turned[changed].max()
    print(f"{name:36} on average {mean:4.1f}, at most {largest:4.1f}")

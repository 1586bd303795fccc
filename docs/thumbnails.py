"""Draw the gallery's thumbnails: ``python docs/thumbnails.py``.

For programs that draw nothing, and for figures that are too tall to be shown small.
"""

import contextlib
import io
import re
import runpy
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from sklearn import datasets

mpl.use("Agg")

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = Path(__file__).parent / "_static" / "thumbnails"


def save(name):
    plt.savefig(FOLDER / f"{name}.png", dpi=80, bbox_inches="tight")
    plt.close("all")


def digits_linen():
    """A few of the digits."""
    images = datasets.load_digits().images
    _, axes = plt.subplots(3, 5, figsize=(4, 2.8))
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image, cmap="gray_r")
        axis.axis("off")


def digits_nnx():
    """How two of a digit's principal components tell the digits apart."""
    images, labels = datasets.load_digits(return_X_y=True)
    centred = images - images.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    x, y = axes[:2] @ centred.T
    plt.figure(figsize=(4, 2.8))
    plt.scatter(x, y, c=labels, cmap="tab10", s=5)
    plt.xticks([])
    plt.yticks([])


def digits_equinox():
    """The mean image of each digit."""
    images, labels = datasets.load_digits(return_X_y=True)
    _, axes = plt.subplots(2, 5, figsize=(4, 2))
    for digit, axis in enumerate(axes.flat):
        axis.imshow(images[labels == digit].mean(0).reshape(8, 8), cmap="magma")
        axis.axis("off")


def char_model():
    """The loss with the clip and without."""
    main = runpy.run_path(str(EXAMPLES / "char_model.py"))["main"]
    plt.figure(figsize=(4, 2.8))
    for clip, label in (("1.0", "clipped"), ("none", "not clipped")):
        losses = main(["--steps", "60", "--clip", clip])
        plt.plot(np.minimum(losses, 12), label=label)
    plt.xlabel("step")
    plt.ylabel("loss")
    plt.ylim(0, 12)
    plt.legend()


def averaged_diffusion():
    """Digits from the image to the noise."""
    random = np.random.default_rng(0)
    images = datasets.load_digits().images[:3] / 8 - 1
    _, axes = plt.subplots(3, 5, figsize=(4, 2.8))
    for row, image in zip(axes, images, strict=True):
        noise = random.normal(size=image.shape)
        for axis, angle in zip(row, np.linspace(0, np.pi / 2, 5), strict=True):
            noisy = np.cos(angle) * image + np.sin(angle) * noise
            axis.imshow(noisy, cmap="gray_r", vmin=-1.5, vmax=1.5)
            axis.axis("off")


def micro_batches():
    """Four small batches, one step."""
    _, axis = plt.subplots(figsize=(4, 2.8))
    colors = plt.get_cmap("tab10").colors
    for piece in range(4):
        box = plt.Rectangle((0, 0.7 * piece), 1.2, 0.55, color=colors[piece])
        axis.add_patch(box)
        arrow = {"arrowstyle": "->", "linewidth": 1.5, "color": "0.4"}
        start = (1.3, 0.7 * piece + 0.275)
        axis.annotate("", xy=(2.5, 1.325), xytext=start, arrowprops=arrow)
    axis.add_patch(plt.Rectangle((2.6, 0.9), 1.4, 0.85, color="0.3"))
    axis.text(3.3, 1.325, "step", color="white", size=14, ha="center", va="center")
    axis.set(xlim=(-0.1, 4.1), ylim=(-0.1, 2.75))
    axis.axis("off")


def float16_digits():
    """The scale of the loss: halved, then doubled again."""
    main = runpy.run_path(str(EXAMPLES / "float16_digits.py"))["main"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([])
    found = re.findall(r"step +(\d+).*scale ([\d.]+)", printed.getvalue())
    steps, scales = np.float64([(0, 2.0**24), *found[1:]]).T
    plt.figure(figsize=(4, 2.8))
    plt.step(steps, np.log2(scales), where="post")
    plt.xlabel("step")
    plt.ylabel("log2 of the loss scale")


def plot_decays():
    """Three of the decays."""
    steps = np.arange(1000)
    plt.figure(figsize=(4, 2.8))
    plt.plot(0.1 * 0.5 ** (steps // 200), label="staircase")
    plt.plot(0.05 * (1 + np.cos(np.pi * steps / 1000)), label="cosine")
    plt.plot(0.1 * (1 - steps / 1000) ** 2, label="polynomial")
    plt.xticks([])
    plt.yticks([])
    plt.legend()


def plot_clipping():
    """Gradients drawn back to a circle."""
    gradients = 1.5 * np.random.default_rng(3).normal(size=(40, 2))
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    clipped = gradients / np.maximum(lengths, 1)
    _, axis = plt.subplots(figsize=(4, 2.8))
    axis.plot(*np.stack([gradients, clipped], 1).T, color="0.8", zorder=1)
    axis.scatter(*gradients.T, s=15, color="0.5")
    axis.scatter(*clipped.T, s=20, color="C0")
    axis.set_aspect("equal")
    axis.axis("off")


def multi_host():
    """Parameters over processes and devices."""
    figure, axis = plt.subplots(figsize=(4, 2.8))
    colors = plt.get_cmap("tab10").colors
    for process in range(2):
        left = 2.4 * process
        axis.add_patch(plt.Rectangle((left, 0), 2.2, 2.4, fill=False, linewidth=2))
        axis.text(left + 1.1, 2.55, f"process {process}", ha="center", size=12)
        for device in range(2):
            for row in range(4):
                own = row == 2 * process + device
                box = plt.Rectangle(
                    (left + 0.25 + 0.95 * device, 1.75 - 0.45 * row), 0.75, 0.4,
                    color=colors[row], alpha=1.0 if own else 0.15,
                )  # fmt: skip
                axis.add_patch(box)
    axis.set(xlim=(-0.1, 4.7), ylim=(-0.1, 2.9))
    axis.axis("off")
    del figure


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    FOLDER.mkdir(exist_ok=True)
    for draw in (
        digits_linen,
        digits_nnx,
        digits_equinox,
        char_model,
        averaged_diffusion,
        micro_batches,
        float16_digits,
        multi_host,
        plot_decays,
        plot_clipping,
    ):
        draw()
        save(draw.__name__)

"""Recorded runs of the original, and how each is asked of ``optimize_loss``.

``load(folder)`` reads a set of recordings, ``play(run)`` repeats one through the
library, ``compare`` says what lies too far from what was recorded. ``data/README.md``
describes the recordings and their tolerances.
"""

import functools
import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optloss
from optloss.optimizers import tensorflow

DATA = Path(__file__).parent / "data"
TAGS = {
    "learning_rate": "lr",
    "global_norm/gradient_norm": "grad_norm",
    "global_norm/clipped_gradient_norm": "clipped_norm",
    "global_norm/adaptive_max_gradient_norm": "max_norm",
    "adaptive/mean": "ad_mean",
    "adaptive/sq_mean": "ad_sq_mean",
}
MEASURED = frozenset(TAGS.values())


class Run(NamedTuple):
    case: dict[str, Any]
    names: list[str]
    data: dict[str, np.ndarray]
    recorded: dict[str, np.ndarray]

    @property
    def updates(self):
        return len(self.recorded["loss"])

    @property
    def dtype(self):
        return self.case["dtype"]


def load(folder):
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    packed = folder / "tensorflow_runs.npz"
    read = packed_reader(packed) if packed.exists() else folder_reader(folder)
    return {
        case["id"]: Run(case, manifest["param_names"][case["problem"]], *read(case))
        for case in manifest["cases"]
    }


def unpack(path):
    with np.load(path) as archive:
        return dict(archive)


def folder_reader(folder):
    def read(case):
        return unpack(folder / case["problem_file"]), unpack(folder / case["file"])

    return read


def packed_reader(path):
    arrays, rows = unpack(path), defaultdict(int)

    def read(case):
        recorded = {}
        for name in case["arrays"]:
            key = f"{case['problem']}/{case['dtype']}/{name}"
            recorded[name] = arrays[key][rows[key]]
            rows[key] += 1
        problem = f"problem/{case['problem']}/"
        of_problem = [key for key in arrays if key.startswith(problem)]
        return {key.removeprefix(problem): arrays[key] for key in of_problem}, recorded

    return read


def nest(leaves):
    tree = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): leaf for path, leaf in leaves}


def perceptron(run):
    def loss(params, weight, x, y):
        leaves = flatten(params)
        first, first_bias, second, second_bias = (leaves[name] for name in run.names)
        output = jnp.tanh(x @ first + first_bias) @ second + second_bias
        return weight * jnp.mean((output - y) ** 2)

    return loss, [run.data["data/x"], run.data["data/y"]]


def quadratic(run):
    def loss(params, weight):
        total = 0.0
        for name, value in flatten(params).items():
            if f"data/h_{name}" in run.data:
                h = jnp.asarray(run.data[f"data/h_{name}"], run.dtype)
                t = jnp.asarray(run.data[f"data/t_{name}"], run.dtype)
                total += jnp.sum(h * (value - t) ** 2)
        return weight * 0.5 * total

    return loss, []


def loss_and_batches(run):
    loss, batches = perceptron(run) if "data/x" in run.data else quadratic(run)
    weights = run.data[f"weights/{run.case['weights']}"]
    inputs = [a[: run.updates].astype(run.dtype) for a in (weights, *batches)]
    return loss, zip(*inputs, strict=True)


def as_class(factory):
    class Optimizer:
        def __init__(self, learning_rate):
            self.init, self.update = factory(learning_rate)

    return Optimizer


def optimizer_argument(case):
    chosen, form = case["optimizer"], case["optimizer_form"]
    if form == "name":
        return chosen
    chosen = {"class": chosen} if isinstance(chosen, str) else chosen
    factory = functools.partial(
        getattr(tensorflow, chosen["class"].lower()), **chosen.get("kwargs", {})
    )
    if form == "instance":
        return factory(chosen["instance_lr"])
    return as_class(factory) if form == "class" else factory


def rate_argument(case):
    if case["lr_kind"] == "tensor":
        return jnp.asarray(case["lr"], case["dtype"])
    return case["lr"]


def noise_argument(run):
    scale = run.case.get("noise")
    if scale is None:
        return None

    def add(k, path, gradient):
        z = run.recorded.get(f"z/{name_of(path)}")
        return gradient if z is None else gradient + scale * jnp.asarray(z)[k]

    def update(updates, k, params=None):
        del params
        noisy = functools.partial(add, k)
        return jax.tree_util.tree_map_with_path(noisy, updates), k + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def clip_argument(case):
    clip = case.get("clip")
    if not isinstance(clip, dict):
        return clip
    settings = dict(clip["adaptive"])
    decay_warmup = settings.pop("use_global_step")
    return optloss.adaptive_clipping(**settings, decay_warmup=decay_warmup)


def decay_argument(run):
    decay = run.case.get("decay")
    if "random_lr" in run.case["tags"]:
        first, rates = run.case["global_step0"], run.recorded["lr"]
        return lambda learning_rate, step: jnp.asarray(rates)[step - first]
    if not decay:
        return None
    fn = functools.partial(getattr(optloss, decay["fn"]), **decay["args"])
    if decay["fn"] == "piecewise_constant":
        return lambda learning_rate, step: fn(step)
    return fn


def arguments(run):
    case = run.case
    return {
        "global_step": case["global_step0"],
        "learning_rate": rate_argument(case),
        "optimizer": optimizer_argument(case),
        "gradient_noise_scale": noise_argument(run),
        "gradient_multipliers": case.get("multipliers"),
        "clip_gradients": clip_argument(case),
        "learning_rate_decay_fn": decay_argument(run),
        "variables": case.get("variables"),
        "name": "",
        "summaries": ["learning_rate", "loss", "global_gradient_norm"],
        "increment_global_step": case["increment_global_step"],
    }


def start(run):
    leaves = {name: run.data[f"init/{name}"].astype(run.dtype) for name in run.names}
    return jax.tree.map(jnp.asarray, nest(leaves))


def train_op_of(run, loss, changed):
    called = arguments(run) | changed
    with warnings.catch_warnings():
        if run.case["optimizer_form"] == "instance":
            warnings.simplefilter("ignore", UserWarning)
        return optloss.optimize_loss(loss, **called)


def results(state, output):
    measured = output.summaries | optloss.get_summaries(state)
    row = {name: measured[tag] for tag, name in TAGS.items() if tag in measured}
    params = {f"param/{name}": leaf for name, leaf in flatten(state.params).items()}
    return row | params | {"loss": output.loss, "global_step": state.step}


def play(run, **changed):
    """Repeat ``run``, some arguments ``changed``, and return what was measured."""
    with jax.enable_x64(run.dtype == "float64"):
        loss, batches = loss_and_batches(run)
        train_op = train_op_of(run, loss, changed)
        state, rows = train_op.init(start(run)), []
        for batch in batches:
            state, output = train_op(state, *batch)
            rows.append(jax.device_get(results(state, output)))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def tolerance_of(run):
    """Return how far ``run`` may lie from its recording."""
    return 2e-5 if run.dtype == "float32" else 2e-6


def recorded_results(run):
    """Return what ``run`` must reproduce, a row an update."""
    results = {}
    for name, rows in run.recorded.items():
        if name.startswith("param/"):
            results[name] = rows[1:]
        elif not name.startswith("z/"):
            results[name] = rows
    if run.case["optimizer_form"] == "instance":
        del results["lr"]
    return results


def excess(name, expected, found, tolerance):
    """Return by how many times what is allowed ``found`` deviates after each update."""
    if expected.shape != found.shape:
        raise ValueError(f"{name}: {found.shape} found, {expected.shape} expected")
    if name == "global_step":
        return np.where(expected == found, 0.0, np.inf)
    within_update = tuple(range(1, expected.ndim))
    distance = np.abs(np.float64(expected) - np.float64(found)).max(within_update)
    size = np.abs(expected).max(within_update)
    if name.startswith("param/"):
        return distance / (tolerance * (0.01 + size))
    if name == "max_norm" and expected.dtype == np.float32:
        return distance / (250 * tolerance * size)
    return distance / (tolerance * (0.05 + size))


def compare(expected, found, tolerance):
    """Return what deviates too far: array, first such update, times what is allowed."""
    beyond = {}
    for name, rows in expected.items():
        ratio = excess(name, rows, found[name], tolerance)
        if not (ratio <= 1).all():
            beyond[name] = (int(np.argmin(ratio <= 1)), float(np.max(ratio)))
    return beyond

"""How far optax's optimizers are from TensorFlow's of the same name.

A small perceptron is trained twice for 30 updates, by the factory behind the TensorFlow
name and by optax's function. What is printed is the largest difference of a parameter
after any update, relative to the largest parameter of its leaf: once for ordinary
gradients, once for a loss so small that they are about 1e-6. Run it from the root:

    python benchmarks/optimizer_deviation.py
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optloss.optimizers.tensorflow import OPTIMIZER_CLS_NAMES

UPDATES = 30
RESULTS = Path(__file__).parent / "results" / "optimizer_deviation.json"
RATES = {"SGD": 0.05, "Momentum": 0.02, "Adagrad": 0.1, "Adam": 0.01, "RMSProp": 0.005}
FACTORS = {"ordinary": 1.0, "tiny": 1e-6}


class Rival(NamedTuple):
    """An optax function, and the TensorFlow name it might stand for."""

    name: str
    function: Callable[..., optax.GradientTransformation]
    settings: dict[str, Any]

    @property
    def call(self):
        settings = "".join(f", {key}={value}" for key, value in self.settings.items())
        return f"optax.{self.function.__name__}(rate{settings})"


RIVALS = [
    Rival("Adagrad", optax.adagrad, {}),
    Rival("Adagrad", optax.adagrad, {"eps": 0.0}),
    Rival("Adam", optax.adam, {}),
    Rival("Adam", optax.adam, {"eps": 1e-7}),
    Rival("Momentum", optax.sgd, {"momentum": 0.9}),
    Rival("RMSProp", optax.rmsprop, {}),
    Rival("RMSProp", optax.rmsprop, {"eps": 1e-10, "initial_scale": 1.0}),
    Rival("SGD", optax.sgd, {}),
]


def start_and_data():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w0": 0.3 * jax.random.normal(keys[0], (8, 16)),
        "b0": jnp.full(16, 0.1),
        "w1": 0.3 * jax.random.normal(keys[1], (16, 3)),
        "b1": jnp.full(3, 0.1),
    }
    x = jax.random.normal(keys[2], (UPDATES, 32, 8))
    y = jax.random.normal(keys[3], (UPDATES, 32, 3))
    return params, (x, y)


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["w0"] + params["b0"])
    return jnp.mean((hidden @ params["w1"] + params["b1"] - y) ** 2)


@functools.partial(jax.jit, static_argnums=0)
def trajectory(tx, factor, params, batches):
    """Return the parameters after each update, stacked."""

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(lambda params: factor * loss(params, batch))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), batches)[1]


def deviation(found, expected):
    def of_leaf(a, b):
        axes = tuple(range(1, a.ndim))
        return jnp.max(jnp.max(jnp.abs(a - b), axes) / jnp.max(jnp.abs(b), axes))

    return float(max(jax.tree.leaves(jax.tree.map(of_leaf, found, expected))))


def measure(rival):
    params, batches = start_and_data()
    rate = RATES[rival.name]
    ours = OPTIMIZER_CLS_NAMES[rival.name](rate)
    theirs = rival.function(rate, **rival.settings)
    deviations = {}
    for kind, factor in FACTORS.items():
        expected = trajectory(ours, factor, params, batches)
        deviations[kind] = deviation(
            trajectory(theirs, factor, params, batches), expected
        )
    return {"name": rival.name, "optax": rival.call} | deviations


def table(rows):
    yield "| TensorFlow | optax | ordinary gradients | gradients of 1e-6 |"
    yield "|---|---|---|---|"
    for row in rows:
        ordinary, tiny = (f"{row[kind]:.1e}" for kind in FACTORS)
        yield f"| {row['name']} | `{row['optax']}` | {ordinary} | {tiny} |"
    for name in sorted(set(OPTIMIZER_CLS_NAMES) - set(RATES)):
        yield f"| {name} | none | | |"


def main():
    rows = [measure(rival) for rival in RIVALS]
    print("\n".join(table(rows)))
    setting = {"updates": UPDATES, "jax": jax.__version__, "optax": optax.__version__}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(setting | {"deviations": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

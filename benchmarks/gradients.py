"""The figures of ``docs/guides/gradients.md``: what each way to the gradient does.

Temporaries of a compiled step that accumulates; the accuracy of private training at
three noise levels; a float16 run that overflows; the loss of averaged parameters. All
but the temporaries, which are exact, are means over seeds. Run it from the root:

    python benchmarks/gradients.py
"""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

import optloss

RESULTS = Path(__file__).parent / "results" / "gradients.json"
SLICES, NOISE, SEEDS = (1, 4, 16), (0.5, 1.0, 2.0), 5
STEPS, BATCH, HELD_OUT = 300, 256, 300
MAX_NORM = 1.0


def start(key, sizes=(64, 64, 10)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "kernel": jax.random.normal(k, pair) / pair[0] ** 0.5,
            "bias": jnp.zeros(pair[1]),
        }
        for k, pair in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def network(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss(params, x, labels, dtype=jnp.float32):
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
    logits = network(params, x).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def digits():
    images, labels = datasets.load_digits(return_X_y=True)
    return jnp.float32(images / 16), jnp.int32(labels)


def train(train_op, key, steps=STEPS, batch=BATCH):
    """Return the state after a run, and the share of held-out digits it reads."""
    images, labels = digits()
    keys = jax.random.split(key)

    def step(state, key):
        rows = jax.random.randint(key, (batch,), HELD_OUT, len(images))
        state, output = train_op.update(state, images[rows], labels[rows])
        return state, output.loss

    state, _ = jax.lax.scan(
        step, train_op.init(start(keys[0])), jax.random.split(keys[1], steps)
    )
    return state, accuracy(state.params)


def accuracy(params):
    images, labels = (part[:HELD_OUT] for part in digits())
    return jnp.mean(network(params, images).argmax(-1) == labels)


def over_seeds(run):
    return jax.jit(jax.lax.map, static_argnums=0)(
        run, jax.random.split(jax.random.key(0), SEEDS)
    )


def accumulation():
    """Bytes of temporaries of a step of a network whose activations dominate."""
    rows = {}
    for slices in SLICES:
        train_op = optloss.optimize_loss(
            lambda params, x: jnp.mean(network(params, x) ** 2),
            global_step=0,
            learning_rate=1e-3,
            optimizer="adam",
            value_and_grad=optloss.accumulate_gradients(slices),
        )
        params = start(jax.random.key(0), (256,) * 9)
        state = jax.eval_shape(train_op.init, params)
        x = jax.ShapeDtypeStruct((16384, 256), jnp.float32)
        step = jax.jit(train_op.update, donate_argnums=0).lower(state, x).compile()
        rows[slices] = step.memory_analysis().temp_size_in_bytes
    return rows


def private():
    """Held-out accuracy of DP-SGD at several noise multipliers."""
    rows = {}
    for noise in (0.0, *NOISE):
        run = functools.partial(
            optloss.optimize_loss,
            loss,
            global_step=0,
            learning_rate=0.5,
            optimizer="sgd",
            value_and_grad=optloss.clip_per_example(MAX_NORM),
        )

        def one(key, run=run, noise=noise):
            train_op = run(gradient_noise_scale=noise * MAX_NORM / BATCH, seed=key)
            return train(train_op, key)[1]

        rows[noise] = float(over_seeds(one).mean())
    return rows


def half_precision():
    """Accuracy in float32, and in float16 with a scale that overflows."""
    rows = {}
    for dtype, scale in (
        ("float32", None),
        ("float16", optloss.dynamic_loss_scale(2.0**24, growth_interval=50)),
    ):

        def one(key, dtype=dtype, scale=scale):
            train_op = optloss.optimize_loss(
                functools.partial(loss, dtype=dtype),
                global_step=0,
                learning_rate=3e-3,
                optimizer="adam",
                loss_scale=scale,
            )
            state, share = train(train_op, key)
            seen = optloss.get_summaries(state)
            found = {"accuracy": share}
            return found | {
                name: seen[name]
                for name in ("skipped/total", "loss_scale")
                if name in seen
            }

        found = over_seeds(one)
        rows[dtype] = {name: float(values.mean()) for name, values in found.items()}
    return rows


def averaging():
    """Loss over all training digits of the latest and of the averaged parameters."""
    images, labels = digits()

    def one(key):
        train_op = optloss.optimize_loss(
            loss,
            global_step=0,
            learning_rate=0.01,
            optimizer="adam",
            gradient_noise_scale=0.02,
            moving_average=0.98,
            seed=key,
        )
        state, _ = train(train_op, key, batch=32)
        both = {"latest": state.params, "averaged": train_op.averaged(state)}
        held_out = images[:HELD_OUT], labels[:HELD_OUT]
        return {name: loss(params, *held_out) for name, params in both.items()}

    return {name: float(values.mean()) for name, values in over_seeds(one).items()}


def main():
    found = {
        "jax": jax.__version__,
        "seeds": SEEDS,
        "temporaries": accumulation(),
        "private": private(),
        "half_precision": half_precision(),
        "averaging": averaging(),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()

"""100 steps are 50, a save, a new process, a restore and 50, bit for bit.

Run as a program, ``python test_resume.py FOLDER``, this file is the new process.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import optloss

HALF = 50


def loss(params, model_state, x, y):
    """A small network with a BatchNorm, whose statistics are the model's state."""
    hidden = x @ params["in"]
    mean, var = hidden.mean(0), hidden.var(0)
    normal = (hidden - mean) / jnp.sqrt(var + 1e-3) * params["scale"]
    seen = {
        "mean": 0.9 * model_state["mean"] + 0.1 * mean,
        "var": 0.9 * model_state["var"] + 0.1 * var,
        "batches": model_state["batches"] + 1,
    }
    return jnp.mean((jnp.tanh(normal) @ params["out"] - y) ** 2), seen


def make_train_op():
    return optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=0.01,
        optimizer="Adam",
        gradient_noise_scale=optloss.add_gradient_noise(0.1, annealing=0.55, key=11),
        clip_gradients=optloss.adaptive_clipping(std_factor=0.5),
        learning_rate_decay_fn=functools.partial(
            optloss.exponential_decay, decay_steps=10, decay_rate=0.9
        ),
        gradient_multipliers={"out": 0.5},
        learning_rate_multipliers={"in": 2.0},
        skip_nonfinite=True,
    )


def start(train_op):
    random = np.random.default_rng(0)
    shapes = {"in": (4, 8), "scale": (8,), "out": (8,)}
    params = {name: np.float32(random.normal(size=s)) for name, s in shapes.items()}
    seen = {"mean": jnp.zeros(8), "var": jnp.ones(8), "batches": jnp.int32(0)}
    return train_op.init(params, seen)


def train(train_op, state, steps):
    """Train on the batches that belong to ``steps``; one is spoilt."""
    for step in steps:
        random = np.random.default_rng([1, step])
        x = np.float32(random.normal(size=(16, 4)))
        state, _ = train_op(state, x * (np.nan if step == 30 else 1), np.sin(x[:, 0]))
    return state


def save_npz(path, state):
    np.savez(path, *jax.tree.leaves(state))


def load_npz(path, like):
    with np.load(path) as saved:
        leaves = [jnp.asarray(saved[name]) for name in saved.files]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def save_orbax(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def load_orbax(path, like):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


SAVERS = {
    "orbax": (save_orbax, load_orbax),
    "state.msgpack": (
        lambda path, state: path.write_bytes(serialization.to_bytes(state)),
        lambda path, like: serialization.from_bytes(like, path.read_bytes()),
    ),
    "state.eqx": (eqx.tree_serialise_leaves, eqx.tree_deserialise_leaves),
    "state.npz": (save_npz, load_npz),
}


def resume(folder):
    """Restore what each saver saved, make the second half, and leave it behind."""
    train_op = make_train_op()
    for name, (_, load) in SAVERS.items():
        state = load(folder / name, start(train_op))
        last = train(train_op, state, range(HALF, 2 * HALF))
        save_npz(folder / f"last {name}.npz", last)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    train_op = make_train_op()
    halfway = train(train_op, start(train_op), range(HALF))
    for name, (save, _) in SAVERS.items():
        save(folder / name, halfway)
    save_npz(folder / "straight.npz", train(train_op, halfway, range(HALF, 2 * HALF)))
    # The package may be on the path of this process alone.
    path = os.pathsep.join(filter(None, sys.path))
    subprocess.run(
        [sys.executable, __file__, str(folder)],
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    return folder


@pytest.mark.parametrize("name", SAVERS)
def test_a_resumed_run_ends_as_the_straight_one(folder, name):
    like = start(make_train_op())
    straight = load_npz(folder / "straight.npz", like)
    resumed = load_npz(folder / f"last {name}.npz", like)
    assert (resumed.step, resumed.model_state["batches"]) == (2 * HALF, 2 * HALF - 1)
    pairs = zip(jax.tree.leaves(resumed), jax.tree.leaves(straight), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_the_run_was_worth_resuming(folder):
    """All that could have been lost was in use."""
    state = load_npz(folder / "straight.npz", start(make_train_op()))
    found = optloss.get_summaries(state)
    assert found["skipped/total"] == 1
    assert 0 < found["clipped_share"] < 1
    assert found["noise_std"] > 0
    np.testing.assert_allclose(found["learning_rate"], 0.01 * 0.9**9.9, rtol=1e-5)


if __name__ == "__main__":
    resume(Path(sys.argv[1]))

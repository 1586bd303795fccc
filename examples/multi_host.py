"""
Several processes
=================

On a cluster every host runs the same program. ``jax.distributed.initialize`` connects
them, and a mesh spans the devices of all. The loss and the training op are those of one
device. The parameters are placed on the mesh, and the state follows them. This program
trains a network twice, data-parallel and fully sharded, and saves both from all
processes. It resumes from these checkpoints on any number of processes and devices.

Two processes on one host, two fake devices each, and then one with eight::

    python examples/multi_host.py --processes 2 --process 0 --cpu-devices 2 runs/two &
    python examples/multi_host.py --processes 2 --process 1 --cpu-devices 2 runs/two
    python examples/multi_host.py --cpu-devices 8 --steps 40 runs/two

The third command prints, on one machine::

    data-parallel, process 0 of 1, 8 of 8 devices: step 40, loss 0.5332 -> 0.5071, ...
    fully-sharded, process 0 of 1, 8 of 8 devices: step 40, loss 0.5332 -> 0.5071, ...

Under SLURM, on TPU pods and with Open MPI, ``--discover`` finds the other processes.
"""

# sphinx_gallery_thumbnail_path = '_static/thumbnails/multi_host.png'

import argparse
import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optloss

BATCH, INPUTS, HIDDEN, OUTPUTS = 64, 32, 128, 16
LAYOUTS = ("data-parallel", "fully-sharded")


def connect(args):
    """Connect the processes; a single one has nothing to do."""
    if args.cpu_devices:
        # More threads than devices, or devices that wait for each other block the rest.
        os.environ.setdefault("NPROC", str(4 * args.cpu_devices))
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.discover:
        jax.distributed.initialize()
    elif args.processes > 1:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)


def network(params, x):
    """Apply three layers; nothing here depends on the devices."""
    for layer in ("first", "second"):
        x = jnp.tanh(x @ params[layer]["kernel"] + params[layer]["bias"])
    return x @ params["third"]["kernel"] + params["third"]["bias"]


def loss(params, x, y):
    """Return the mean squared error over the batch, of which each device has a part."""
    return jnp.mean((network(params, x) - y) ** 2)


def draw_params(seed):
    """Return random parameters: the same numbers however they are sharded."""
    sizes = {
        "first": (INPUTS, HIDDEN),
        "second": (HIDDEN, HIDDEN),
        "third": (HIDDEN, OUTPUTS),
    }
    return {
        layer: {
            "kernel": jax.random.normal(
                jax.random.fold_in(jax.random.key(seed), i), size
            )
            / np.sqrt(size[0]),
            "bias": jnp.zeros(size[1]),
        }
        for i, (layer, size) in enumerate(sizes.items())
    }


def place(layout, mesh):
    """Return the sharding of each parameter: whole on every device, or cut in rows."""
    spec = P("data") if layout == "fully-sharded" else P()
    shapes = jax.eval_shape(draw_params, 0)
    return jax.tree.map(lambda _: NamedSharding(mesh, spec), shapes)


def batch_of(step, mesh):
    """Return the batch of a step. Each process makes only the rows of its devices."""
    random = np.random.default_rng(step)
    x = random.normal(size=(BATCH, INPUTS)).astype(np.float32)
    y = np.sin(x[:, :OUTPUTS]) * x[:, OUTPUTS:]
    rows = NamedSharding(mesh, P("data"))
    return tuple(
        jax.make_array_from_callback(
            part.shape, rows, lambda where, part=part: part[where]
        )
        for part in (x, y)
    )


def train(layout, steps, folder):
    """Train to ``steps`` from the latest checkpoint in ``folder``, and save there."""
    devices = (jax.device_count(),)
    mesh = jax.make_mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=0.01,
        optimizer="adam",
        gradient_noise_scale=0.01,
        clip_gradients=optloss.adaptive_clipping(),
        skip_nonfinite=True,
        summaries=["loss", "global_gradient_norm"],
    )
    # Jitted with shardings, each device draws its own part and no more.
    params = jax.jit(draw_params, static_argnums=0, out_shardings=place(layout, mesh))(
        0
    )
    state, losses = train_op.init(params), []
    with ocp.CheckpointManager(folder.absolute()) as manager:
        if manager.latest_step() is not None:
            args = ocp.args.StandardRestore(state)
            state = manager.restore(manager.latest_step(), args=args)
        for step in range(int(state.step), steps):
            state, output = train_op(state, *batch_of(step, mesh))
            losses.append(output.loss)
        manager.save(steps, args=ocp.args.StandardSave(state))
    return state, [float(value) for value in losses]


def fingerprint(params):
    """Return a short text that two processes share only if every bit is the same."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(params)
    bits = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(whole))
    return hashlib.sha256(bits).hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser(description="Train with several processes.")
    parser.add_argument("folder", type=Path, help="where the checkpoints are")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--coordinator", default="127.0.0.1:12357")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0, help="which one this is")
    parser.add_argument("--discover", action="store_true", help="ask the scheduler")
    parser.add_argument("--cpu-devices", type=int, help="fake devices of this process")
    args = parser.parse_args()
    connect(args)
    for layout in LAYOUTS:
        state, losses = train(layout, args.steps, args.folder / layout)
        print(
            f"{layout}, process {jax.process_index()} of {jax.process_count()}, "
            f"{jax.local_device_count()} of {jax.device_count()} devices: "
            f"step {int(state.step)}, loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
            f"parameters {fingerprint(state.params)}",
            flush=True,
        )


if __name__ == "__main__":
    main()

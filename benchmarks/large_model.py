"""What training costs each device of a cluster: a 7B model on 64 devices, simulated.

    python benchmarks/large_model.py              some minutes; about 2 GB of memory
    python benchmarks/large_model.py --layers 2   a quick look

The training step of a network of Llama's shape (7B: 291 leaves) is lowered and compiled
for a mesh of 64 fake devices from shapes alone: nothing is allocated, nothing is run.
The loss is the real one, forward and backward, without a word about shardings, on very
few tokens, so that activations are small beside the gradients.

What each device holds is what XLA's ``memory_analysis`` says of the compiled program.
The collectives are counted in its HLO. Those of the norm, on which the clip, the
summaries and the check for NaN rest, stand in its loop; the others are the model's.
Prints a table, and writes it to ``docs/tables/`` and the figures to
``benchmarks/results/``, unless the model was cut.
"""

import argparse
import dataclasses
import functools
import json
import math
import platform
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import optloss

RESULTS = Path(__file__).parent / "results"
TABLES = Path(__file__).parents[1] / "docs" / "tables"
AXES = ("data", "model")
MEASURED = {"summaries": ["loss", "learning_rate", "global_gradient_norm"]}
EVERYTHING = {
    "gradient_noise_scale": 0.01,
    "gradient_multipliers": {"embedding": 0.1},
    "clip_gradients": optloss.adaptive_clipping(),
    "learning_rate_decay_fn": functools.partial(
        optloss.exponential_decay, decay_steps=1000, decay_rate=0.96
    ),
    "learning_rate_multipliers": {"head": 2.0},
    "skip_nonfinite": True,
    "colocate_gradients_with_ops": True,
}
STEPS: dict[str, dict[str, Any]] = {
    "adam": {"summaries": []},
    "clip + adam": {"clip_gradients": 1.0, **MEASURED},
    "clip + adam, skipping": {
        "clip_gradients": 1.0,
        "skip_nonfinite": True,
        **MEASURED,
    },
    "everything": {**EVERYTHING, **MEASURED},
}
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a Llama; the defaults are those of 7B."""

    layers: int = 32
    width: int = 4096
    hidden: int = 11008
    heads: int = 32
    vocabulary: int = 32000


def shapes_of(size: Size, mesh: Mesh) -> Any:
    """Return the shapes of the parameters, each matrix cut along both mesh axes."""

    def matrix(rows: int, columns: int, *axes: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct((rows, columns), jnp.float32, sharding=sharding)

    scale = jax.ShapeDtypeStruct(
        (size.width,), jnp.float32, sharding=NamedSharding(mesh, P())
    )
    into = functools.partial(matrix, size.width)
    layer = {
        "attention": {
            **{name: into(size.width, *AXES) for name in ("query", "key", "value")},
            "output": into(size.width, *AXES[::-1]),
        },
        "attention_norm": scale,
        "mlp": {
            **{name: into(size.hidden, *AXES) for name in ("gate", "up")},
            "down": matrix(size.hidden, size.width, *AXES[::-1]),
        },
        "mlp_norm": scale,
    }
    return {
        "embedding": matrix(size.vocabulary, size.width, *AXES[::-1]),
        "layers": [layer] * size.layers,
        "norm": scale,
        "head": into(size.vocabulary, *AXES),
    }


def normalise(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


@functools.partial(jax.checkpoint, static_argnums=2)
def block(x: jax.Array, layer: Any, heads: int) -> jax.Array:
    h = normalise(x, layer["attention_norm"])
    weights = layer["attention"]
    query, key, value = (
        (h @ weights[name]).reshape(*h.shape[:2], heads, -1)
        for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + mixed.reshape(h.shape) @ weights["output"]
    h, weights = normalise(x, layer["mlp_norm"]), layer["mlp"]
    return (
        x + (jax.nn.silu(h @ weights["gate"]) * (h @ weights["up"])) @ weights["down"]
    )


def loss(params: Any, tokens: jax.Array, *, heads: int) -> jax.Array:
    x = params["embedding"][tokens[:, :-1]]
    for layer in params["layers"]:
        x = block(x, layer, heads)
    logits = normalise(x, params["norm"]) @ params["head"]
    scores = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], -1))


class Collective(NamedTuple):
    """One instruction by which devices exchange arrays."""

    kind: str
    arrays: int
    bytes: int  # of the result, on one device
    of_the_norm: bool


def collectives(hlo: str) -> list[Collective]:
    """Return the collectives of a compiled program."""
    found = []
    for line in hlo.splitlines():
        if match := COLLECTIVE.search(line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = [
                WIDTHS[dtype] * math.prod(int(n) for n in dims.split(",") if n)
                for dtype, dims in arrays
            ]
            if "/cond/branch_0_fun/cond/" in line:
                continue  # for a norm that is huge or tiny
            of_the_norm = "/jit(_measure)/" in line
            found.append(Collective(match[2], len(arrays), sum(sizes), of_the_norm))
    return found


def bytes_of(tree: Any) -> int:
    """Return what one device holds of ``tree``."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def state_of(train_op: optloss.TrainOp, params: Any) -> Any:
    """Return the shapes and shardings of the state that ``init`` makes."""
    shapes = jax.eval_shape(train_op.init, params)
    compiled = jax.jit(train_op.init).lower(params).compile()
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=sharding
        ),
        shapes,
        compiled.output_shardings,
    )


def compile_step(train_op: optloss.TrainOp, state: Any, tokens: Any) -> Any:
    kept = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(train_op.update, donate_argnums=0, out_shardings=(kept, None))
    return step.lower(state, tokens).compile()


def measure(size: Size, mesh: Mesh, options: Any, length: int) -> dict[str, Any]:
    """Compile one training step, and return what it costs a device."""
    train_op = optloss.optimize_loss(
        functools.partial(loss, heads=size.heads),
        global_step=0,
        learning_rate=1e-3,
        optimizer="adam",
        **options,
    )
    params = shapes_of(size, mesh)
    state = state_of(train_op, params)
    tokens = jax.ShapeDtypeStruct(
        (mesh.shape["data"], length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, P("data")),
    )
    start = time.perf_counter()
    compiled = compile_step(train_op, state, tokens)
    memory, found = compiled.memory_analysis(), collectives(compiled.as_text())
    return {
        "parameters": bytes_of(state.params),
        "state": bytes_of(state.opt_state),
        "gradients": bytes_of(params),
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "moved": sum(one.bytes for one in found),
        "collectives_of_the_model": sum(not one.of_the_norm for one in found),
        "collectives_of_the_norm": [one._asdict() for one in found if one.of_the_norm],
        "seconds_to_compile": round(time.perf_counter() - start, 1),
    }


def simulate(size: Size, mesh: Mesh, length: int = 8) -> list[dict[str, Any]]:
    """Return a row a kind of step: what it costs each device."""
    return [
        {"step": name, **measure(size, mesh, options, length)}
        for name, options in tqdm(STEPS.items(), disable=None)
    ]


@jax.custom_vjp
def given(params: Any, gradients: Any) -> jax.Array:
    """Be a loss that costs nothing, and has these gradients."""
    del params, gradients
    return jnp.zeros(())


given.defvjp(
    lambda params, gradients: (jnp.zeros(()), gradients),
    lambda gradients, _: (gradients, jax.tree.map(jnp.zeros_like, gradients)),
)


def traffic(elements: int = 1_000_000) -> dict[str, float]:
    """Return the bytes that an update reads and writes for each parameter, by XLA."""
    leaf = jax.ShapeDtypeStruct((elements,), jnp.float32)
    params = {"embedding": leaf, "head": leaf}
    moved = {}
    for name, options in STEPS.items():
        train_op = optloss.optimize_loss(given, 0, 1e-3, "adam", **options)
        state = jax.eval_shape(train_op.init, params)
        step = jax.jit(train_op.update, donate_argnums=0).lower(state, params).compile()
        moved[name] = round(step.cost_analysis()["bytes accessed"] / (2 * elements), 1)
    return moved


def table(rows: list[dict[str, Any]], moved: dict[str, float]) -> str:
    """Return the rows in Markdown, megabytes a device."""
    lines = [
        "| MB a device | parameters, gradients | state | temporaries | ÷ gradients "
        "| model's collectives | norm's | bytes moved |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = [
            f"{row[name] / 1e6:.1f}" for name in ("parameters", "state", "temporaries")
        ]
        norm = [one["bytes"] for one in row["collectives_of_the_norm"]]
        cells = [
            row["step"],
            *sizes,
            f"{row['temporaries'] / row['gradients']:.3f}",
            str(row["collectives_of_the_model"]),
            f"{len(norm)}: {sum(norm)} B",
            f"{moved[row['step']]:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--length", type=int, default=8, help="tokens of a sequence")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 64)
    mesh = jax.make_mesh((8, 8), AXES, axis_types=(AxisType.Auto,) * 2)
    size = Size(layers=args.layers)
    leaves = jax.tree.leaves(shapes_of(size, mesh))
    result = {
        "jax": jax.__version__,
        "machine": platform.machine(),
        "mesh": dict(mesh.shape),
        "leaves": len(leaves),
        "parameters": sum(leaf.size for leaf in leaves),
        "tokens_per_sequence": args.length,
        "rows": simulate(size, mesh, args.length),
        "bytes_moved_per_parameter": traffic(),
    }
    printed = table(result["rows"], result["bytes_moved_per_parameter"])
    print(f"{result['leaves']} leaves, {result['parameters'] / 1e9:.2f}e9 parameters\n")
    print(printed)
    if (args.layers, args.length) == (Size.layers, 8):
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "large_model.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        (TABLES / "large_model.md").write_text(printed + "\n")


if __name__ == "__main__":
    main()

"""A model small enough for eight fake devices, and what those say to each other."""

import collections
import contextlib
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from compiled import always_run
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
NONE = contextlib.nullcontext()

SHARDED = {
    "embedding": P("data"),
    "dense": {"kernel": P("data"), "bias": P("data")},
    "scale": P(),
}
REPLICATED = jax.tree.map(lambda _: P(), SHARDED)
MIXED = {**SHARDED, "dense": {"kernel": P(None, "data"), "bias": P()}}


def make_mesh(shape, names, kind):
    size = math.prod(shape)
    return jax.make_mesh(
        shape, names, axis_types=(kind,) * len(names), devices=jax.devices()[:size]
    )


def line(kind, devices=8):
    """The first ``devices`` of the eight along one axis."""
    return make_mesh((devices,), ("data",), kind)


def entered(mesh):
    """The context that a loss with Explicit axes wants; Auto axes want none."""
    return jax.set_mesh(mesh) if EXPLICIT in mesh.axis_types else NONE


def put(tree, mesh, specs):
    """Place ``tree`` on the mesh; ``specs`` may be one for a whole subtree."""
    return jax.device_put(tree, jax.tree.map(lambda p: NamedSharding(mesh, p), specs))


def make_params(dtype=np.float32):
    random = np.random.default_rng(0)
    shapes = {
        "embedding": (16, 32),
        "dense": {"kernel": (32, 32), "bias": (32,)},
        "scale": (),
    }
    return jax.tree.map(
        lambda shape: np.asarray(random.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def make_batches(count, dtype=np.float32, rows=32):
    random = np.random.default_rng(1)
    return [
        tuple(random.normal(size=(rows, size)).astype(dtype) for size in (16, 32))
        for _ in range(count)
    ]


def loss(params, x, y):
    h = jnp.tanh(x @ params["embedding"])
    h = h @ params["dense"]["kernel"] + params["dense"]["bias"]
    return jnp.mean((params["scale"] * h - y) ** 2)


def explicit_loss(params, x, y):
    """The same where the types want each weight gathered before it is used."""
    params = jax.tree.map(lambda leaf: reshard(leaf, P(*[None] * leaf.ndim)), params)
    return loss(params, x, y)


def loss_on(mesh):
    return explicit_loss if EXPLICIT in mesh.axis_types else loss


def manual_loss(specs):
    """The same for one device of a ``shard_map`` over "data" alone."""

    def whole(leaf, spec):
        if "data" not in spec:
            return leaf
        return jax.lax.all_gather(leaf, "data", axis=spec.index("data"), tiled=True)

    def local(params, x, y):
        return jax.lax.pmean(loss(jax.tree.map(whole, params, specs), x, y), "data")

    return local


def specs_of(state, specs):
    """Specs for a whole state: a moment has its parameter's, the rest is replicated."""
    by_path = dict(jax.tree_util.tree_flatten_with_path(specs)[0])

    def spec(path, leaf):
        ends = (by_path.get(path[start:]) for start in range(len(path)))
        found = next(filter(None, ends), P())
        return found if leaf.ndim else P()

    return jax.tree_util.tree_map_with_path(spec, state)


def distance(found, expected):
    """The largest difference, as a share of the largest number of its leaf."""
    shares = jax.tree.map(
        lambda one, other: (
            np.abs(np.asarray(one) - np.asarray(other)).max()
            / max(np.abs(other).max(), np.finfo(np.float32).tiny)
        ),
        found,
        expected,
    )
    return max(jax.tree.leaves(shares))


class Collective(NamedTuple):
    kind: str
    arrays: int
    bytes: int


COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


def collectives(compiled):
    """What each collective of a compiled program moves, counted outside of branches."""
    found = collections.Counter()
    for shapes, kind in COLLECTIVE.findall(always_run(compiled.as_text())):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes = [
            WIDTHS[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in arrays
        ]
        found[Collective(kind, len(arrays), sum(sizes))] += 1
    return found

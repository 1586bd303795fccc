"""What the library adds to the collectives of the model, counted in the HLO."""

import functools
import math

import jax
import pytest
from distributed.meshes import (
    AUTO,
    EXPLICIT,
    MIXED,
    REPLICATED,
    SHARDED,
    Collective,
    collectives,
    entered,
    line,
    loss_on,
    make_batches,
    make_mesh,
    make_params,
    manual_loss,
    put,
    specs_of,
)
from jax.sharding import PartitionSpec as P

import optloss

OPTIONS = {
    "bare": {"summaries": []},
    "measured": {
        "clip_gradients": 1.0,
        "skip_nonfinite": True,
        "summaries": ["loss", "learning_rate", "global_gradient_norm"],
    },
    "noisy": {"summaries": [], "gradient_noise_scale": 0.1},
}
LEAVES = 4
THREE_SUMS = Collective("all-reduce", 3, 12)
ON_A_PLANE = {
    "embedding": P("data", "model"),
    "dense": {"kernel": P("data", "model"), "bias": P("model")},
    "scale": P(),
}
LAYOUTS = {
    "replicated": ((8,), ("data",), REPLICATED),
    "line": ((8,), ("data",), SHARDED),
    "plane": ((4, 2), ("data", "model"), ON_A_PLANE),
}
KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT])


@functools.cache
def under_jit(kind, layout, options):
    shape, names, specs = LAYOUTS[layout]
    mesh = make_mesh(shape, names, kind)
    op = optloss.optimize_loss(loss_on(mesh), 0, 0.1, "adam", **OPTIONS[options])
    with entered(mesh):
        state = op.init(put(make_params(), mesh, specs))
        batch = put(make_batches(1)[0], mesh, P("data"))
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(op.update, out_shardings=(placed, None))
        return collectives(step.lower(state, *batch).compile())


@functools.cache
def under_shard_map(layout, options, check_vma=True):
    specs = {"sharded": SHARDED, "mixed": MIXED}[layout]
    op = optloss.optimize_loss(
        manual_loss(specs), 0, 0.1, "adam",
        axis_name="data", replica_axis_name=(), **OPTIONS[options],
    )  # fmt: skip
    state = op.init(make_params())
    spread = specs_of(state, specs)
    step = jax.shard_map(
        op.update,
        mesh=line(AUTO),
        in_specs=(spread, P("data"), P("data")),
        out_specs=(spread, P()),
        check_vma=check_vma,
    )
    return collectives(jax.jit(step).lower(state, *make_batches(1)[0]).compile())


@pytest.mark.wide
@pytest.mark.parametrize("layout", ["line", "plane"])
def test_with_explicit_axes_it_is_one_all_reduce_of_three_numbers(layout):
    bare, full = (under_jit(EXPLICIT, layout, it) for it in ("bare", "measured"))
    assert bare - full == {}
    assert full - bare == {THREE_SUMS: 1}


@pytest.mark.parametrize("layout", ["line", "plane"])
def test_with_auto_axes_it_is_four_bytes_a_leaf(layout):
    """XLA's CPU compiler puts them into one instruction with parts of the gradient."""
    bare, full = (under_jit(AUTO, layout, it) for it in ("bare", "measured"))
    others = [
        {one: n for one, n in found.items() if one.kind != "all-reduce"}
        for found in (bare, full)
    ]
    assert others[0] == others[1]
    moved = [sum(one.bytes * n for one, n in found.items()) for found in (bare, full)]
    sets_of_axes = {"line": 1, "plane": 2}[layout]
    assert 0 < moved[1] - moved[0] <= 4 * LEAVES * sets_of_axes


@pytest.mark.parametrize("layout", ["sharded", "mixed"])
def test_under_shard_map_it_is_one_all_reduce_of_three_numbers(layout):
    bare, full = (under_shard_map(layout, it) for it in ("bare", "measured"))
    assert bare - full == {}
    assert full - bare == {THREE_SUMS: 1}


@pytest.mark.wide
def test_where_types_say_nothing_the_loss_is_asked_after_as_well():
    bare, full = (
        under_shard_map("sharded", it, check_vma=False) for it in ("bare", "measured")
    )
    assert full - bare == {THREE_SUMS: 1, Collective("all-reduce", 1, 4): 1}


@pytest.mark.wide
@KINDS
def test_data_parallel_training_adds_nothing(kind):
    bare, full = (under_jit(kind, "replicated", it) for it in ("bare", "measured"))
    assert full == bare
    assert sum(full.values()) == 1


@pytest.mark.wide
@KINDS
def test_noise_is_drawn_where_it_is_added(kind):
    assert under_jit(kind, "line", "noisy") == under_jit(kind, "line", "bare")


@pytest.mark.wide
def test_under_shard_map_noise_is_drawn_where_it_is_added():
    assert under_shard_map("mixed", "noisy") == under_shard_map("mixed", "bare")


def test_the_counter_sees_what_is_there():
    """Against a program whose collectives are known."""

    def reduce(x, y):
        return jax.lax.psum((x, y), "data"), jax.lax.all_gather(x, "data")

    program = jax.shard_map(
        reduce,
        mesh=line(AUTO),
        in_specs=P("data"),
        out_specs=((P(), P()), P()),
        check_vma=False,
    )
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((8, 3), (16,))]
    found = collectives(jax.jit(program).lower(*shapes).compile())
    assert found == {
        Collective("all-reduce", 2, 4 * (3 + 2)): 1,
        Collective("all-gather", 1, 4 * math.prod((8, 3))): 1,
    }

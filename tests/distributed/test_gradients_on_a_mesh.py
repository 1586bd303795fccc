"""Gradients slice by slice where the examples are spread over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributed.meshes import (
    AUTO,
    EXPLICIT,
    MIXED,
    REPLICATED,
    SHARDED,
    collectives,
    distance,
    entered,
    line,
    loss,
    loss_on,
    make_batches,
    make_params,
    manual_loss,
    put,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optloss.averages import averaged, start_average, update_average
from optloss.gradients import accumulate_gradients
from optloss.per_example import clip_per_example

ROWS = 4096
WAYS = {
    "accumulate": accumulate_gradients(4),
    "clip": clip_per_example(0.02),
    "clip in batches": clip_per_example(0.02, batch=1024),
}
# Per-example gradients of a parameter that is spread over the axis of the examples
# would have that axis twice, which the types of Explicit axes do not allow.
CASES = [
    (way, kind, specs)
    for way in WAYS
    for kind in (AUTO, EXPLICIT)
    for specs in (REPLICATED, SHARDED)
    if way == "accumulate" or kind == AUTO or specs == REPLICATED
]


def objective_of(loss):
    def objective(params, /, *args, model_state=None):
        return loss(params, *args), (model_state, args[0][:, 0])

    return objective


@pytest.mark.wide
@pytest.mark.parametrize(("way", "kind", "specs"), CASES)
def test_no_example_moves(way, kind, specs):
    batch, params = make_batches(1, rows=ROWS)[0], make_params()
    mesh = line(kind)
    with entered(mesh):
        spread = put(params, mesh, specs)
        differentiate = jax.jit(WAYS[way](objective_of(loss_on(mesh))))
        examples = jax.device_put(batch, NamedSharding(mesh, P("data")))
        program = differentiate.lower(spread, *examples).compile()
        (value, (_, aux)), gradients = program(spread, *examples)
    expected = jax.jit(WAYS[way](objective_of(loss)))(params, *batch)
    assert (
        distance(
            ((value, aux), gradients),
            ((expected[0][0], expected[0][1][1]), expected[1]),
        )
        < 2e-6
    )

    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    moved = collectives(program)
    assert {found.kind for found in moved} <= {"all-reduce", "all-gather"}
    gathered = [found for found in moved if found.kind == "all-gather"]
    assert all(found.bytes <= largest for found in gathered)
    if specs == REPLICATED:
        assert not gathered
    for gradient, leaf in zip(*map(jax.tree.leaves, (gradients, spread)), strict=True):
        assert gradient.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@pytest.mark.parametrize("specs", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_accumulation_under_shard_map(specs):
    batch, params = make_batches(1, rows=64)[0], make_params()
    mesh = line(AUTO)

    def local(params, *batch):
        differentiate = accumulate_gradients(4)(objective_of(manual_loss(specs)))
        (value, _), gradients = differentiate(params, *batch)
        return value, gradients

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, P("data"), P("data")), out_specs=(P(), specs)
    )
    found = jax.jit(step)(put(params, mesh, specs), *batch)
    assert distance(found, jax.jit(jax.value_and_grad(loss))(params, *batch)) < 2e-6


def manually(mesh, *args):
    return jax.shard_map(
        clip_per_example(1.0)(objective_of(loss)),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )(*args)


def by_pmap(mesh, params, *batch):
    rows = [leaf.reshape(8, -1, leaf.shape[1]) for leaf in batch]
    return jax.pmap(
        clip_per_example(1.0)(objective_of(loss)), "data", in_axes=(None, 0, 0)
    )(params, *rows)


@pytest.mark.parametrize("call", [manually, by_pmap])
def test_no_clipping_by_example_along_manual_axes(call):
    with pytest.raises(ValueError, match="clip_per_example") as caught:
        call(line(AUTO), make_params(), *make_batches(1, rows=64)[0])
    assert str(caught.value) == (
        "clip_per_example: cannot be used under shard_map or pmap (axis_name), where "
        "the loss is a mean over devices and its gradient mixes their examples. Use "
        "jit on a mesh."
    )


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_an_average_is_spread_as_its_parameters(kind):
    mesh = line(kind)
    with entered(mesh):
        params = put(make_params(), mesh, MIXED)
        state = start_average(params)
        moved = jax.tree.map(lambda leaf: leaf + 1, params)
        state = jax.jit(lambda state, moved: update_average(0.9, state, moved, None))(
            state, moved
        )
        found = averaged(state, params)
    for average, leaf in zip(*map(jax.tree.leaves, (found, params)), strict=True):
        assert average.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        np.testing.assert_allclose(average, leaf + jnp.float32(0.9), rtol=1e-5)

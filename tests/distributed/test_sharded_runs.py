"""Training under ``jit``, with parameters spread over eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled_programs
from distributed.meshes import (
    AUTO,
    EXPLICIT,
    REPLICATED,
    SHARDED,
    distance,
    entered,
    line,
    loss,
    loss_on,
    make_batches,
    make_mesh,
    make_params,
    put,
)
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding, reshard

import optloss

KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
EVERYTHING = {
    "gradient_noise_scale": 0.05,
    "gradient_multipliers": {"dense/*": 0.5},
    "clip_gradients": optloss.adaptive_clipping(std_factor=0.5, decay=0.8),
    "learning_rate_decay_fn": functools.partial(
        optloss.exponential_decay, decay_steps=10, decay_rate=0.5
    ),
    "skip_nonfinite": True,
    "summaries": ["loss", "learning_rate", "global_gradient_norm"],
}


def make_op(loss, **changes):
    options = {**EVERYTHING, **changes}
    return optloss.optimize_loss(loss, 0, 0.01, "adam", **options)


def poisoned_batches(dtype):
    """Twenty batches, the ninth of which holds a NaN."""
    batches = make_batches(20, dtype)
    batches[8][0][3, 5] = np.nan
    return batches


@functools.cache
def run_on_one_device(dtype):
    op = make_op(loss)
    state = op.init(make_params(dtype))
    for x, y in poisoned_batches(dtype):
        state, output = op(state, x, y)
    return state, output


@pytest.mark.wide
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize(
    ("kind", "specs"),
    [(AUTO, SHARDED), (EXPLICIT, SHARDED), (AUTO, REPLICATED)],
    ids=["Auto, sharded", "Explicit, sharded", "data-parallel"],
)
def test_twenty_steps_equal_those_of_one_device(kind, specs, dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        expected, last = run_on_one_device(dtype)
        mesh = line(kind)
        with entered(mesh):
            op = make_op(loss_on(mesh))
            state = op.init(put(make_params(dtype), mesh, specs))
            for batch in poisoned_batches(dtype):
                state, output = op(state, *put(batch, mesh, P("data")))
        assert int(state.opt_state.total) == 1
        assert 0 < state.opt_state.inner.clip.clipped < 19
        assert distance(state.params, expected.params) < tolerance
        assert distance(state.opt_state.inner.clip, expected.opt_state.inner.clip) < (
            10 * tolerance
        )
        assert distance(output.summaries, last.summaries) < 10 * tolerance


SQUARES = {
    "a": P("data", "model"),
    "b": P("model", "data"),
    "c": P(),
    "d": P(None, "data"),
    "e": P(("data", "model")),
}


def square_mesh(kind):
    return make_mesh((4, 2), ("data", "model"), kind)


def squares(mesh, names="abcde"):
    """Leaves of one shape in different shardings."""
    random = np.random.default_rng(2)
    values = {name: random.normal(size=(8, 8)).astype(np.float32) for name in names}
    return put(values, mesh, {name: SQUARES[name] for name in names})


def square_loss_on(mesh):
    """A loss whose gradients XLA likes to have in other shardings than the weights."""

    def square_loss(params, x):
        if EXPLICIT in mesh.axis_types:
            params = {
                name: reshard(leaf, P(None, None)) for name, leaf in params.items()
            }
        return sum(jnp.mean((x @ leaf + leaf[0]) ** 2) for leaf in params.values())

    return square_loss


def square_batch(mesh):
    spec = P("data", "model") if AUTO in mesh.axis_types else P("data")
    return put(np.ones((16, 8), np.float32), mesh, spec)


def shardings(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def moments(state):
    """The two moments of Adam, as trees like the parameters."""
    adam = state.opt_state.optimizer.inner[0]
    return adam.mu, adam.nu


@KINDS
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_new_state_lies_beside_its_parameters(kind, jitted):
    mesh = square_mesh(kind)
    params = squares(mesh)
    op = optloss.optimize_loss(square_loss_on(mesh), 0, 0.1, "adam", 0.1)
    state = (jax.jit(op.init) if jitted else op.init)(params)
    for tree in (state.params, *moments(state)):
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim), (
                name
            )
    for leaf in jax.tree.leaves((state.step, state.opt_state.noise)):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.mesh == mesh


def test_states_of_several_runs_lie_beside_their_parameters():
    mesh = line(EXPLICIT)
    with jax.set_mesh(mesh):
        many = put({"w": jnp.ones((3, 8))}, mesh, P(None, "data"))
        op = optloss.optimize_loss(lambda p: jnp.sum(p["w"] ** 2), 0, 0.1, "adam")
        states = jax.vmap(op.init)(many)
        moments = states.opt_state.optimizer.inner[0].mu["w"]
        assert moments.sharding == many["w"].sharding
        moved, output = jax.vmap(op.update)(states)
    assert output.loss.tolist() == [8.0, 8.0, 8.0]
    assert moved.params["w"].sharding == many["w"].sharding


@KINDS
def test_a_parameter_nobody_placed_is_put_on_the_mesh_with_the_others(kind):
    mesh = square_mesh(kind)
    params = {**squares(mesh), "free": jnp.ones((8, 8))}
    op = optloss.optimize_loss(square_loss_on(mesh), 0, 0.1, "adam")
    state = op.init(params)
    for tree in (state.params, *moments(state)):
        assert tree["free"].sharding.is_fully_replicated
        assert tree["free"].sharding.mesh == mesh
    assert isinstance(params["free"].sharding, SingleDeviceSharding)


@pytest.fixture
def compilations():
    """The number of programs that XLA compiled, so far."""
    counted = []

    def count(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            counted.append(duration)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield lambda: len(counted)
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.wide
@KINDS
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_fifty_steps_and_a_change_of_rate_compile_once(kind, jitted, compilations):
    mesh = square_mesh(kind)
    traces = []

    def traced(params, model_state, x):
        traces.append(None)
        return square_loss_on(mesh)(params, x), model_state

    op = optloss.optimize_loss(
        traced,
        0,
        0.1,
        "adam",
        gradient_noise_scale=0.1,
        clip_gradients=1.0,
        skip_nonfinite=True,
        summaries=["global_gradient_norm"],
        update_ops=[lambda seen, context: {"steps": seen["steps"] + 1}],
    )
    with entered(mesh):
        init = jax.jit(op.init) if jitted else op.init
        state = init(squares(mesh, "abc"), {"steps": jnp.zeros(3)})
        placed, x = shardings(state), square_batch(mesh)
        state, _ = op(state, x)
        after_one = compilations()
        for step in range(49):
            if step == 20:
                state = optloss.set_learning_rate(state, 0.01)
            state, _output = op(state, x)
    assert compilations() == after_one
    assert len(traces) == 1
    assert shardings(state) == placed
    assert float(state.opt_state.inner.optimizer.rate) == np.float32(0.01)
    assert np.array_equal(state.model_state["steps"], [50, 50, 50])


@pytest.mark.wide
@KINDS
def test_a_mesh_of_one_device_is_a_mesh(kind):
    """A program written for many devices, on the one that is there today."""
    mesh = line(kind, 1)
    op = optloss.optimize_loss(loss_on(mesh), 0, 0.1, "adam", clip_gradients=1.0)
    with entered(mesh):
        state = op.init(put(make_params(), mesh, SHARDED))
        placed = shardings(state)
        for x, y in make_batches(3):
            state, _ = op(state, *put((x, y), mesh, P()))
    assert shardings(state) == placed
    assert compiled_programs(op) == 1


@KINDS
def test_the_buffers_of_a_sharded_state_are_used_again(kind):
    mesh = square_mesh(kind)
    op = optloss.optimize_loss(
        square_loss_on(mesh), 0, 0.1, "adam", clip_gradients=1.0, skip_nonfinite=True
    )
    with entered(mesh):
        state = op.init(squares(mesh, "abc"))
        before = {
            shard.data.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves((state.params, state.opt_state))
            for shard in leaf.addressable_shards
            if leaf.ndim
        }
        after, _ = op(state, square_batch(mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    for leaf in jax.tree.leaves(after):
        for shard in leaf.addressable_shards if leaf.ndim else ():
            assert shard.data.unsafe_buffer_pointer() in before


@KINDS
def test_the_state_of_a_device_shrinks_as_devices_are_added(kind):
    params = {"kernel": np.ones((64, 128), np.float32), "bias": np.ones(64, np.float32)}
    op = optloss.optimize_loss(lambda params: 0.0, None, 0.1, "adam")
    sizes = {}
    for devices in (1, 2, 4, 8):
        state = op.init(put(params, line(kind, devices), P("data")))
        sizes[devices] = sum(
            leaf.addressable_shards[0].data.nbytes
            for leaf in jax.tree.leaves((state.params, moments(state)))
        )
    assert sizes == {n: 3 * 4 * (64 * 128 + 64) // n for n in (1, 2, 4, 8)}


@pytest.mark.wide
@pytest.mark.parametrize("colocate", [False, True])
def test_a_gradient_may_be_kept_beside_its_parameter(colocate):
    mesh = square_mesh(AUTO)
    seen = []

    def look(pairs):
        for gradient, _ in pairs:
            jax.debug.inspect_array_sharding(gradient, callback=seen.append)
        return pairs

    op = optloss.optimize_loss(
        square_loss_on(mesh),
        0,
        0.1,
        "adam",
        clip_gradients=look,
        colocate_gradients_with_ops=colocate,
    )
    state = op.init(squares(mesh))
    expected = shardings(state.params)
    op(state, square_batch(mesh))
    beside = [
        one.is_equivalent_to(other, 2)
        for one, other in zip(seen, expected, strict=True)
    ]
    assert all(beside) == colocate


def noise_on(mesh, tree, specs, **options):
    noise = optloss.add_gradient_noise(0.05, annealing=0.55, key=3, **options)
    tree = put(tree, mesh, specs)

    @jax.jit
    def draw(tree):
        updates, _ = noise.update(tree, noise.init(tree), step=jnp.asarray(7))
        return updates

    with entered(mesh):
        return jax.tree.map(np.asarray, draw(tree))


LEAVES = {
    "kernel": np.zeros((64, 24), np.float32),
    "half": jnp.zeros(1000, jnp.bfloat16),
    "complex": np.zeros((3, 64), np.complex64),
    "scalar": np.zeros((), np.float32),
}
SPREAD = {
    "kernel": P("data"),
    "half": P("data"),
    "complex": P(None, "data"),
    "scalar": P(),
}


@functools.cache
def noise_on_one_device(distribution):
    return noise_on(line(AUTO, 1), LEAVES, SPREAD, distribution=distribution)


def assert_identical(found, expected):
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


@pytest.mark.wide
@KINDS
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_noise_is_bit_identical_on_any_number_of_devices(kind, devices):
    found = noise_on(line(kind, devices), LEAVES, SPREAD, distribution="normal")
    assert_identical(found, noise_on_one_device("normal"))


@pytest.mark.wide
@KINDS
def test_truncated_and_double_noise_are_bit_identical_on_eight_devices(kind):
    with jax.enable_x64(True):
        leaves = {"kernel": LEAVES["kernel"], "double": np.zeros(64)}
        specs = {"kernel": P("data", "model"), "double": P("model")}
        options = {"distribution": "truncated_normal"}
        found = noise_on(square_mesh(kind), leaves, specs, **options)
        alone = noise_on(
            make_mesh((1, 1), ("data", "model"), kind), leaves, specs, **options
        )
    assert_identical(found, alone)

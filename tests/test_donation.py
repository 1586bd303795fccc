"""A donated state shares no buffer with the caller, with itself or with arguments."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compilations, compiled_programs
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optloss

SHAPES = {"w": (4, 3), "b": (3,)}


def parameters():
    values = {
        name: jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape) / 10
        for name, shape in SHAPES.items()
    }
    # A strong-typed scalar: rprop keeps its step sizes beside the guard's counters.
    return values | {"scale": jnp.asarray(np.float32(1.5))}


def loss(params, x):
    return jnp.mean((x @ params["w"] * params["scale"] + params["b"]) ** 2)


def keeps_everything():
    """An optimizer that keeps its starting weights, one array twice, and a constant."""
    constant = jnp.arange(3.0)

    def init(params):
        zeros = jnp.zeros(5)
        return {"start": params, "twice": (zeros, zeros), "constant": constant}

    def update(updates, state, params=None):
        del params
        return updates, state

    made = optax.GradientTransformation(init, update)
    return optax.chain(made, optax.sgd(0.1)), constant


INSTANCES = {
    "lbfgs": lambda: optax.lbfgs(linesearch=None, learning_rate=0.1),
    "keeps everything": lambda: keeps_everything()[0],
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
}
OPTIMIZERS = [*optloss.list_optimizers(), *INSTANCES]


def op_of(optimizer, **options):
    made = INSTANCES[optimizer]() if optimizer in INSTANCES else optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optloss.optimize_loss(
            loss, global_step=0, learning_rate=0.01, optimizer=made, **options
        )


def run(op, state, x):
    for _ in range(3):
        state, output = op(state, x)
    assert np.isfinite(output.loss)
    return state


def check(op, params, x, init=None):
    state = (init or op.init)(params)
    with compilations() as names:
        state = run(op, state, x)
    for leaf in jax.tree.leaves((params, x)):
        assert not leaf.is_deleted()
    assert names.count("_handed_over") == 1
    return state


@pytest.mark.wide
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Specifying a key:UserWarning")
def test_what_the_caller_gave_lives_on(optimizer):
    params = parameters()
    if optimizer == "sm3":  # optax's fails on scalars
        params["scale"] = params["scale"][None]
    check(op_of(optimizer), params, jnp.ones((2, 4)))


KEEPERS = ["rprop", "prodigy", "dog", "cocob", "madgrad", *INSTANCES]


@pytest.mark.wide
@pytest.mark.parametrize("optimizer", KEEPERS)
@pytest.mark.parametrize("how", ["guarded", "jitted init", "sharded"])
def test_however_the_state_was_made(optimizer, how):
    params, x = parameters(), jnp.ones((2, 4))
    op = op_of(optimizer, skip_nonfinite=how == "guarded")
    if how == "sharded":
        params, x = on_a_mesh(AxisType.Auto, params), on_a_mesh(AxisType.Auto, x)
    check(op, params, x, jax.jit(op.init) if how == "jitted init" else None)


def on_a_mesh(kind, tree):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    return jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, NamedSharding(mesh, PartitionSpec(*["data"] * (leaf.ndim > 1)))
        ),
        tree,
    )


@pytest.mark.wide
@pytest.mark.parametrize("optimizer", KEEPERS)
def test_no_two_leaves_share_a_buffer_on_an_explicit_mesh(optimizer):
    params = on_a_mesh(AxisType.Explicit, parameters())
    with jax.set_mesh(params["w"].sharding.mesh):
        state = op_of(optimizer).init(params)
    leaves = _whole(state)
    own = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert len(own) == len(leaves)
    assert own.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in _whole(params))


def _whole(tree):
    return [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]


def test_arrays_of_the_optimizer_live_on():
    made, constant = keeps_everything()
    op = optloss.optimize_loss(loss, 0, None, made)
    run(op, op.init(parameters()), jnp.ones((2, 4)))
    assert not constant.is_deleted()


def test_the_chain_in_a_loop_of_the_callers():
    params, x = parameters(), jnp.ones((2, 4))
    tx = optloss.make_optimizer(0.1, "prodigy", skip_nonfinite=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(opt_state, params):
        updates, opt_state = tx.update(jax.grad(loss)(params, x), opt_state, params)
        return opt_state, optax.apply_updates(params, updates)

    opt_state, moved = tx.init(params), params
    for _ in range(3):
        opt_state, moved = step(opt_state, moved)
    assert not any(leaf.is_deleted() for leaf in params.values())


def test_an_array_of_the_state_as_an_argument():
    def loss_of(params, teacher, step, *, more):
        return jnp.sum((params - teacher - 1) ** 2) + 0.0 * step + more["rate"] * 0

    op = optloss.optimize_loss(loss_of, 0, 0.1, "SGD")
    state = op.init(jnp.array([1.0, 2.0]))
    for _ in range(2):
        rate = state.opt_state.optimizer.base
        state, output = op(state, state.params, state.step, more={"rate": rate})
        assert output.loss == 2.0
    assert compiled_programs(op) == 1


def test_without_donation_nothing_is_copied():
    op = optloss.optimize_loss(
        lambda params, other: jnp.sum(params * other), 0, 0.1, "SGD", donate=False
    )
    state = op.init(jnp.ones(2))
    seen, _ = op(state, state.params)
    assert not state.params.is_deleted()
    assert seen.step == 1


def test_the_state_of_a_key_goes_on():
    op = optloss.optimize_loss(
        lambda params, model_state: (jnp.sum(params), model_state), 0, 0.1, "SGD"
    )
    key = jax.random.key(3)
    state = op.init(jnp.ones(2), {"key": key})
    for _ in range(2):
        state, _ = op(state)
    assert jnp.all(jax.random.key_data(key) == jax.random.key_data(jax.random.key(3)))


def test_a_restored_python_int_is_compiled_for_once():
    op = optloss.optimize_loss(lambda params: jnp.sum(params**2), 0, 0.1, "adam")
    state = op.init(jnp.ones(2))._replace(step=7)
    for _ in range(3):
        state, _ = op(state)
    assert (state.step, compiled_programs(op)) == (10, 1)
    assert op.update(state._replace(step=7))[0].step == 8


@pytest.mark.parametrize("call", ["train_op", "train_op.update"])
def test_a_donated_state_is_refused(call):
    op = optloss.optimize_loss(lambda params: jnp.sum(params**2), 0, 0.1, "adam")
    state = op.init(jnp.ones(2))
    op(state)
    with pytest.raises(ValueError, match="earlier call") as raised:
        (op if call == "train_op" else op.update)(state)
    assert str(raised.value) == (
        f"{call}(state): this state was given to an earlier call, which donated its "
        "buffers. Go on from the state that call returned, or build the op with "
        "donate=False."
    )


@pytest.mark.wide
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Specifying a key:UserWarning")
@pytest.mark.filterwarnings("ignore:optimize_loss.*instance:UserWarning")
def test_nnx_models_keep_nothing_of_the_callers(optimizer):
    nnx = pytest.importorskip("flax.nnx")
    from optloss.integrations.nnx import optimize_loss

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    given = jnp.ones((3, 2))
    model.kernel.set_value(given)
    op = optimize_loss(
        model,
        lambda model, x, step: jnp.mean(model(x) ** 2) + 0 * step,
        *(0, 0.01, INSTANCES[optimizer]() if optimizer in INSTANCES else optimizer),
        skip_nonfinite=True,
    )
    for _ in range(3):
        output = op(jnp.ones((4, 3)), op.state.step)
    assert np.isfinite(output.loss)
    assert not given.is_deleted()
    assert compiled_programs(op.train_op) == 1

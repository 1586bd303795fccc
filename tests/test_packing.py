"""Packed leaves train as single ones do, and a state goes from form to form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optloss
from optloss.fast.packing import PackedTree, is_elementwise

SIZE = 200


def parameters(*, half=False, imaginary=False):
    """Leaves below, at and above the size, of several dtypes, and odd ones."""
    random = np.random.default_rng(0)
    shapes = {
        "layer_0": {"bias": (7,), "kernel": (20, 10)},
        "layer_1": {"scale": (), "wide": (21, 10)},
    }
    params = jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    params |= {"table": jnp.arange(3), "none": None, "empty": jnp.zeros((0, 2))}
    if half:
        params["half"] = jnp.asarray(random.normal(size=(3, 5)), jnp.bfloat16)
    if imaginary:
        params["spin"] = jnp.array([1 + 2j, -0.5j])
    return params


def loss(params, x):
    leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.dtype != jnp.int32]
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    return sum(
        jnp.sum((i + 1) * jnp.abs(leaf - x) ** 2) for i, leaf in enumerate(wide)
    ) / len(wide)


def make(optimizer="Adam", **changed):
    arguments = {"global_step": 0, "learning_rate": 0.01, "optimizer": optimizer}
    return optloss.optimize_loss(loss, **(arguments | changed))


def run(train_op, state, steps=4):
    step = jax.jit(train_op.update)
    for i in range(steps):
        state, output = step(state, 0.1 * i)
    return state, output


def assert_close(one, other, tolerance=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        wide = np.complex128 if np.iscomplexobj(a) else np.float64
        loose = 4e-3 if a.dtype == jnp.bfloat16 else tolerance
        np.testing.assert_allclose(
            np.asarray(a, wide), np.asarray(b, wide), rtol=loose, atol=tolerance
        )


EVERYTHING = {
    "gradient_noise_scale": 0.1,
    "gradient_multipliers": {"**/bias": 2.0, "layer_1/scale": 0.0},
    "clip_gradients": 1.0,
    "learning_rate_multipliers": {"layer_0/**": 0.5},
    "learning_rate_decay_fn": lambda rate, step: rate / (1 + step),
    "skip_nonfinite": True,
    "summaries": ["gradient_norm", "learning_rate"],
}
CASES = {
    "Ftrl, which needs the parameters": {"optimizer": "Ftrl"},
    "an instance": {"optimizer": optax.rmsprop(0.01, momentum=0.5)},
    "everything": EVERYTHING,
    "a function clips": {
        "clip_gradients": lambda pairs: [(g / 2, v) for g, v in pairs]
    },
    "a transform for noise": {"gradient_noise_scale": optax.centralize()},
    "variables": {"variables": ["**/bias", "layer_1/**"], "clip_gradients": 1.0},
}


@pytest.mark.wide
@pytest.mark.parametrize("name", CASES)
def test_packed_leaves_train_as_single_ones_do(name):
    results = []
    for size in (0, SIZE):
        train_op = make(**CASES[name], pack_small_leaves=size)
        state, output = run(train_op, train_op.init(parameters()))
        results.append((state.params, output))
    assert_close(*results)


@pytest.mark.wide
def test_dtypes_are_kept_apart():
    params = parameters(half=True, imaginary=True)
    results = []
    for chosen in (0, 7):
        train_op = make("Momentum", pack_small_leaves=chosen, clip_gradients=1.0)
        state, _ = run(train_op, train_op.init(params), steps=2)
        results.append(state.params)
    assert_close(*results)


def packed_trees(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, PackedTree))
    return [node for node in nodes if isinstance(node, PackedTree)]


def test_the_state_holds_a_vector_where_it_held_many_leaves():
    params = parameters(half=True)
    state = make(pack_small_leaves=SIZE).init(params).opt_state
    trees = packed_trees(state)
    assert len(trees) == 2
    for tree in trees:
        found = {key.split("-")[0]: vec.ndim for key, vec in tree.vectors.items()}
        assert found == {"float32": 1, "bfloat16": 1}
        large = [leaf.shape for leaf in jax.tree.leaves(tree.large)]
        assert large == [(21, 10)]
    assert len(jax.tree.leaves(state)) < len(jax.tree.leaves(make().init(params)))


def test_make_optimizer_refuses_what_looks_at_single_leaves():
    with pytest.raises(ValueError, match=r"^make_optimizer\(pack") as refused:
        optloss.make_optimizer(0.1, "lars", pack_small_leaves=SIZE)
    assert str(refused.value) == (
        "make_optimizer(pack_small_leaves=200): the optimizer 'lars' looks at the "
        "shapes, norms or names of single leaves, so packed leaves would train "
        "differently. Leave it at 0."
    )


def by_name(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "bias" not in jax.tree_util.keystr(path), params
    )


def by_rank(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("transform", "elementwise"),
    [
        (optax.adamw(0.1), True),
        (optax.adamw(0.1, mask=by_rank), False),
        (optax.adamw(0.1, mask=by_name), False),
        (optax.adamw(0.1, mask={"layer": True}), False),
        (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)), True),
        (optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1)), False),
        (optax.chain(optax.centralize(), optax.sgd(0.1)), False),
        (optax.sgd(optax.linear_schedule(0.1, 0.0, 9)), True),
        (optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), True),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else "",
)
def test_what_is_elementwise_is_found_out_by_trying(transform, elementwise):
    assert is_elementwise(transform) is elementwise


def test_a_traced_rate_may_be_packed():
    @jax.jit
    def trained(rate):
        train_op = make(learning_rate=rate, pack_small_leaves=SIZE)
        return train_op.update(train_op.init(parameters()), 0.1)[0].params

    plain = make(learning_rate=0.02)
    expected, _ = plain(plain.init(parameters()), 0.1)
    assert_close(trained(0.02), expected.params)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("optimizer", "variables"),
    [("Adam", None), ("Momentum", ["**/bias", "layer_1/**"])],
)
def test_a_state_goes_to_the_other_form_and_back(optimizer, variables):
    arguments = {"variables": variables, "clip_gradients": 1.0, "skip_nonfinite": True}
    plain = make(optimizer, **arguments)
    packed = make(optimizer, **arguments, pack_small_leaves=SIZE)
    to = functools.partial(optloss.pack_state, params=parameters(), size=SIZE)
    back = functools.partial(optloss.unpack_state, params=parameters(), size=SIZE)
    state, _ = run(plain, plain.init(parameters()), steps=2)

    there = to(state, variables=variables)
    assert jax.tree.structure(there) == jax.tree.structure(packed.init(parameters()))
    again = back(there, variables=variables)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    bare = to(state.opt_state, variables=variables)
    assert_close(bare, there.opt_state, 0)

    # Either run goes on from the other's state as from its own.
    expected, _ = run(plain, state, steps=2)
    found, _ = run(packed, there, steps=2)
    assert_close(found.params, expected.params)
    assert_close(back(found, variables=variables), expected)


@pytest.mark.wide
def test_a_checkpoint_goes_on_under_the_other_setting(tmp_path):
    plain, packed = make("Momentum"), make("Momentum", pack_small_leaves=SIZE)
    params = {name: leaf for name, leaf in parameters().items() if name[0] == "l"}
    state, _ = run(packed, packed.init(params), steps=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.eval_shape(packed.init, params)
        )
    unpacked = optloss.unpack_state(restored, params, SIZE)
    assert jax.tree.structure(unpacked) == jax.tree.structure(plain.init(params))
    expected, _ = run(packed, state, steps=2)
    found, _ = run(plain, unpacked, steps=2)
    assert_close(found.params, expected.params)


@pytest.mark.parametrize("params", [jnp.ones(3), jnp.ones((20, 20)), [jnp.ones(3)]])
def test_a_tree_of_one_leaf_is_packed_and_unpacked(params):
    plain, packed = (
        optloss.make_optimizer(0.1, "adam", pack_small_leaves=size, clip_gradients=1.0)
        for size in (0, SIZE)
    )
    state = plain.init(params)
    there = optloss.pack_state(state, params, SIZE)
    assert jax.tree.structure(there) == jax.tree.structure(packed.init(params))
    assert_close(optloss.unpack_state(there, params, SIZE), state, 0)


def test_shapes_are_enough_to_pack_by():
    plain = make()
    state, _ = run(plain, plain.init(parameters()), steps=1)
    shapes = jax.eval_shape(lambda: parameters())
    assert_close(
        optloss.pack_state(state, shapes, SIZE),
        optloss.pack_state(state, parameters(), SIZE),
        0,
    )


def test_gradients_of_another_dtype_meet_the_same_state():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3)}
    gradients = {"a": jnp.full(3, 0.5), "b": jnp.full(3, 0.25)}
    results = []
    for size in (0, SIZE):
        tx = optloss.make_optimizer(0.1, "Adam", pack_small_leaves=size)
        state = tx.init(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(gradients, state, params)
        results.append(jax.tree.map(lambda u: u.astype(jnp.float32), updates))
    assert_close(*results)


def test_the_names_tell_selections_of_like_shapes_apart():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    structures = {
        jax.tree.structure(
            optloss.make_optimizer(
                0.1, "adam", pack_small_leaves=3, variables=name
            ).init(params)
        )
        for name in "ab"
    }
    assert len(structures) == 2


@pytest.mark.parametrize("size", [None, -1, True, 2.0, "4"])
@pytest.mark.parametrize("call", [optloss.pack_state, optloss.unpack_state])
def test_a_size_that_is_none(call, size):
    state = make().init(parameters())
    with pytest.raises(ValueError, match=rf"{call.__name__}\(size=.*an int >= 0"):
        call(state, parameters(), size)


OTHER = {
    "another size": (parameters(), 10, None),
    "other variables": (parameters(), SIZE, ["layer_0/*"]),
    "other names": (
        {n.replace("layer", "block"): leaf for n, leaf in parameters().items()},
        SIZE,
        None,
    ),
    "another shape": (parameters() | {"layer_1": {"scale": jnp.ones(2)}}, SIZE, None),
    "another split": (
        parameters()
        | {"layer_0": {"bias": jnp.ones(20), "kernel": jnp.ones((17, 11))}},
        SIZE,
        None,
    ),
}


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_a_state_is_unpacked_as_it_was_packed(other, optimizer):
    state = make(optimizer, pack_small_leaves=SIZE).init(parameters())
    params, size, variables = OTHER[other]
    for given in (state, state.opt_state):
        with pytest.raises(ValueError, match=r"^unpack_state\(size="):
            optloss.unpack_state(given, params, size, variables=variables)


@pytest.mark.parametrize("other", ["other names", "another shape"])
def test_a_state_is_packed_for_its_own_parameters(other):
    state = make().init(parameters())
    for given in (state, state.opt_state):
        with pytest.raises(ValueError, match=r"^pack_state\(size="):
            optloss.pack_state(given, OTHER[other][0], SIZE)


def test_the_gradients_that_multi_steps_adds_up_are_not_packed():
    params = {"a": jnp.ones(3), "b": jnp.ones(20)}
    plain, packed = (
        optax.MultiSteps(
            optloss.make_optimizer(0.1, "adam", pack_small_leaves=size), 2
        ).gradient_transformation()
        for size in (0, 4)
    )
    state = optloss.pack_state(plain.init(params), params, 4)
    assert jax.tree.structure(state) == jax.tree.structure(packed.init(params))
    packed.update(params, state, params)


@pytest.mark.parametrize("state", [optax.adam(0.1).init({"a": jnp.ones(3)}), {}, None])
def test_a_state_of_another_optimizer_is_not_packed(state):
    with pytest.raises(ValueError, match=r"^pack_state\(state=.*hold the state of a"):
        optloss.pack_state(state, {"a": jnp.ones(3)}, 4)


def test_what_a_wrong_size_is_told():
    params = {"a": jnp.ones(3), "b": jnp.ones(5)}
    state = optloss.make_optimizer(0.1, "adam", pack_small_leaves=4).init(params)
    with pytest.raises(ValueError, match="otherwise") as raised:
        optloss.unpack_state(state, params, 8)
    assert str(raised.value) == (
        "unpack_state(size=8): the state was packed otherwise: this size, params and "
        "variables would pack 'a', 'b'. Pass those it was made with."
    )
    with pytest.raises(ValueError, match="packed already"):
        optloss.pack_state(state, params, 4)


def test_nothing_is_packed_at_size_0():
    state = make().init(parameters())
    for call in (optloss.pack_state, optloss.unpack_state):
        assert jax.tree.structure(call(state, parameters(), 0)) == (
            jax.tree.structure(state)
        )

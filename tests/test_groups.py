"""Several optimizers, several rates, by name: one clip, one partition, one program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import compiled_programs
from optax import contrib

import optloss
from optloss.fast.packing import PackedTree

WIDTH = 8


def layer(key):
    keys = jax.random.split(key, 4)
    return {
        "attention": {
            "qkv": {"kernel": jax.random.normal(keys[0], (WIDTH, 3 * WIDTH)) / 3},
            "out": {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH)) / 3},
        },
        "mlp": {
            "up": {"kernel": jax.random.normal(keys[2], (WIDTH, 2 * WIDTH)) / 3},
            "down": {"kernel": jax.random.normal(keys[3], (2 * WIDTH, WIDTH)) / 4},
        },
        "norm_1": {"scale": jnp.ones(WIDTH)},
        "norm_2": {"scale": jnp.ones(WIDTH)},
    }


def transformer():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "embedding": jax.random.normal(keys[0], (11, WIDTH)),
        "layers": [layer(keys[1]), layer(keys[2])],
        "head": {"kernel": jax.random.normal(keys[3], (WIDTH, 11)) / 3},
    }


def normalised(x, scale):
    return x * scale / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def loss(params, tokens):
    x = params["embedding"][tokens[:, :-1]]
    for one in params["layers"]:
        h = normalised(x, one["norm_1"]["scale"])
        q, k, v = jnp.split(h @ one["attention"]["qkv"]["kernel"], 3, -1)
        weights = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / WIDTH**0.5)
        x += weights @ v @ one["attention"]["out"]["kernel"]
        h = normalised(x, one["norm_2"]["scale"])
        up = jax.nn.relu(h @ one["mlp"]["up"]["kernel"])
        x += up @ one["mlp"]["down"]["kernel"]
    logits = x @ params["head"]["kernel"]
    right = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - right)


def tokens(seed):
    return jax.random.randint(jax.random.key(seed), (4, 7), 0, 11)


def make(optimizer, learning_rate, **more):
    return optloss.optimize_loss(
        loss,
        global_step=0,
        optimizer=optimizer,
        learning_rate=learning_rate,
        **({"clip_gradients": 0.5} | more),
    )


def by_hand(members, label):
    def labels(params):
        names = optloss.names.leaf_names(params)
        return jax.tree.unflatten(jax.tree.structure(params), list(map(label, names)))

    return optax.chain(optax.clip_by_global_norm(0.5), optax.partition(members, labels))


def steps_of(train_op, tx, steps, *, on_end):
    """Return the largest relative differences of the parameters, and the norms."""
    state = train_op.init(transformer())

    @jax.jit
    def reference(params, opt_state, batch):
        gradients = jax.grad(loss)(params, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        moved = optax.apply_updates(params, updates)
        return moved, opt_state, optax.tree.norm(gradients)

    params, opt_state = state.params, tx.init(state.params)
    worst, norms = 0.0, []
    for i in range(steps):
        params = jax.tree.map(jnp.copy, params if on_end else state.params)
        params, opt_state, norm = reference(params, opt_state, tokens(i))
        state, output = train_op(state, tokens(i))
        norms.append((float(norm), float(gradient_norm(output))))
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True)
        worst = max(worst, *(float(jnp.max(jnp.abs(a - b))) for a, b in pairs))
    return worst, np.array(norms)


def gradient_norm(output):
    return output.summaries["OptimizeLoss/global_norm/gradient_norm"]


MUON = {
    "**/scale": "adamw(weight_decay=0.0)",
    "embedding": "adamw(weight_decay=0.01)",
    "head/**": "adamw(weight_decay=0.01)",
    "**": "muon",
}


@pytest.mark.wide
def test_muon_adamw_and_no_decay_on_norms_equal_a_partition_by_hand():
    train_op = make(
        MUON,
        {"head/**": 3e-3, "**/kernel": 0.02, "**": 1e-3},
        summaries=["global_gradient_norm"],
    )
    members = {
        "norm": optax.adamw(1e-3, weight_decay=0.0),
        "embedding": optax.adamw(1e-3, weight_decay=0.01),
        "head": optax.adamw(3e-3, weight_decay=0.01),
        "matrix": contrib.muon(0.02),
    }

    def label(name):
        if name.endswith("scale"):
            return "norm"
        return name.split("/")[0] if name.split("/")[0] in members else "matrix"

    # Over many steps Muon amplifies rounding, so each starts from the same parameters.
    worst, norms = steps_of(train_op, by_hand(members, label), 50, on_end=False)
    assert worst < 1e-6
    np.testing.assert_allclose(norms[:, 0], norms[:, 1], rtol=1e-5)
    assert np.mean(norms[:, 0] > 0.5) > 0.9


@pytest.mark.wide
def test_adamw_adam_and_sgd_equal_a_partition_by_hand_over_fifty_steps():
    train_op = make(
        {"layers/**": "adamw", "embedding": "adam", "**": "sgd"},
        {"layers/0/**": 1e-3, "layers/1/**": 2e-3, "**": 5e-3},
        summaries=["global_gradient_norm"],
    )
    members = {
        "first": optax.adamw(1e-3),
        "second": optax.adamw(2e-3),
        "embedding": optax.adam(5e-3),
        "head": optax.sgd(5e-3),
    }
    places = {"layers/0": "first", "layers/1": "second"}

    def label(name):
        return places.get(name[:8], name.split("/")[0])

    worst, norms = steps_of(train_op, by_hand(members, label), 50, on_end=True)
    assert worst < 1e-5
    np.testing.assert_allclose(norms[:, 0], norms[:, 1], rtol=1e-4)


# Small parameters from here on.

PARAMS = {
    "body": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))},
    "head": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},
}


def quadratic(params, scale=1.0):
    return scale * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def small(optimizer="sgd", learning_rate=0.1, **more):
    return optloss.optimize_loss(
        quadratic,
        optimizer=optimizer,
        learning_rate=learning_rate,
        **({"global_step": 0} | more),
    )


RATES = {"head/*": 0.2, "**": 0.1}


def warm_up(step):
    return 0.1 * step


def refusal(call, *args, **kwargs):
    with pytest.raises(ValueError, match=r".") as refused:
        call(*args, **kwargs)
    return str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"optimizer": {"hed/*": "adam", "**": "sgd"}},
            "optimize_loss, optimizer: the pattern 'hed/*' matches no parameter. "
            "Nearest: 'head/bias', 'head/kernel'.",
        ),
        (
            {"learning_rate": {"**": 0.1, "head/*": 0.2}},
            "optimize_loss, learning_rate: the pattern 'head/*' is left nothing by the "
            "patterns before it, which already match 'head/bias', 'head/kernel'. Put "
            "the narrower pattern first.",
        ),
        (
            {"optimizer": {"head/*": "adam"}},
            "optimize_loss, optimizer: no key matches the trained parameters "
            "'body/bias', 'body/kernel'. Add '**' as the last key, for all the rest.",
        ),
        (
            {"learning_rate": {"**/kernel": 0.1, "head/*": 0.2}},
            "optimize_loss, learning_rate: no key matches the trained parameter "
            "'body/bias'. Add '**' as the last key, for all the rest.",
        ),
        (
            {
                "optimizer": {"head/*": lambda: optax.sgd(0.1), "**": "sgd"},
                "learning_rate": {"head/bias": None, "**": 0.1},
            },
            "optimize_loss, learning_rate: 'head/kernel' has a rate, but its "
            "optimizer, optax.chain(identity, scale), is a function without arguments, "
            "which brings its own. Map it to None.",
        ),
        (
            {
                "optimizer": {"head/*": optax.sgd(0.1), "**": "sgd"},
                "learning_rate": {"head/*": 0.1, "**": None},
            },
            "optimize_loss, learning_rate: 'body/bias' has the rate None, but its "
            "optimizer, optax.sgd, takes one. Give a number or a schedule.",
        ),
    ],
)
def test_what_is_refused_at_init(arguments, message):
    assert refusal(small(**arguments).init, PARAMS) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"optimizer": {}},
            "optimize_loss(optimizer={}): maps no parameter to anything. Add '**' for "
            "all.",
        ),
        (
            {"learning_rate": {3: 0.1}},
            "optimize_loss(learning_rate={3: 0.1}): the key 3 is neither a name nor a "
            "compiled pattern.",
        ),
        (
            {"learning_rate": {"a": 0.1, re.compile("a"): 0.2}},
            "optimize_loss(learning_rate={'a': 0.1, re.compile('a'): 0.2}): two keys "
            "have the text 'a', by which the state names its groups. Write one of them "
            "differently.",
        ),
        (
            {"learning_rate": {"**": -1.0}},
            "optimize_loss(learning_rate['**']=-1.0): must be a finite real number >= "
            "0, a 0-d array or a schedule (a function of the step).",
        ),
        (
            {
                "learning_rate": {"**": warm_up},
                "learning_rate_decay_fn": lambda rate, step: rate,
            },
            "optimize_loss(learning_rate['**']=warm_up): a schedule and "
            "learning_rate_decay_fn exclude each other. Give a number.",
        ),
        (
            {"learning_rate": {"**": None}},
            "optimize_loss(learning_rate['**']=None): may be None only where the "
            "optimizer brings its own rate: with an instance or a function without "
            "arguments.",
        ),
        (
            {"optimizer": {"**": 3}},
            "optimize_loss(optimizer['**']=3): must be a name, a function of the "
            "learning rate, a class or an optax transformation.",
        ),
        (
            {"global_step": None, "learning_rate": {"**": lambda step: 0.1}},
            "optimize_loss(global_step=None): global_step is required for a schedule "
            "as learning_rate. Start it at 0.",
        ),
        (
            {"optimizer": {"**": "muon"}, "pack_small_leaves": 8},
            "optimize_loss(pack_small_leaves=8): each optimizer of {'**': 'muon'} "
            "looks at the shapes, norms or names of single leaves, so packed leaves "
            "would train differently. Leave it at 0.",
        ),
    ],
)
def test_what_is_refused_in_the_call(arguments, message):
    assert refusal(small, **arguments) == message


def test_a_rate_is_read_and_set_by_key_without_a_compilation():
    train_op = small("sgd", RATES)
    state, output = train_op(train_op.init(PARAMS))
    assert set(output.summaries) == {
        "OptimizeLoss/loss",
        "OptimizeLoss/learning_rate/head/*",
        "OptimizeLoss/learning_rate/**",
    }
    before = optloss.get_learning_rate(state)
    state = optloss.set_learning_rate(state, {"head/*": 0.4})
    state, output = train_op(state)
    assert compiled_programs(train_op) == 1
    assert before == {"head/*": jnp.float32(0.2), "**": jnp.float32(0.1)}
    np.testing.assert_allclose(state.params["head"]["bias"], 0.6 * 0.2, rtol=1e-6)
    np.testing.assert_allclose(state.params["body"]["bias"], 0.8 * 0.8, rtol=1e-6)
    state = optloss.set_learning_rate(state, 0.0)
    kept = jax.tree.map(jnp.copy, state.params)
    state, output = train_op(state)
    assert output.summaries["OptimizeLoss/learning_rate/head/*"] == 0
    assert jax.tree.all(jax.tree.map(jnp.array_equal, kept, state.params))


def test_rates_round_trip_on_bare_states_under_jit_and_in_a_scan():
    train_op = small("adam", RATES)
    state = train_op.init(PARAMS)
    bare = optloss.set_learning_rate(state.opt_state, {"**": 0.5})
    assert optloss.get_learning_rate(bare)["**"] == 0.5
    double = jax.jit(
        lambda s: optloss.set_learning_rate(
            s, {k: 2 * v for k, v in optloss.get_learning_rate(s).items()}
        )
    )
    assert optloss.get_learning_rate(double(state))["head/*"] == jnp.float32(0.4)

    def body(state, _):
        state, _ = train_op.update(state)
        rates = optloss.get_learning_rate(state)
        return optloss.set_learning_rate(state, {"**": rates["**"] / 2}), rates["**"]

    state, rates = jax.lax.scan(body, state, length=3)
    np.testing.assert_allclose(rates, [0.1, 0.05, 0.025], rtol=1e-6)


def test_one_rate_is_a_scalar_whatever_the_optimizers():
    train_op = small({"head/*": "adam", "**": "sgd"}, 0.1)
    state, output = train_op(train_op.init(PARAMS))
    assert optloss.get_learning_rate(state) == jnp.float32(0.1)
    assert "OptimizeLoss/learning_rate" in output.summaries
    assert refusal(optloss.set_learning_rate, state, {"head/*": 0.1}) == (
        "set_learning_rate(value={'head/*': 0.1}): the state holds one learning rate, "
        "without a key. Give a number."
    )


def test_a_schedule_and_an_instance_keep_their_own():
    train_op = small(
        {"head/bias": optax.sgd(0.3), "**": "sgd"},
        {"head/*": optax.constant_schedule(0.2), "**": 0.1},
    )
    state = train_op.init(PARAMS)
    assert optloss.get_learning_rate(state) == {"**": jnp.float32(0.1)}
    assert refusal(optloss.set_learning_rate, state, {"head/*": 0.1}) == (
        "set_learning_rate(value={'head/*': 0.1}): the state holds no base rate for "
        "'head/*': schedules and instances keep their own. It holds '**'."
    )
    state, _ = train_op(optloss.set_learning_rate(state, 0.05))
    for path, left in {
        ("head", "bias"): 0.4, ("head", "kernel"): 0.6, ("body", "bias"): 0.9,
    }.items():  # fmt: skip
        np.testing.assert_allclose(state.params[path[0]][path[1]], left, rtol=1e-6)


def test_what_is_read_outlives_the_next_donated_step():
    train_op = small("sgd", RATES)
    state = train_op.init(PARAMS)
    rates, params = optloss.get_learning_rate(state), train_op.evaluation_params(state)
    train_op(state)
    assert rates["**"] == jnp.float32(0.1)
    assert params["head"]["bias"][0] == 1


def test_frozen_parameters_count_for_keys_and_need_none():
    train_op = small({"head/*": "adam", "body/kernel": "sgd"}, 0.1, variables="head/*")
    state, _ = train_op(train_op.init(PARAMS))
    np.testing.assert_array_equal(state.params["body"]["bias"], 1)
    held = jax.tree.leaves(
        state.opt_state.optimizer, is_leaf=lambda n: hasattr(n, "inner_states")
    )
    [partition] = [node for node in held if hasattr(node, "inner_states")]
    assert set(partition.inner_states) == {"head/*"}


def test_a_group_packs_by_itself():
    arguments = {
        "optimizer": {"**/kernel": "muon", "**": "adam"},
        "learning_rate": {"**/kernel": 0.02, "**": 0.1},
    }
    plain, packed = small(**arguments), small(**arguments, pack_small_leaves=8)
    one, other = plain.init(PARAMS), packed.init(PARAMS)
    trees = jax.tree.leaves(
        other.opt_state, is_leaf=lambda node: isinstance(node, PackedTree)
    )
    assert sum(isinstance(node, PackedTree) for node in trees) == 2
    for _ in range(3):
        (one, _), (other, _) = plain(one), packed(other)
    for a, b in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)


SEVERAL = {
    "optimizers": ({"head/*": "adam", "**": "Momentum"}, 0.1, ()),
    "rates": ("adam", {"**/kernel": 0.02, "**": 0.1}, ()),
    "both": ({"head/*": "adam", "**": "Adagrad"}, {"**/kernel": 0.02, "**": 0.1}, ()),
    "one without moments": ({"**/kernel": "sgd", "**": "adam"}, 0.1, ()),
    "an own rate": (
        {"**/bias": optax.sgd(0.1, momentum=0.9), "**": "adam"},
        {"**/bias": None, "**": 0.1},
        (),
    ),
    "one that is not packed": (
        {"**/kernel": "muon", "**": "adam"},
        {"**/kernel": 0.02, "**": 0.1},
        ("**/kernel",),
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_a_state_of_groups_is_packed_and_unpacked(case):
    optimizer, rate, unpacked = SEVERAL[case]
    arguments = {"optimizer": optimizer, "learning_rate": rate, "skip_nonfinite": True}
    arguments |= {"donate": False}
    plain, packed = small(**arguments), small(**arguments, pack_small_leaves=6)
    state, _ = plain(plain.init(PARAMS))
    there = optloss.pack_state(state, PARAMS, 6, unpacked_groups=unpacked)
    assert jax.tree.structure(there) == jax.tree.structure(packed.init(PARAMS))
    back = optloss.unpack_state(there, PARAMS, 6)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    (one, _), (other, _) = plain(state), packed(there)
    for a, b in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizers", "unpacked", "message"),
    [
        (
            {"head/*": "sgd", "**": "sgd"},
            (),
            "pack_state(size=6): the groups '**', 'head/*' have no moments of the "
            "shapes of these parameters, so which are theirs is not known. Pass the "
            "params and variables of the run; if its optimizers keep no moments, use "
            "carry_over or train_op.adopt of the run that is to go on.",
        ),
        (
            {"head/*": "adam", "**": "sgd"},
            "body/*",
            "pack_state(size=6): the state has no group 'body/*' but '**', 'head/*'.",
        ),
        (
            {"head/*": "adam", "**": "sgd"},
            3,
            "pack_state(unpacked_groups=3): must be a name, a pattern or a list of "
            "them.",
        ),
    ],
)
def test_groups_that_pack_state_cannot_know(optimizers, unpacked, message):
    state = small(optimizers).init(PARAMS)
    with pytest.raises(ValueError, match="pack_state") as raised:
        optloss.pack_state(state, PARAMS, 6, unpacked_groups=unpacked)
    assert str(raised.value) == message


def test_a_group_of_which_nothing_is_selected_is_not_packed():
    state = small({"head/*": "adam", "**": "sgd"}).init(PARAMS)
    there = optloss.pack_state(state, PARAMS, 6, variables="head/*")
    nodes = jax.tree.leaves(there, is_leaf=lambda n: isinstance(n, PackedTree))
    packed = [node for node in nodes if isinstance(node, PackedTree)]
    assert [sum(v.size for v in node.vectors.values()) for node in packed] == [8, 8]


def test_multipliers_decay_and_skipping_work_with_groups():
    train_op = small(
        "sgd",
        RATES,
        learning_rate_multipliers={"**/bias": 0.5},
        learning_rate_decay_fn=lambda rate, step: rate / (1 + step),
        skip_nonfinite=True,
    )
    state = train_op.init(PARAMS)
    state, _ = train_op(state, jnp.inf)
    state, output = train_op(state)
    assert optloss.get_summaries(state)["skipped/total"] == 1
    # At step 1 the rates are halved.
    np.testing.assert_allclose(state.params["head"]["bias"], 1 - 0.1, rtol=1e-6)
    np.testing.assert_allclose(state.params["body"]["kernel"], 1 - 0.1, rtol=1e-6)
    assert output.summaries["OptimizeLoss/learning_rate/head/*"] == jnp.float32(0.1)


def test_half_precision_parameters_keep_their_states_dtypes():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    train_op = small({"**/kernel": "adam", "**": "Momentum"}, RATES)
    state = train_op.init(params)
    before = jax.tree.map(lambda leaf: leaf.dtype, state)
    for _ in range(2):
        state, _ = train_op(state)
    assert compiled_programs(train_op) == 1
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == before


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_groups_compile_once(kind):
    types = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(types,))
    spec = jax.sharding.PartitionSpec("data")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    params = {"a": jnp.ones((4, 4)), "b": {"c": jnp.ones((4, 4))}}
    params = jax.device_put(params, sharding)
    train_op = small({"a": "adam", "**": "Momentum"}, {"a": 0.1, "**": 0.2})
    with jax.set_mesh(mesh):
        state = train_op.init(params)
        for _ in range(2):
            state, _ = train_op(state)
            state = optloss.set_learning_rate(state, {"a": 0.05})
        rates = optloss.get_learning_rate(state)
    assert compiled_programs(train_op) == 1
    assert rates["a"] == jnp.float32(0.05)
    for leaf in jax.tree.leaves(state.params):
        assert leaf.sharding.is_equivalent_to(sharding, 2)


def test_one_group_is_the_same_program_as_none():
    def program(optimizer, learning_rate):
        train_op = small(optimizer, learning_rate, clip_gradients=1.0)
        state = train_op.init(PARAMS)
        lowered = jax.jit(train_op.update).lower(state)
        text = lowered.compile().as_text()
        return re.sub(r"metadata=\{[^}]*\}|[%.\w-]*\.\d+|, sharding=\S+", "", text)

    plain = program("adam", 0.1)
    lines = [line for line in plain.splitlines() if "fusion" in line]
    for arguments in (({"**": "adam"}, 0.1), ("adam", {"**": 0.1})):
        other = program(*arguments)
        assert [line for line in other.splitlines() if "fusion" in line] == lines


def test_the_table_names_optimizer_and_rate():
    train_op = small(
        {
            "head/bias": optax.sgd(0.3),
            "**/bias": "adamw(weight_decay=0.0)",
            "**": "sgd",
        },
        RATES,
        variables=["head/*", "body/bias"],
    )
    text = train_op.describe(PARAMS).split("\n\n")[1]
    rows = [re.split(r"  +", line) for line in text.splitlines()]
    assert rows == [
        ["parameter", "shape", "dtype", "trained", "optimizer", "rate"],
        [
            "body/bias",
            "3",
            "float32",
            "trained",
            "optax.adamw(weight_decay=0.0)",
            "0.1",
        ],
        ["body/kernel", "2x3", "float32", "frozen"],
        ["head/bias", "2", "float32", "trained", "optax.chain(identity, scale)", "own"],
        ["head/kernel", "3x2", "float32", "trained", "optax.sgd", "0.2"],
    ]


def test_a_model_of_nnx_is_grouped_by_the_same_names():
    nnx = pytest.importorskip("flax.nnx")
    from optloss.integrations import nnx as by_nnx

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    op = by_nnx.optimize_loss(
        model,
        lambda model: jnp.sum(model.kernel**2) + jnp.sum(model.bias),
        global_step=0,
        learning_rate={"kernel": 0.1, "bias": 0.5},
        optimizer={"kernel": "sgd", "**": "SGD"},
    )
    op()
    np.testing.assert_allclose(model.kernel[...], 0.8 * before["kernel"], rtol=1e-6)
    np.testing.assert_allclose(model.bias[...], before["bias"] - 0.5, rtol=1e-6)
    tx = optloss.make_optimizer({"kernel": 0.1, "bias": 0.5}, "sgd")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m.bias[...]))(model))
    assert optloss.get_summaries(optimizer)["learning_rate/bias"] == 0.5


HALF, WHOLE = optax.sgd(0.25), optax.sgd(0.5)  # of a gradient of 2 w


@pytest.mark.parametrize("pack_small_leaves", [0, 10])
@pytest.mark.parametrize(
    ("rates", "optimizers", "w", "b"),
    [
        ({"w": 0.1, "**": 0.2}, HALF, 0.125, 0.125),
        ({"w": None, "**": None}, lambda: HALF, 0.125, 0.125),
        (None, {"w": lambda: WHOLE, "**": lambda: HALF}, 0.0, 0.125),
        (None, {"w": WHOLE, "**": lambda: HALF}, 0.0, 0.125),
        ({"w": None, "**": 0.1}, {"w": lambda: WHOLE, "**": "sgd"}, 0.0, 0.512),
        ({"b": 0.1, "w": None}, {"w": lambda: WHOLE, "**": "sgd"}, 0.0, 0.512),
        ({"w": 0.1, "**": 0.1}, {"w": WHOLE, "**": "sgd"}, 0.0, 0.512),
    ],
    ids=[
        "an instance", "a function", "functions", "both", "one and a name",
        "a name and one", "an instance and a name",
    ],
)  # fmt: skip
def test_own_rates_stay_own(rates, optimizers, w, b, pack_small_leaves):
    """What is left of parameters of 1 after three steps, by arithmetic."""
    op = optloss.optimize_loss(
        lambda params: sum(jnp.sum(leaf**2) for leaf in params.values()),
        0,
        rates,
        optimizers,
        pack_small_leaves=pack_small_leaves,
    )
    state = op.init({"w": jnp.ones(2), "b": jnp.ones(1)})
    for _ in range(3):
        state, _ = op(state)
    np.testing.assert_allclose(state.params["w"], [w, w], atol=1e-6)
    np.testing.assert_allclose(state.params["b"], [b], rtol=1e-6)

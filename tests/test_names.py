"""One name for a leaf whatever the tree is made of, and patterns that must bite."""

import dataclasses
import re
import time
from typing import Any, NamedTuple

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import optloss
from optloss.names import check_patterns, first_match, leaf_names, matcher, select

VALUES = {
    "body/kernel": jnp.array([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.25]]),
    "body/bias": jnp.array([0.5, -0.5]),
    "head/kernel": jnp.array([[2.0], [-3.0]]),
    "head/bias": jnp.array([1.0]),
}


class Dense(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


class Pair(NamedTuple):
    body: Dense
    head: Dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layers:
    body: Layer
    head: Layer


class EquinoxLayer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array


class EquinoxLayers(eqx.Module):
    body: EquinoxLayer
    head: EquinoxLayer

    def __call__(self, x):
        return x


class NnxLayer(nnx.Module):
    def __init__(self, kernel, bias):
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(bias)


class NnxLayers(nnx.Module):
    def __init__(self, body, head):
        self.body = body
        self.head = head


def of(outer, inner):
    def build(values):
        parts = [
            inner(values[f"{part}/kernel"], values[f"{part}/bias"])
            for part in ("body", "head")
        ]
        return outer(*parts)

    return build


KINDS = {
    "dict": of(
        lambda body, head: {"body": body, "head": head},
        lambda kernel, bias: {"kernel": kernel, "bias": bias},
    ),
    "FrozenDict": of(
        lambda body, head: FrozenDict({"body": body, "head": head}),
        lambda kernel, bias: {"kernel": kernel, "bias": bias},
    ),
    "list": of(lambda *parts: list(parts), lambda *parts: list(parts)),
    "tuple": of(lambda *parts: parts, lambda *parts: parts),
    "NamedTuple": of(Pair, Dense),
    "dataclass": of(Layers, Layer),
    "nnx State": lambda values: nnx.state(KINDS["nnx Module"](values)),
    "nnx Module": of(NnxLayers, NnxLayer),
    "Equinox module": of(EquinoxLayers, EquinoxLayer),
}
NUMBERED = {"list", "tuple"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def translated(kind, name):
    """A name or pattern of the dict, in the words of another kind of tree."""
    if kind not in NUMBERED:
        return name
    for word, number in (("body", 0), ("head", 1), ("kernel", 0), ("bias", 1)):
        name = name.replace(word, str(number))
    return name


def values_of(kind, tree):
    """The leaves of a tree by the names they have in the dict."""
    leaves = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
    return {name: leaves[translated(kind, name)] for name in VALUES}


@every_kind
def test_a_leaf_has_one_name(kind):
    tree = KINDS[kind](VALUES)
    assert set(leaf_names(tree)) == {translated(kind, name) for name in VALUES}
    found = values_of(kind, tree)
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found[name], value)


RULES: dict[str, dict[str, Any]] = {
    "gradient multipliers": {
        "gradient_multipliers": {"head/kernel": 2.0, "**/bias": 0.0, "*/kernel": 1.0}
    },
    "a name": {"variables": "body/bias"},
    "globs": {"variables": ["head/*", "**/bias"]},
    "everything": {
        "optimizer": "adam",
        "gradient_noise_scale": 0.0,
        "clip_gradients": 1.0,
        "gradient_multipliers": {"**/kernel": 2.0},
        "learning_rate_multipliers": {"body/**": 0.5, "head/*": 0.1},
        "variables": ["**/kernel", "head/bias"],
    },
}


def in_words_of(kind, rules):
    words = dict(rules)
    for argument in ("gradient_multipliers", "learning_rate_multipliers"):
        if argument in rules:
            words[argument] = {
                translated(kind, pattern): value
                for pattern, value in rules[argument].items()
            }
    if "variables" in rules:
        names = rules["variables"]
        names = [names] if isinstance(names, str) else names
        words["variables"] = [translated(kind, name) for name in names]
    return words


def distance(params):
    return sum(jnp.sum((leaf - 0.125) ** 2) for leaf in jax.tree.leaves(params))


def trained(kind, **arguments):
    arguments = {"learning_rate": 0.1, "optimizer": "SGD"} | arguments
    train_op = optloss.optimize_loss(distance, 0, **arguments)
    state = train_op.init(KINDS[kind](VALUES))
    for _ in range(2):
        state, _ = train_op(state)
    return values_of(kind, state.params)


EXPECTED: dict[str, dict[str, jax.Array]] = {}


@pytest.mark.wide
@pytest.mark.parametrize("rules", ["gradient multipliers", "everything"])
@every_kind
def test_the_same_rules_have_the_same_effect_in_every_kind_of_tree(kind, rules):
    if rules not in EXPECTED:
        EXPECTED[rules] = trained("dict", **RULES[rules])
    found = trained(kind, **in_words_of(kind, RULES[rules]))
    for name, expected in EXPECTED[rules].items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, err_msg=name)


def test_the_effect_is_what_the_rules_say():
    moved = {
        rules: {
            name: value - VALUES[name]
            for name, value in trained("dict", **RULES[rules]).items()
        }
        for rules in ("gradient multipliers", "a name", "globs")
    }
    # Two steps of gradient descent towards 0.125, at 0.1 times the multiplier.
    for rules, factors in {
        "gradient multipliers": (1, 0, 2, 0),
        "a name": (0, 1, 0, 0),
        "globs": (0, 1, 1, 1),
    }.items():
        for name, factor in zip(VALUES, factors, strict=True):
            share = 1 - (1 - 0.2 * factor) ** 2
            np.testing.assert_allclose(
                moved[rules][name], share * (0.125 - VALUES[name]), rtol=1e-5, atol=1e-7
            )


@every_kind
@pytest.mark.parametrize("selection", ["predicate", "mask", "mask of a dict"])
def test_a_predicate_and_a_mask_select_in_every_kind_of_tree(kind, selection):
    wanted = {name: name in ("body/kernel", "head/bias") for name in VALUES}
    names = {translated(kind, name) for name in VALUES if wanted[name]}
    tree = KINDS[kind](VALUES)
    variables = {
        "predicate": lambda name, leaf: name in names and leaf.ndim > 0,
        "mask": jax.tree.unflatten(
            jax.tree.structure(tree), [name in names for name in leaf_names(tree)]
        ),
        "mask of a dict": KINDS["dict"](wanted),
    }[selection]
    if selection == "mask of a dict" and leaf_names(tree) != leaf_names(variables):
        with pytest.raises(ValueError, match="a tree of bools must have the structure"):
            select("call", variables, tree)
        return
    selected = select("call", variables, tree)
    assert dict(zip(leaf_names(tree), selected, strict=True)) == {
        translated(kind, name): value for name, value in wanted.items()
    }


@every_kind
def test_the_chain_alone_keeps_to_the_names_where_the_path_changes(kind):
    """An nnx.Optimizer shows `init` a State of Variables and `update` bare arrays."""
    tx = optloss.make_optimizer(
        0.1,
        "SGD",
        **in_words_of(
            kind,
            {"gradient_multipliers": {"head/**": 2.0}, "variables": ["**/kernel"]},
        ),
    )
    tree = KINDS[kind](VALUES)
    bare = nnx.to_pure_dict(tree) if kind == "nnx State" else tree
    updates, _ = tx.update(bare, tx.init(tree), bare)
    found = values_of(kind, updates)
    for name, factor in zip(VALUES, (1, 0, 2, 0), strict=True):
        np.testing.assert_allclose(found[name], -0.1 * factor * VALUES[name], rtol=1e-6)
    assert np.signbit(found["body/bias"]).all()


def test_an_nnx_optimizer_obeys_the_names():
    model = KINDS["nnx Module"](VALUES)
    tx = optloss.make_optimizer(
        0.1,
        "SGD",
        learning_rate_multipliers={"head/*": 0.5},
        variables=nnx.state(jax.tree.map(lambda leaf: leaf.ndim == 2, model)),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(distance)(model))
    found = values_of("nnx Module", model)
    for name, factor in zip(VALUES, (1, 0, 0.5, 0), strict=True):
        move = -0.2 * factor * (VALUES[name] - 0.125)
        np.testing.assert_allclose(found[name], VALUES[name] + move, rtol=1e-6)


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (1.0, [""]),
        (None, []),
        ({}, []),
        ([[1.0], (2.0,)], ["0/0", "1/0"]),
        ({"value": 1.0, "a": {"value": 2.0}}, ["a/value", "value"]),
        ({"a/b": 1.0, 3: 2.0}, None),
        ({3: 1.0, 20: 2.0}, ["3", "20"]),
        (nnx.Param(jnp.zeros(1)), [""]),
        ({"value": nnx.Param(jnp.zeros(1))}, ["value"]),
        (nnx.Param({"value": 1.0, "x": 2.0}), ["value", "x"]),
        ({"a": optax.MaskedNode(), "b": None, "c": 1.0}, ["c"]),
        (optax.EmptyState(), []),
    ],
)
def test_names_of_odd_trees(tree, names):
    if names is None:
        with pytest.raises(ValueError, match="Comparator raised exception"):
            leaf_names(tree)
    else:
        assert leaf_names(tree) == names


NAMES = [
    "w",
    "body/w",
    "body/bias",
    "body/mlp/w",
    "body/mlp/0/w",
    "layers_0/w",
    "layers_10/w",
    "head/bias",
    "a*b/w",
]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("w", ["w"]),
        ("body", []),
        ("body/w", ["body/w"]),
        ("*", ["w"]),
        ("*/w", ["body/w", "layers_0/w", "layers_10/w", "a*b/w"]),
        ("**/bias", ["body/bias", "head/bias"]),
        ("**/w", [name for name in NAMES if name.split("/")[-1] == "w"]),
        ("body/**", [name for name in NAMES if name.startswith("body/")]),
        ("body/**/w", ["body/w", "body/mlp/w", "body/mlp/0/w"]),
        ("body/*/w", ["body/mlp/w"]),
        ("body/*/*/w", ["body/mlp/0/w"]),
        ("**/mlp/**", ["body/mlp/w", "body/mlp/0/w"]),
        ("layers_*/w", ["layers_0/w", "layers_10/w"]),
        ("layers_?/w", []),
        ("layers_[0-9]/w", []),
        ("*_1*/w", ["layers_10/w"]),
        ("**", NAMES),
        ("**/**", NAMES),
        ("body/**/**/w", ["body/w", "body/mlp/w", "body/mlp/0/w"]),
        ("body/**/**", [name for name in NAMES if name.startswith("body/")]),
        ("b**w", ["body/w", "body/mlp/w", "body/mlp/0/w"]),
        ("a*b/w", ["a*b/w"]),
        ("body.w", []),
        ("", []),
        (re.compile(r"layers_\d/w"), ["layers_0/w"]),
        (re.compile(r"BODY/.*s", re.IGNORECASE), ["body/bias"]),
        (re.compile(r"body"), []),
    ],
)
def test_what_a_pattern_matches(pattern, matched):
    matches = matcher(pattern)
    assert [name for name in NAMES if matches(name)] == matched


def matches_by_definition(pattern, name):
    """Segment by segment: ``*`` in one segment, ``**`` over any number of them."""

    def fits(glob, segment):
        if not glob:
            return not segment
        if glob[0] == "*":
            return any(fits(glob[1:], segment[i:]) for i in range(len(segment) + 1))
        return segment[:1] == glob[0] and fits(glob[1:], segment[1:])

    def spans(globs, segments):
        if not globs:
            return not segments
        if globs[0] == "**":
            return any(spans(globs[1:], segments[i:]) for i in range(len(segments) + 1))
        return (
            bool(segments)
            and fits(globs[0], segments[0])
            and spans(globs[1:], segments[1:])
        )

    return spans(pattern.split("/"), name.split("/"))


GLOBS = st.lists(st.sampled_from(["**", "*", "a", "b", "a*", "*b", "*a*"]), min_size=1)
PATHS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "aab"]), min_size=1)


@hypothesis.settings(deadline=None)
@hypothesis.given(GLOBS, PATHS)
def test_a_glob_matches_as_its_definition_says(globs, path):
    pattern, name = "/".join(globs), "/".join(path)
    assert matcher(pattern)(name) == matches_by_definition(pattern, name)


def test_the_first_match_wins():
    assigned = first_match(["body/w", "body/**", "**/w"], NAMES)
    assert dict(zip(NAMES, assigned, strict=True)) == {
        "w": 2,
        "body/w": 0,
        "body/bias": 1,
        "body/mlp/w": 1,
        "body/mlp/0/w": 1,
        "layers_0/w": 2,
        "layers_10/w": 2,
        "head/bias": None,
        "a*b/w": 2,
    }


MANY = [f"block_{i}/kernel" for i in range(12)]


@pytest.mark.parametrize(
    ("patterns", "names", "message"),
    [
        (
            ["dense_9/*"],
            ["dense_0/kernel", "dense_1/kernel", "out"],
            "call: the pattern 'dense_9/*' matches no parameter. Nearest: "
            "'dense_0/kernel', 'dense_1/kernel'.",
        ),
        (
            ["kernal", "**"],
            ["kernel", "bias"],
            "call: the pattern 'kernal' matches no parameter. Nearest: 'kernel'.",
        ),
        (
            [re.compile("layers?_x")],
            ["layer_0", "layer_1"],
            "call: the pattern 'layers?_x' matches no parameter. Nearest: 'layer_0', "
            "'layer_1'.",
        ),
        (
            ["zzz"],
            MANY,
            "call: the pattern 'zzz' matches no parameter. The parameters are "
            "'block_0/kernel', 'block_1/kernel', 'block_10/kernel', 'block_11/kernel', "
            "'block_2/kernel', 'block_3/kernel', 'block_4/kernel', 'block_5/kernel', "
            "'block_6/kernel', 'block_7/kernel' and 2 more.",
        ),
        (
            ["w"],
            [],
            "call: the pattern 'w' matches no parameter. There are none.",
        ),
        (
            ["*/kernel", "head/kernel"],
            ["body/kernel", "head/kernel", "head/bias"],
            "call: the pattern 'head/kernel' is left nothing by the patterns before "
            "it, which already match 'head/kernel'. Put the narrower pattern first.",
        ),
        (
            ["block_1/*", "block_0/*", re.compile("block_[01]/.*")],
            MANY,
            "call: the pattern 'block_[01]/.*' is left nothing by the patterns before "
            "it, which already match 'block_0/kernel', 'block_1/kernel'. Put the "
            "narrower pattern first.",
        ),
        (
            ["dense/kernel:0"],
            ["dense/kernel", "dense/bias"],
            "call: the pattern 'dense/kernel:0' matches no parameter: names have no "
            "':0' ending here. Write 'dense/kernel'.",
        ),
        (
            ["dense/kernal:0"],
            ["dense/kernel", "out"],
            "call: the pattern 'dense/kernal:0' matches no parameter: names have no "
            "':0' ending here. Nearest: 'dense/kernel'.",
        ),
    ],
)
def test_a_pattern_that_does_not_bite_is_an_error(patterns, names, message):
    with pytest.raises(ValueError, match=r"^call: ") as refused:
        check_patterns("call", patterns, names)
    assert str(refused.value) == message


def test_a_name_that_really_ends_so_is_found():
    check_patterns("call", ["w:0"], ["w:0", "w"])
    assert first_match(["w:0"], ["w:0", "w"]) == [0, None]


def test_a_multiplier_of_a_frozen_parameter_is_no_error():
    train_op = optloss.optimize_loss(
        distance, 0, 0.1, "SGD", gradient_multipliers={"a": 2.0}, variables="b"
    )
    state = train_op.init({"a": jnp.ones(1), "b": jnp.ones(1)})
    state, _ = train_op(state)
    assert state.params["a"] == 1.0


def test_only_leaves_of_floats_are_selected():
    params = {"w": jnp.ones(2), "z": jnp.ones(2, jnp.complex64), "i": jnp.arange(2)}
    params |= {"h": jnp.ones(2, jnp.bfloat16), "flag": jnp.array(True)}
    for variables in (None, "**", lambda name, leaf: True, dict.fromkeys(params, True)):
        selected = dict(
            zip(leaf_names(params), select("call", variables, params), strict=True)
        )
        assert {name for name, wanted in selected.items() if wanted} == {"w", "z", "h"}


@pytest.mark.parametrize("variables", [3, [], {}, [1.0], {"w": 1}])
def test_what_cannot_select_is_refused(variables):
    with pytest.raises(ValueError, match=r"^call\(variables="):
        select("call", variables, {"w": jnp.ones(2)})


def test_two_thousand_leaves_and_fifty_rules_take_no_time():
    params = {
        f"block_{i}": {f"layer_{j}": {"kernel": 1.0, "bias": 1.0} for j in range(20)}
        for i in range(50)
    }
    rules = {f"block_{i}/**": 1.0 + i for i in range(50)}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), jnp.float32), params)
    seconds = []
    for _ in range(3):  # the garbage of a long run of tests may be collected in one
        start = time.process_time()
        names = leaf_names(shapes)
        assigned = first_match(tuple(rules), names)
        selected = select("call", list(rules), shapes)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
    assert len(names) == len(set(assigned)) * 40 == 2000
    assert all(selected)

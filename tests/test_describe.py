"""The chain in words: it fits a terminal, folds like layers, allocates nothing."""

import functools
import math
import re

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optloss
from optloss.describe import Row, fold


def make(**changed):
    arguments = {"global_step": 0, "learning_rate": 0.1, "optimizer": "adam"}
    return optloss.optimize_loss(lambda params: 0.0, **(arguments | changed))


def table(text):
    """The rows of the table, header first, each split where two spaces are."""
    lines = text.split("\n\n")[1].splitlines()
    return [re.split(r"  +", line) for line in lines]


def totals(text):
    return text.split("\n\n")[2]


PARAMS = {
    "embedding": jnp.zeros((1000, 8)),
    "head": {"bias": jnp.zeros(()), "kernel": jnp.zeros((8, 2), jnp.bfloat16)},
    "table": jnp.arange(3),
}


def test_the_whole_description():
    train_op = make(
        gradient_noise_scale=0.01,
        gradient_multipliers={"**/bias": 2, "embedding": 5.0},
        clip_gradients=optloss.adaptive_clipping(),
        learning_rate_multipliers={"head/*": 1 / 3},
        learning_rate_decay_fn=functools.partial(
            optloss.exponential_decay, decay_steps=1000, decay_rate=0.96
        ),
        variables="head/*",
        skip_nonfinite=True,
    )
    assert train_op.describe(PARAMS) == (
        "OptimizeLoss: gradient -> add_gradient_noise(0.01) -> gradient_multipliers(2 "
        "rules)\n"
        "    -> adaptive_clipping\n"
        "    -> optax.adam at 0.1 decayed by exponential_decay(decay_steps=1000, "
        "decay_rate=0.96)\n"
        "    -> learning_rate_multipliers(1 rule) -> step + 1 (skipped if not finite)\n"
        "\n"
        "parameter    shape   dtype     trained  x gradient  x rate\n"
        "embedding    1000x8  float32   frozen\n"
        "head/bias    scalar  float32   trained  2           0.333333\n"
        "head/kernel  8x2     bfloat16  trained              0.333333\n"
        "table        3       int32     frozen\n"
        "\n"
        "trained: 17 parameters, frozen: 8,003, optimizer state: "
        f"{bytes_of(train_op, PARAMS)} bytes"
    )


def bytes_of(train_op, params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(train_op.init(params).opt_state))


def test_the_plain_table_has_four_columns():
    text = make().describe({"w": jnp.zeros((2, 3))})
    assert text.splitlines() == [
        "OptimizeLoss: gradient -> optax.adam at 0.1 -> step + 1",
        "",
        "parameter  shape  dtype    trained",
        "w          2x3    float32  trained",
        "",
        # Two moments of six float32, Adam's count, the step, the base and last rate.
        "trained: 6 parameters, frozen: 0, optimizer state: 64 bytes",
    ]


@pytest.mark.parametrize("optimizer", ["adam", "SGD", "Ftrl", "adafactor"])
@pytest.mark.parametrize("variables", [None, "head/kernel"])
def test_the_bytes_are_those_of_the_state(optimizer, variables):
    train_op = make(optimizer=optimizer, variables=variables, skip_nonfinite=True)
    expected = bytes_of(train_op, PARAMS)
    assert totals(train_op.describe(PARAMS)).endswith(f": {expected:,} bytes")


def test_nothing_is_allocated_for_shapes():
    huge = {
        f"layers_{i}": {"kernel": jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)}
        for i in range(100)
    }
    text = make(clip_gradients=1.0, gradient_noise_scale=0.1).describe(huge)
    assert table(text)[1:] == [
        ["layers_{0..99}/kernel", "1000000x1000000", "float32", "trained"]
    ]
    assert totals(text).startswith(f"trained: {100 * 10**12:,} parameters, frozen: 0")
    assert text == make(clip_gradients=1.0, gradient_noise_scale=0.1).describe(
        jax.eval_shape(lambda tree: tree, huge)
    )


def test_shapes_of_modules_are_described():
    model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    by_nnx = make(gradient_multipliers={"bias": 0.5}).describe(nnx.state(model))
    assert table(by_nnx)[1:] == [
        ["bias", "3", "float32", "trained", "0.5"],
        ["kernel", "2x3", "float32", "trained"],
    ]
    shapes = eqx.filter_eval_shape(eqx.nn.Linear, 2, 3, key=jax.random.key(0))
    by_equinox = make(variables="bias").describe(
        eqx.filter(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    )
    assert table(by_equinox)[1:] == [
        ["weight", "3x2", "float32", "frozen"],
        ["bias", "3", "float32", "trained"],
    ]


def test_a_tree_that_is_one_array_and_odd_leaves():
    assert table(make().describe(jnp.zeros(3)))[1:] == [
        ["(the tree itself)", "3", "float32", "trained"]
    ]
    odd = {"f": 1.5, "k": jax.random.key(0), "n": None, "z": jnp.zeros(0)}
    rows = table(make().describe(odd | {"w": jnp.zeros(2)}))[1:]
    assert [row[0] for row in rows] == ["f", "k", "w", "z"]
    assert [row[1] for row in rows] == ["scalar", "scalar", "2", "0"]


@pytest.mark.parametrize(
    "arguments",
    [{"gradient_multipliers": {"nowhere": 2.0}}, {"variables": ["nowhere"]}],
)
def test_patterns_that_match_nothing_are_errors_here_too(arguments):
    train_op = make(**arguments)
    for call in (train_op.describe, train_op.init):
        with pytest.raises(ValueError, match="the pattern 'nowhere' matches no param"):
            call(PARAMS)


def row(name, *more):
    return Row(name, *(more or ("3", "float32", "trained", "", "")))


def folded(*names):
    return [each.name for each in fold([row(name) for name in names])]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["w"], ["w"]),
        ([], []),
        (["l_0/w", "l_1/w"], ["l_0/w", "l_1/w"]),
        (["l_0/w", "l_1/w", "l_2/w"], ["l_{0..2}/w"]),
        # A dict has its keys in this order, which is not that of the numbers.
        ([f"l_{i}/w" for i in sorted(range(12), key=str)], ["l_{0..11}/w"]),
        (["l_0/w", "l_1/w", "l_3/w", "l_4/w", "l_9/w"], ["l_{0..1,3..4,9}/w"]),
        (["0/w", "1/w", "2/w"], ["{0..2}/w"]),
        (
            [f"s_{s}/b_{b}/w" for s in range(4) for b in range(5)],
            ["s_{0..3}/b_{0..4}/w"],
        ),
        (
            [f"s_{s}/b_{b}/w" for s in range(2) for b in range(3 + s)],
            ["s_0/b_{0..2}/w", "s_1/b_{0..3}/w"],
        ),
        (
            [f"l_{i}/{name}" for i in range(3) for name in "ab"] + ["z"],
            ["l_{0..2}/a", "l_{0..2}/b", "z"],
        ),
        (["a1b", "a2b", "a3c"], ["a1b", "a2b", "a3c"]),
        (["conv3x3", "conv5x5", "conv7x7"], ["conv3x3", "conv5x5", "conv7x7"]),
    ],
)
def test_like_layers_are_folded(names, expected):
    assert folded(*names) == expected


def test_what_differs_in_anything_but_a_number_is_not_folded():
    rows = [row(f"l_{i}", str(i), "float32", "trained", "", "") for i in range(5)]
    assert fold(rows) == rows
    rows = [row(f"l_{i}", "3", "float32", "trained", "", f"{i}") for i in range(5)]
    assert fold(rows) == rows


WORDS = st.text("ab0123/_", min_size=1, max_size=9)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(WORDS, unique=True, max_size=30))
def test_folding_loses_no_row_and_keeps_what_is_single(names):
    found = folded(*names)
    assert len(found) == len(set(found))
    assert all(name in names for name in found if "{" not in name)
    count = 0
    for name in found:
        spans = re.findall(r"\{(.*?)\}", name)
        count += math.prod(map(size_of, spans))
    assert count == len(names)


def size_of(span):
    runs = [run.split("..") for run in span.split(",")]
    return sum(int(run[-1]) - int(run[0]) + 1 for run in runs)


LONG = "a_module_with_a_long_name/" * 9
NASTY = {
    "name": "N" * 250,
    "optimizer": lambda rate: optax.sgd(rate),
    "learning_rate_decay_fn": functools.partial(
        optloss.polynomial_decay,
        decay_steps=123456789,
        end_learning_rate=1e-5,
        power=2.0,
        cycle=True,
    ),
    "gradient_multipliers": {"**": 1.23456789e-10},
    "learning_rate_multipliers": {"**": -1.23456789e-10},
}


@pytest.mark.parametrize("arguments", [{}, NASTY])
@pytest.mark.parametrize(
    "params",
    [
        {LONG + "kernel": jnp.zeros(3), LONG + "bias": jnp.zeros(3)},
        {"w": jnp.zeros((1,) * 30), "z": jnp.zeros(2, jnp.complex64)},
        {f"l_{i}/" * 20: jnp.zeros(1) for i in range(30)},
    ],
    ids=["long names", "many axes", "many numbers"],
)
@pytest.mark.parametrize("columns", [80, 100, 120])
def test_it_is_as_wide_as_the_terminal(arguments, params, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    op = make(**arguments)
    text = op.describe(params)
    assert max(map(len, text.splitlines())) <= columns
    words = text.split("\n\n")[0].split()
    assert all(word in words for word in repr(op).split() if len(word) < columns - 8)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_long_name_keeps_its_end():
    text = make().describe({LONG + "kernel": jnp.zeros(3), LONG + "bias": jnp.zeros(3)})
    names = [name for name, *_ in table(text)[1:]]
    assert all(name.startswith("...") for name in names)
    assert [name.split("/")[-1] for name in names] == ["bias", "kernel"]


def test_a_chain_prints_as_what_it_does():
    tx = optloss.make_optimizer(0.1, "adam", clip_gradients=1.0, skip_nonfinite=True)
    words = (
        "make_optimizer: clip_by_global_norm(1.0) -> optax.adam at 0.1 "
        "(skipped if not finite)"
    )
    assert repr(tx) == words
    assert repr(optax.GradientTransformation(*tx)).count("<bound method") == 2
    assert len(repr(optax.GradientTransformation(*tx))) < 400


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (optax.cosine_decay_schedule(0.1, 10), "cosine_decay_schedule"),
        (optax.join_schedules([optax.constant_schedule(1.0)], []), "join_schedules"),
        (functools.partial(optloss.exponential_decay, 0.1, decay_steps=9, decay_rate=1),
         "exponential_decay(0.1, decay_steps=9, decay_rate=1)"),
    ],
)  # fmt: skip
def test_a_schedule_is_called_as_what_made_it(rate, words):
    op = optloss.optimize_loss(lambda w: w, 0, rate, "adam")
    assert repr(op) == f"OptimizeLoss: gradient -> optax.adam at {words} -> step + 1"

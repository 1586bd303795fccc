"""What is refused, in which words, and which of two wrong arguments is named."""

import functools
import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optloss


def said(refused):
    """The message, in which a lambda's place in this file does not count."""
    return re.sub(r" at test_refusals\.py:\d+", "", str(refused.value))


def loss(params):
    return jnp.sum(params["w"] ** 2)


def stateful(params, model_state):
    return loss(params), model_state


def halve(pairs):
    return [(gradient / 2, variable) for gradient, variable in pairs]


def slower(rate, step):
    return rate / (1 + step)


def rising(step):
    return 0.1 * step


def two_arguments(rate, momentum):
    return optax.sgd(rate, momentum)


def instance():
    return optax.sgd(0.1)


def gone():
    array = jnp.zeros(3)
    array.delete()
    return array


class NoOptimizer:
    pass


class NoTransform:
    def __init__(self, rate):
        self.rate = rate

    def __repr__(self):
        return "NoTransform()"


class Momentum:
    def __init__(self, rate, momentum):
        self.init = self.update = lambda *_: (rate, momentum)


class Thing:
    def __repr__(self):
        return "Thing()"


GOOD = {"loss": loss, "global_step": 0, "learning_rate": 0.1, "optimizer": "SGD"}
VECTOR = jnp.zeros(3)
PARAMS = {"w": jnp.ones(2), "table": jnp.arange(3)}
CALL = "optimize_loss"

STEP = "must be an int in [0, 2**31) or a 0-d integer array, or None for no counter."
RATE = (
    "must be a finite real number >= 0, a 0-d array or a schedule (a function of the "
    "step)."
)
OWN_RATE = (
    "may be None only where the optimizer brings its own rate: with an instance or a "
    "function without arguments."
)
FUNCTION = (
    "a function must take the learning rate alone. Bind the rest with a lambda, or "
    "give learning_rate=None for a function without arguments."
)
FORMS = (
    "must be a name, a function of the learning rate, a class or an optax "
    "transformation."
)
INJECTED = (
    "the optimizer is wrapped in optax.inject_hyperparams, whose state would keep the "
    "first learning rate for ever. Pass it unwrapped."
)
NOISE = (
    "must be a finite real number >= 0, a 0-d array or a transformation such as "
    "add_gradient_noise(0.1, annealing=0.55)."
)
MULTIPLIER = "must be a finite real number or a 0-d array."
CLIP = (
    "must be a real number >= 0 (inf only measures), a 0-d array, a transformation "
    "such as adaptive_clipping(), or a function of (gradient, variable) pairs."
)
DECAY = (
    "must be a function (learning_rate, step) -> rate; bind other arguments with "
    "functools.partial, and pass a schedule as learning_rate."
)
OPS = "must be a list of functions op(model_state, context) -> model_state."
OP = "must be a function op(model_state, context) -> model_state"
VARIABLES = (
    "must be names or patterns, a predicate (name, leaf) -> bool, or a tree of bools "
    "like the parameters."
)
SUMMARIES = (
    "'learning_rate', 'loss', 'gradients', 'gradient_norm', 'global_gradient_norm'"
)
PACKING = "must be an int >= 0: the largest size of a leaf to pack, 0 for none."
BOOL = "must be True or False."
DIFFERENTIATE = "must be a function like jax.value_and_grad"
AVERAGE = "must be a number in [0, 1), a function of the step, or None for no average."


def refused_values(argument, problem, *values):
    return [({argument: value}, argument, shown, problem) for value, shown in values]


REFUSED = [
    *refused_values(
        "loss",
        "must be a function loss(params, *args).",
        (None, "None"),
        (VECTOR, "float32[3]"),
        (1.0, "1.0"),
    ),
    *refused_values(
        "global_step",
        STEP,
        (True, "True"),
        (1.0, "1.0"),
        (-1, "-1"),
        (2**31, "2147483648"),
        ("0", "'0'"),
        (VECTOR, "float32[3]"),
        (jnp.zeros(1, jnp.int32), "int32[1]"),
        (jnp.zeros(()), "float32[]"),
        (jnp.array(True), "bool[]"),
        (np.array(-1), "int64[]"),
    ),
    *refused_values(
        "learning_rate",
        "must be a schedule, a function step -> rate. Its signature is (rate, step).",
        (slower, "slower"),
    ),
    *refused_values(
        "learning_rate",
        RATE,
        (np.array(np.nan), "np.float64(nan)"),
        (np.array(-1), "np.int64(-1)"),
        (np.float32(np.inf), "np.float32(inf)"),
        (True, "True"),
        (np.True_, "np.True_"),
        ("0.1", "'0.1'"),
        (-0.1, "-0.1"),
        (-1, "-1"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (10**400, "1" + "0" * 56 + "..."),
        (1j, "1j"),
        ([0.1], "[0.1]"),
        (float, "float"),
        (VECTOR, "float32[3]"),
        (jnp.array(True), "bool[]"),
        (jnp.array(1j), "complex64[]"),
    ),
    *(
        ({"learning_rate": None, "optimizer": each}, "learning_rate", "None", OWN_RATE)
        for each in ("SGD", "no such name", optax.sgd, NoTransform, Momentum, None)
    ),
    (
        {"learning_rate": rising, "learning_rate_decay_fn": slower},
        "learning_rate",
        "rising",
        "a schedule and learning_rate_decay_fn exclude each other. Give a number.",
    ),
    (
        {"learning_rate": lambda step: VECTOR},
        "learning_rate",
        "<lambda>",
        "must return a real scalar, returned float32[3].",
    ),
    *refused_values(
        "summaries",
        f"must be a list out of {SUMMARIES}.",
        ("loss", "'loss'"),
        ({"loss"}, "{'loss'}"),
        (1, "1"),
    ),
    *refused_values(
        "summaries",
        f"unknown: 'float64[3]'. Choose out of {SUMMARIES}.",
        ([np.zeros(3)], "[float64[3]]"),
    ),
    *refused_values(
        "summaries",
        f"unknown: 'bad', 'worse'. Choose out of {SUMMARIES}.",
        (["worse", "loss", "bad"], "['worse', 'loss', 'bad']"),
    ),
    (
        {"global_step": None, "learning_rate_decay_fn": slower},
        "global_step",
        "None",
        "global_step is required for learning_rate_decay_fn. Start it at 0.",
    ),
    (
        {"global_step": None, "learning_rate": optax.constant_schedule(0.1)},
        "global_step",
        "None",
        "global_step is required for a schedule as learning_rate. Start it at 0.",
    ),
    *refused_values(
        "learning_rate_decay_fn", DECAY, (0.9, "0.9"), ("slower", "'slower'")
    ),
    *refused_values(
        "learning_rate_decay_fn",
        f"{DECAY.removesuffix('.')}. Its signature is (step).",
        (rising, "rising"),
    ),
    *refused_values(
        "learning_rate_decay_fn",
        "must return a real scalar, returned None.",
        (lambda rate, step: None, "<lambda>"),
    ),
    *refused_values(
        "learning_rate_decay_fn",
        "must return a real scalar, returned float32[3].",
        (functools.partial(lambda a, b, *, c: c * VECTOR, c=2), "<lambda>(c=2)"),
    ),
    *refused_values(
        "optimizer",
        "no optimizer of that name. Did you mean 'Adam'? list_optimizers() prints them "
        "all.",
        ("Adm", "'Adm'"),
    ),
    *refused_values(
        "optimizer",
        "no optimizer of that name. Did you mean 'adamw'? list_optimizers() prints "
        "them all.",
        ("adamW", "'adamW'"),
    ),
    *refused_values(
        "optimizer",
        "its keywords were not taken: adam(beta1=2): must be a real number in [0, 1) "
        "or a 0-d array. Give them other values.",
        ("Adam(beta1=2)", "'Adam(beta1=2)'"),
    ),
    *refused_values(
        "optimizer",
        "its keywords were not taken: unsupported operand type(s) for -: 'int' and "
        "'str'. Give them other values.",
        ("adamw(b1='x')", "\"adamw(b1='x')\""),
    ),
    *refused_values(
        "optimizer",
        "the number inf of 'b1' is not finite.",
        ("adamw(b1=1e999)", "'adamw(b1=1e999)'"),
    ),
    *refused_values(
        "optimizer",
        "no optimizer of that name. list_optimizers() prints them all.",
        ("???", "'???'"),
    ),
    *refused_values(
        "optimizer",
        "is not a name with literal keywords. Write it like 'adamw(weight_decay=0.1)', "
        "or pass a function of the rate: lambda rate: optax.adamw(rate, mask=mask).",
        ("adam(0.9)", "'adam(0.9)'"),
        ("adam(b1=", "'adam(b1='"),
        ("adam(b1=open('x'))", "\"adam(b1=open('x'))\""),
        ("adam(**{'b1': 0.5})", "\"adam(**{'b1': 0.5})\""),
        ("optax.adam(b1=0.5)", "'optax.adam(b1=0.5)'"),
    ),
    *refused_values(
        "optimizer",
        "it has no keyword 'b3'. It takes 'beta1', 'beta2', 'epsilon'.",
        ("Adam(b3=0.5)", "'Adam(b3=0.5)'"),
    ),
    *refused_values("optimizer", FORMS, (None, "None"), (Thing(), "Thing()"), (1, "1")),
    *refused_values(
        "optimizer",
        FUNCTION,
        (two_arguments, "two_arguments"),
        (instance, "instance"),
    ),
    *refused_values(
        "optimizer",
        "a class must be built from the learning rate alone.",
        (NoOptimizer, "NoOptimizer"),
        (Momentum, "Momentum"),
    ),
    *refused_values(
        "clip_gradients",
        CLIP,
        *(
            (value, shown)
            for value, shown in (
                (True, "True"),
                ("1.0", "'1.0'"),
                (-1.0, "-1.0"),
                (float("nan"), "nan"),
                ([1.0], "[1.0]"),
                (NoTransform, "NoTransform"),
                (VECTOR, "float32[3]"),
            )
        ),
    ),
    *refused_values(
        "clip_gradients",
        "is a function that makes a clip. Call it: adaptive_clipping(...).",
        (optloss.adaptive_clipping, "adaptive_clipping"),
        (
            functools.partial(optloss.adaptive_clipping, decay=0.5),
            "adaptive_clipping(decay=0.5)",
        ),
    ),
    *refused_values(
        "clip_gradients",
        "is a function that makes a clip. Call it: clip_by_global_norm(...).",
        (optax.clip_by_global_norm, "clip_by_global_norm"),
    ),
    *refused_values(
        "gradient_noise_scale",
        NOISE,
        (True, "True"),
        (-0.1, "-0.1"),
        (float("inf"), "inf"),
        (optloss.add_gradient_noise, "add_gradient_noise"),
        (VECTOR, "float32[3]"),
    ),
    *(
        row
        for argument in ("gradient_multipliers", "learning_rate_multipliers")
        for row in [
            *refused_values(
                argument,
                "must map parameter names to numbers.",
                ([("w", 2.0)], "[('w', 2.0)]"),
                (2.0, "2.0"),
            ),
            *refused_values(
                argument,
                "the key 3 is neither a name nor a compiled pattern.",
                ({3: 2.0}, "{3: 2.0}"),
            ),
            *(
                ({argument: {"w": value}}, f"{argument}['w']", shown, MULTIPLIER)
                for value, shown in (
                    (None, "None"),
                    ("2", "'2'"),
                    (True, "True"),
                    (float("nan"), "nan"),
                    (float("inf"), "inf"),
                    (VECTOR, "float32[3]"),
                )
            ),
        ]
    ),
    *refused_values(
        "update_ops",
        OPS,
        (slower, "slower"),
        ([slower, 1], "[slower, 1]"),
        ({"slower": slower}, "{'slower': slower}"),
        ("", "''"),
    ),
    (
        {"update_ops": [slower, rising]},
        "update_ops[1]",
        "rising",
        f"{OP}. Its signature is (step).",
    ),
    *refused_values(
        "clip_gradients",
        "must be a function of a list of (gradient, variable) pairs. Its signature is "
        "(rate, step).",
        (slower, "slower"),
    ),
    *refused_values(
        "variables",
        "must be a predicate (name, leaf) -> bool. Its signature is (step).",
        (rising, "rising"),
    ),
    *refused_values(
        "loss",
        "must be a function loss(params, *args). Its signature is ().",
        (instance, "instance"),
    ),
    *refused_values(
        "variables",
        "selects nothing to train. None trains every floating parameter.",
        ([], "[]"),
        ((), "()"),
    ),
    *refused_values(
        "variables",
        VARIABLES,
        (3, "3"),
        ({}, "{}"),
        ([1.0], "[1.0]"),
        ({"w": 1}, "{'w': 1}"),
        ({"w": VECTOR}, "{'w': float32[3]}"),
    ),
    *refused_values(
        "name", "must be a str; '' for no prefix.", (3, "3"), ("\udcff", "'\\udcff'")
    ),
    *(
        row
        for argument in (
            "colocate_gradients_with_ops",
            "increment_global_step",
            "skip_nonfinite",
            "donate",
        )
        for row in refused_values(argument, BOOL, (1, "1"), (None, "None"))
    ),
    *refused_values(
        "skip_spikes",
        "must be a real number > 0 (standard deviations), True for 6, or None.",
        (False, "False"),
        (0.0, "0.0"),
        ("6", "'6'"),
    ),
    *refused_values(
        "histogram_every",
        "must be an int in [1, 2**31).",
        (2**31, "2147483648"),
        (np.int64(0), "np.int64(0)"),
        (0, "0"),
        (True, "True"),
        (1.0, "1.0"),
        (None, "None"),
    ),
    *refused_values(
        "seed",
        "must be an int or a JAX random key.",
        (1.5, "1.5"),
        (True, "True"),
        (None, "None"),
        ("0", "'0'"),
        (VECTOR, "float32[3]"),
        (2**64, str(2**64)),
        (jax.random.split(jax.random.key(0)), "key<fry>[2]"),
    ),
    *refused_values(
        "pack_small_leaves",
        PACKING,
        (-1, "-1"),
        (True, "True"),
        (1.0, "1.0"),
        (None, "None"),
    ),
    *refused_values(
        "axis_name",
        "must be a mesh axis's name or a tuple of them.",
        (3, "3"),
        (["data"], "['data']"),
        (("data", 3), "('data', 3)"),
    ),
    *refused_values(
        "axis_name",
        "names an axis twice.",
        (("data", "data"), "('data', 'data')"),
    ),
    *refused_values(
        "replica_axis_name",
        "must be a mesh axis's name or a tuple of them.",
        (3, "3"),
        (["data"], "['data']"),
    ),
    *refused_values(
        "value_and_grad",
        f"{DIFFERENTIATE}.",
        (None, "None"),
        ("jax.value_and_grad", "'jax.value_and_grad'"),
    ),
    *refused_values(
        "value_and_grad",
        f"{DIFFERENTIATE}. Its signature is ().",
        (instance, "instance"),
    ),
    *refused_values(
        "value_and_grad",
        f"{DIFFERENTIATE}, with an argument has_aux. Pass jax.value_and_grad itself, "
        "not what it makes of the loss.",
        (jax.value_and_grad(loss), "loss"),
        (rising, "rising"),
    ),
    *refused_values(
        "value_and_grad",
        "differentiates nnx modules, not trees of arrays. Use jax.value_and_grad; "
        "optloss.integrations.nnx.optimize_loss takes the module itself.",
        (nnx.value_and_grad, "value_and_grad"),
    ),
    (
        {"value_and_grad": optloss.clip_per_example(1.0), "axis_name": "data"},
        "value_and_grad",
        "clip_per_example(1.0)",
        "cannot be used together with axis_name: a mean over devices mixes their "
        "examples. Use jit on a mesh.",
    ),
    (
        {"value_and_grad": optloss.clip_per_example(1.0), "loss_scale": 8.0},
        "value_and_grad",
        "clip_per_example(1.0)",
        "cannot be used together with loss_scale: it would clip scaled gradients. "
        "Scale neither, for example in bfloat16.",
    ),
    *refused_values(
        "loss_scale",
        "must be a number > 0, dynamic_loss_scale(...) or None.",
        (0, "0"),
        (True, "True"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (jnp.ones(()), "float32[]"),
        ("dynamic", "'dynamic'"),
        (optloss.dynamic_loss_scale, "dynamic_loss_scale"),
    ),
    *refused_values(
        "projection",
        "must be a function of the trained parameters that returns such.",
        (1.0, "1.0"),
        ("non_negative", "'non_negative'"),
    ),
    *refused_values(
        "projection",
        "must be a function of the trained parameters that returns such. Its signature "
        "is (rate, step).",
        (slower, "slower"),
    ),
    *refused_values(
        "moving_average",
        AVERAGE,
        (1.0, "1.0"),
        (-0.1, "-0.1"),
        (True, "True"),
        (float("nan"), "nan"),
        (jnp.ones(()), "float32[]"),
        ("0.9", "'0.9'"),
    ),
    *refused_values(
        "moving_average",
        "must be a function of the step. Its signature is (rate, step).",
        (slower, "slower"),
    ),
]


def name_of(row):
    arguments, argument, shown, _ = row
    return f"{argument}={shown}" + ("" if len(arguments) == 1 else " beside another")


@pytest.mark.parametrize("row", REFUSED, ids=name_of)
def test_an_argument_is_refused_in_whole_words(row):
    arguments, argument, shown, problem = row
    with pytest.raises(ValueError, match=f"^{CALL}") as refused:
        optloss.optimize_loss(**(GOOD | arguments))
    assert said(refused) == f"{CALL}({argument}={shown}): {problem}"


OF_MAKE_OPTIMIZER = set(inspect.signature(optloss.make_optimizer).parameters)


@pytest.mark.parametrize(
    "row", [row for row in REFUSED if set(row[0]) <= OF_MAKE_OPTIMIZER], ids=name_of
)
def test_make_optimizer_refuses_the_same(row):
    arguments, argument, shown, problem = row
    with pytest.raises(ValueError, match=r"^make_optimizer") as refused:
        optloss.make_optimizer(
            **({"learning_rate": 0.1, "optimizer": "SGD"} | arguments)
        )
    assert said(refused) == f"make_optimizer({argument}={shown}): {problem}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"optimizer": lambda rate: None},
            "the optimizer's function returned None, which is no optax transformation. "
            "Return one, such as optax.sgd(rate).",
        ),
        (
            {"optimizer": lambda rate: optax.sgd},
            "the optimizer's function returned sgd, which is no optax transformation. "
            "Return one, such as optax.sgd(rate).",
        ),
        (
            {"optimizer": NoTransform},
            "the optimizer's function returned NoTransform(), which is no optax "
            "transformation. Return one, such as optax.sgd(rate).",
        ),
        (
            {"optimizer": lambda: None, "learning_rate": None},
            "the optimizer's function returned None, which is no optax transformation. "
            "Return one, such as optax.sgd(rate).",
        ),
        ({"optimizer": optax.inject_hyperparams(optax.adam)}, INJECTED),
        ({"optimizer": lambda r: optax.inject_hyperparams(optax.adam)(r)}, INJECTED),
    ],
)
def test_what_an_optimizers_function_returns_is_checked_in_the_call(arguments, message):
    with pytest.raises(ValueError, match=f"^{CALL}: ") as refused:
        optloss.optimize_loss(**(GOOD | arguments))
    assert said(refused) == f"{CALL}: {message}"


@pytest.mark.parametrize("name", ["muon", "novograd"])
def test_packing_is_refused_where_it_would_train_differently(name):
    with pytest.raises(ValueError, match="pack_small_leaves") as refused:
        optloss.optimize_loss(**(GOOD | {"optimizer": name}), pack_small_leaves=8)
    assert said(refused) == (
        f"{CALL}(pack_small_leaves=8): the optimizer '{name}' looks at the shapes, "
        "norms or names of single leaves, so packed leaves would train differently. "
        "Leave it at 0."
    )


# One wrong value for each argument, in the order in which they are looked at: the
# original's, then that of the signature.
WRONG = [
    ("loss", {"loss": None}),
    ("global_step", {"global_step": -1}),
    ("learning_rate", {"learning_rate": -1.0}),
    ("summaries", {"summaries": "loss"}),
    ("global_step", {"global_step": None, "learning_rate_decay_fn": slower}),
    ("learning_rate_decay_fn", {"learning_rate_decay_fn": 0.9}),
    ("optimizer", {"optimizer": "no such name"}),
    ("clip_gradients", {"clip_gradients": -1.0}),
    ("gradient_noise_scale", {"gradient_noise_scale": -1.0}),
    ("gradient_multipliers", {"gradient_multipliers": 2.0}),
    ("update_ops", {"update_ops": slower}),
    ("variables", {"variables": []}),
    ("name", {"name": 3}),
    ("colocate_gradients_with_ops", {"colocate_gradients_with_ops": 1}),
    ("increment_global_step", {"increment_global_step": 1}),
    ("learning_rate_multipliers", {"learning_rate_multipliers": 2.0}),
    ("histogram_every", {"histogram_every": 0}),
    ("skip_nonfinite", {"skip_nonfinite": 1}),
    ("seed", {"seed": 1.5, "gradient_noise_scale": 0.1}),
    ("pack_small_leaves", {"pack_small_leaves": -1}),
    ("axis_name", {"axis_name": 3, "clip_gradients": 1.0}),
    ("replica_axis_name", {"replica_axis_name": 3}),
    ("donate", {"donate": 1}),
    ("skip_spikes", {"skip_spikes": 0}),
    ("value_and_grad", {"value_and_grad": None}),
    ("loss_scale", {"loss_scale": 0}),
    ("projection", {"projection": 1}),
    ("moving_average", {"moving_average": 1.0}),
]


@pytest.mark.parametrize("first", range(len(WRONG)), ids=lambda i: WRONG[i][0])
def test_of_two_wrong_arguments_the_originals_order_names_the_first(first):
    argument, wrong = WRONG[first]
    for _, later in WRONG[first:]:
        with pytest.raises(ValueError, match=rf"^{CALL}\({argument}="):
            optloss.optimize_loss(**(GOOD | later | wrong))


def test_every_argument_has_its_wrong_value():
    parameters = inspect.signature(optloss.optimize_loss).parameters
    assert {argument for argument, _ in WRONG} == set(parameters)
    assert {argument.partition("[")[0] for _, argument, *_ in REFUSED} == set(
        parameters
    )


@pytest.mark.parametrize(
    ("arguments", "params", "message"),
    [
        (
            {"gradient_multipliers": {"v": 2.0}},
            {"dense_0": {"kernel": VECTOR}, "dense_1": {"kernel": VECTOR}},
            f"{CALL}, gradient_multipliers: the pattern 'v' matches no parameter. The "
            "parameters are 'dense_0/kernel', 'dense_1/kernel'.",
        ),
        (
            {"learning_rate_multipliers": {"dense_9/*": 2.0}},
            {"dense_0": {"kernel": VECTOR}, "dense_1": {"kernel": VECTOR}},
            f"{CALL}, learning_rate_multipliers: the pattern 'dense_9/*' matches no "
            "parameter. Nearest: 'dense_0/kernel', 'dense_1/kernel'.",
        ),
        (
            {"gradient_multipliers": {"w:0": 2.0}},
            PARAMS,
            f"{CALL}, gradient_multipliers: the pattern 'w:0' matches no parameter: "
            "names have no ':0' ending here. Write 'w'.",
        ),
        (
            {"gradient_multipliers": {"**": 2.0, "w": 3.0}},
            PARAMS,
            f"{CALL}, gradient_multipliers: the pattern 'w' is left nothing by the "
            "patterns before it, which already match 'w'. Put the narrower pattern "
            "first.",
        ),
        (
            {"variables": ["w", "tables"]},
            PARAMS,
            f"{CALL}, variables: the pattern 'tables' matches no parameter. Nearest: "
            "'table'.",
        ),
        (
            {"variables": "table"},
            PARAMS,
            f"{CALL}(variables='table'): selects no floating parameter, so there is "
            "nothing to train. The parameters are 'table', 'w'.",
        ),
        (
            {"variables": lambda name, leaf: False},
            PARAMS,
            f"{CALL}(variables=<lambda>): selects no floating parameter, so there is "
            "nothing to train. The parameters are 'table', 'w'.",
        ),
        (
            {"variables": {"w": True}},
            PARAMS,
            f"{CALL}(variables={{'w': True}}): a tree of bools must have the structure "
            "of the parameters, PyTreeDef({'table': *, 'w': *}). Names, patterns or a "
            "predicate (name, leaf) -> bool are accepted, too.",
        ),
        (
            {},
            {"w": VECTOR, "name": "Dense"},
            f"{CALL}: the parameter 'name' is no array but 'Dense'. Keep such leaves "
            "outside, for example with params, static = eqx.partition(model, "
            "eqx.is_inexact_array), and combine them inside the loss.",
        ),
        (
            {},
            {"w": VECTOR, "activation": jax.nn.relu},
            f"{CALL}: the parameter 'activation' is no array but relu. Keep such "
            "leaves outside, for example with params, static = eqx.partition(model, "
            "eqx.is_inexact_array), and combine them inside the loss.",
        ),
        (
            {},
            {"w": gone()},
            f"{CALL}: the parameter 'w' was deleted when it was donated to an earlier "
            "call. Take the parameters from what that call returned.",
        ),
        (
            {},
            "weights.npz",
            f"{CALL}: the tree of parameters is no array but 'weights.npz'. Keep such "
            "leaves outside, for example with params, static = eqx.partition(model, "
            "eqx.is_inexact_array), and combine them inside the loss.",
        ),
        (
            {},
            {"a/b": VECTOR, "a": {"b": VECTOR}},
            f"{CALL}: the parameters ['a']['b'] and ['a/b'] have the same name 'a/b', "
            "by which noise is drawn, patterns match and summaries are told apart. "
            "Rename one of them.",
        ),
        (
            {},
            {"w": jnp.ones(3, jnp.float8_e4m3fn)},
            f"{CALL}: the parameter 'w' is float8_e4m3fn[3], too coarse to be trained. "
            "Keep it in bfloat16 and cast it in the loss, or name the others with "
            "variables.",
        ),
        (
            {},
            {"table": jnp.arange(3)},
            "train_op.init(params={'table': int32[3]}): it holds no floating array, so "
            "there is nothing to train.",
        ),
        (
            {},
            {},
            "train_op.init(params={}): it holds no floating array, so there is nothing "
            "to train.",
        ),
        (
            {"update_ops": [lambda state, context: state] * 2},
            PARAMS,
            "train_op.init(model_state=None): the 2 update_ops need a model_state to "
            "work on. Pass it: init(params, model_state).",
        ),
        (
            {
                "optimizer": lambda r: optax.chain(
                    optax.inject_hyperparams(optax.sgd)(r)
                )
            },
            PARAMS,
            f"inject_learning_rate: {INJECTED}",
        ),
    ],
)
def test_init_refuses(arguments, params, message):
    train_op = optloss.optimize_loss(**(GOOD | arguments))
    with pytest.raises(ValueError, match=r".") as refused:
        train_op.init(params)
    assert said(refused) == message


REDUCE = "Reduce it first, for example with loss.mean()."
CONVERT = "Convert what it is computed from, for example with x.astype(jnp.float32)."
COMPUTE = "Return a scalar that is computed from the parameters."
AUX = "Return (loss, aux), with what is only looked at as aux."


@pytest.mark.parametrize(
    ("result", "shown", "cure"),
    [
        (VECTOR, "float32[3]", REDUCE),
        (jnp.zeros((1,)), "float32[1]", REDUCE),
        (jnp.array(1), "int32[]", CONVERT),
        (jnp.array(1j), "complex64[]", "Return a real number of it, such as loss.real"),
        (jnp.array(True), "bool[]", CONVERT),
        (1, "1", COMPUTE),
        (True, "True", COMPUTE),
        (None, "None", "Does the function end without a return?"),
        ("0.1", "'0.1'", COMPUTE),
        ([1.0], "[1.0]", AUX),
        ((), "()", COMPUTE),
        ({"loss": jnp.zeros(())}, "{'loss': float32[]}", AUX),
        ((VECTOR, "aux"), "float32[3]", REDUCE),
    ],
    ids=str,
)
def test_a_loss_must_be_a_real_floating_scalar(result, shown, cure):
    train_op = optloss.optimize_loss(**(GOOD | {"loss": lambda params: result}))
    with pytest.raises(ValueError, match=r"^optimize_loss: the loss must") as refused:
        train_op(train_op.init(PARAMS))
    assert said(refused).startswith(
        f"{CALL}: the loss must be a real floating scalar, got {shown}. {cure}"
    )


WITHOUT = (
    "Without a model_state it returns loss or (loss, aux); if it has one, pass it: "
    "train_op.init(params, model_state)."
)
WITH = (
    "With a model_state it returns (loss, new_model_state) or (loss, new_model_state, "
    "aux)."
)


@pytest.mark.parametrize(
    ("results", "model_state", "message"),
    [
        (3, None, f"the loss returned 3 results. {WITHOUT}"),
        (1, VECTOR, f"the loss returned 1 result. {WITH}"),
        (4, VECTOR, f"the loss returned 4 results. {WITH}"),
    ],
)
def test_a_loss_with_too_many_or_too_few_results(results, model_state, message):
    def many(params, *rest):
        value = loss(params)
        return value if results == 1 else (value, *[VECTOR] * (results - 1))

    train_op = optloss.optimize_loss(**(GOOD | {"loss": many}))
    with pytest.raises(ValueError, match=r"^optimize_loss: the loss re") as refused:
        train_op(train_op.init(PARAMS, model_state))
    assert said(refused) == f"{CALL}: {message}"


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            {"mean": VECTOR},
            "a model_state of another structure, PyTreeDef({'mean': *}), not "
            "PyTreeDef({'mean': *, 'step': *}). Return all of it, changed or not.",
        ),
        (
            None,
            "a model_state of another structure, PyTreeDef(None), not "
            "PyTreeDef({'mean': *, 'step': *}). Return all of it, changed or not.",
        ),
        (
            {"mean": jnp.zeros(2), "step": jnp.array(0)},
            "float32[2] for model_state['mean'], which is float32[3]. Keep shapes and "
            "dtypes, for example with .astype(...).",
        ),
        (
            {"mean": VECTOR, "step": jnp.array(0.0)},
            "float32[] for model_state['step'], which is int32[]. Keep shapes and "
            "dtypes, for example with .astype(...).",
        ),
    ],
)
def test_a_new_model_state_is_like_the_old_one(new, message):
    model_state = {"mean": VECTOR, "step": jnp.array(0)}

    def change(state, context):
        return new

    for arguments, who in (
        ({"loss": lambda params, state: (loss(params), new)}, "the loss"),
        ({"loss": stateful, "update_ops": [change]}, "the update op change"),
    ):
        train_op = optloss.optimize_loss(**(GOOD | arguments))
        with pytest.raises(ValueError, match=r"^optimize_loss: the ") as refused:
            train_op(train_op.init(PARAMS, model_state))
        assert said(refused) == f"{CALL}: {who} returned {message}"


@pytest.mark.parametrize(
    ("clip", "problem"),
    [
        (
            lambda pairs: pairs[:1],
            "was given 2 pairs and returned 1. Return one for each.",
        ),
        (lambda pairs: None, "must return a list of (gradient, variable)."),
        (
            lambda pairs: [g for g, _ in pairs],
            "must return a list of (gradient, variable).",
        ),
        (
            lambda pairs: [(jnp.sum(g), v) for g, v in pairs],
            "returned float32[] for a gradient float32[2]. Keep the shape.",
        ),
        (
            lambda pairs: [(None, v) for _, v in pairs],
            "returned None for a gradient float32[2]. Keep the shape.",
        ),
    ],
)
def test_what_a_clipping_function_returns_is_checked(clip, problem):
    train_op = optloss.optimize_loss(**(GOOD | {"clip_gradients": clip}))
    with pytest.raises(ValueError, match=r"^clip_by_function") as refused:
        train_op(train_op.init({"w": jnp.ones(2), "x": jnp.ones(3)}))
    assert said(refused) == f"clip_by_function(fn=<lambda>): {problem}"


def test_an_error_of_the_callers_own_function_is_left_alone():
    def broken(*arguments):
        raise TypeError("the caller's own")

    for arguments in ({"optimizer": broken}, {"learning_rate_decay_fn": broken}):
        with pytest.raises(TypeError):
            optloss.optimize_loss(**(GOOD | arguments))


def test_a_class_that_looks_at_the_rate_is_told_by_jax():
    class Checked:
        def __init__(self, rate):
            self.init = self.update = None if rate < 0 else rate

    with pytest.raises(jax.errors.TracerBoolConversionError):
        optloss.optimize_loss(**(GOOD | {"optimizer": Checked}))


def test_the_accepted_call_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optloss.optimize_loss(
            **GOOD, learning_rate_decay_fn=slower, clip_gradients=halve
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: optloss.clip_by_global_norm(1.0, axis_name=3),
            "clip_by_global_norm(axis_name=3): must be a mesh axis's name or a tuple "
            "of them.",
        ),
        (
            lambda: optloss.adaptive_clipping(axis_name=["data"]),
            "adaptive_clipping(axis_name=['data']): must be a mesh axis's name or a "
            "tuple of them.",
        ),
        (
            lambda: optloss.skip_nonfinite(optax.sgd(0.1), axis_name=3),
            "skip_nonfinite(axis_name=3): must be a mesh axis's name or a tuple of "
            "them.",
        ),
        (
            lambda: optloss.skip_nonfinite(optax.sgd),
            "skip_nonfinite(inner=sgd): must be an optax transformation.",
        ),
        (
            lambda: optloss.add_gradient_noise(0.1, axis_name=("data", None)),
            "add_gradient_noise(axis_name=('data', None)): must be a mesh axis's name "
            "or a tuple of them.",
        ),
        (
            lambda: optloss.global_norm({}, axis_name=3),
            "global_norm(axis_name=3): must be a mesh axis's name or a tuple of them.",
        ),
        (
            lambda: optloss.histogram({}, axis_name=3),
            "histogram(axis_name=3): must be a mesh axis's name or a tuple of them.",
        ),
        (
            lambda: optloss.adaptive_clipping(decay_warmup=np.ones(3, bool)),
            "adaptive_clipping(decay_warmup=bool[3]): must be True or False.",
        ),
        (
            lambda: optloss.clip_by_global_norm(gone()),
            "clip_by_global_norm(max_norm=float32[3]): was deleted when it was donated "
            "to an earlier call.",
        ),
        (
            lambda: optloss.clip_by_function(slower),
            "clip_by_function(fn=slower): must be a function of a list of pairs. Its "
            "signature is (rate, step).",
        ),
        (
            lambda: optloss.scale_by_learning_rate(slower),
            "scale_by_learning_rate(learning_rate=slower): must be a schedule, a "
            "function step -> rate. Its signature is (rate, step).",
        ),
        (
            lambda: optloss.inject_learning_rate(two_arguments, 0.1),
            "inject_learning_rate(factory=two_arguments): must be a function of the "
            "learning rate, such as optax.adam. Its signature is (rate, momentum).",
        ),
        (
            lambda: optloss.add_gradient_noise(0.1).init({"a/b": 1, "a": {"b": 2}}),
            "add_gradient_noise: the parameters ['a']['b'] and ['a/b'] have the same "
            "name 'a/b', by which noise is drawn, patterns match and summaries are "
            "told apart. Rename one of them.",
        ),
    ],
)
def test_the_parts_refuse(call, message):
    with pytest.raises(ValueError, match=r".") as refused:
        call()
    assert said(refused) == message


def test_an_int_of_numpys_is_an_int():
    op = optloss.optimize_loss(
        **GOOD, histogram_every=np.int64(2), pack_small_leaves=np.int64(2)
    )
    assert type(op.asked.histogram_every) is int


def test_a_name_that_is_no_utf_8_draws_its_own_noise():
    noise = optloss.add_gradient_noise(0.1)
    zeros = {"\udcff": jnp.zeros(3), "w": jnp.zeros(3)}
    noisy, _ = noise.update(zeros, noise.init(zeros))
    alone, _ = noise.update({"w": zeros["w"]}, noise.init(zeros))
    np.testing.assert_array_equal(noisy["w"], alone["w"])
    assert not np.array_equal(noisy["\udcff"], noisy["w"])


def test_float8_passes_through_the_parts_and_stays_as_it_is():
    grads = {"w": jnp.full(4, 3.0, jnp.float8_e4m3fn), "b": jnp.full(4, 4.0)}
    parts = optax.chain(
        optloss.add_gradient_noise(0.0),
        optloss.multiply_gradients({"w": 2.0}),
        optloss.clip_by_global_norm(5.0),
        optloss.adaptive_clipping(),
    )
    updates, _ = parts.update(grads, parts.init(grads))
    assert updates["w"].dtype == jnp.float8_e4m3fn
    op = optloss.optimize_loss(
        lambda params: jnp.sum(params["b"] ** 2), 0, 0.1, "adam", variables="b"
    )
    state, _ = op(op.init(grads))
    np.testing.assert_array_equal(state.params["w"], grads["w"])


def test_a_clip_makes_no_infinity_and_no_nan():
    debug = jax.debug_nans(True), jax.debug_infs(True)
    gradients = {"w": jnp.array([3.0, 4.0])}
    clips = [
        optloss.adaptive_clipping(),
        optloss.adaptive_clipping(statistics="previous"),
        optloss.clip_by_global_norm(float("inf")),
    ]
    with debug[0], debug[1]:
        for clip in clips:
            state = clip.init(gradients)
            for update in (clip.update, jax.jit(clip.update)):
                _, state = update(gradients, state)
        for clip in (float("inf"), clips[0], clips[1]):
            op = optloss.optimize_loss(loss, 0, 0.1, "adam", clip_gradients=clip)
            state = op.init({"w": jnp.ones(3)})
            for _ in range(3):
                state, _ = op(state)


@pytest.mark.parametrize("size", [0, 8])
def test_gradients_through_a_packed_clip_and_adam_are_numbers(size):
    op = optloss.optimize_loss(
        lambda params, x: jnp.sum((params["w"] * x - params["b"]) ** 2),
        0,
        0.1,
        "adam",
        clip_gradients=1.0,
        pack_small_leaves=size,
    )

    def final(x):
        state = op.init({"w": jnp.ones(3), "b": jnp.zeros(1)})
        for _ in range(3):
            state, output = op.update(state, x)
        return output.loss

    assert np.all(np.isfinite(jax.grad(final)(jnp.array([1.0, 2.0, 3.0]))))

"""Thousands of wrong calls, each refused in words that say what to mend.

Every public function is called right but for one argument, which is each of some sixty
odd values in turn. What is accepted on purpose, and why, stands in ``ACCEPTED`` and in
``REASONS``; everything else must be a ``ValueError``, or a ``TypeError`` of Python's
own where the signature is wrong.
"""

import fractions
import functools
import inspect
import random
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss
from optloss.integrations import linen, nnx, tensorboard
from optloss.optimizers import tensorflow

LONGEST = 2000
SLOWEST = 1.0


class BadRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


class NoInit:
    pass


def deleted(value):
    array = jnp.array(value)
    array.delete()
    return array


def cyclic():
    items = [1]
    items.append(items)
    return items


def five(a, b, c, d, e):
    return a


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "zero": lambda: 0,
    "half": lambda: 0.5,
    "three": lambda: 3,
    "minus one": lambda: -1,
    "minus half": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "minus inf": lambda: float("-inf"),
    "2**31": lambda: 2**31,
    "2**70": lambda: 2**70,
    "10**400": lambda: 10**400,
    "minus 10**400": lambda: -(10**400),
    "10**5000": lambda: 10**5000,
    "complex": lambda: 1j,
    "fraction": lambda: fractions.Fraction(1, 2),
    "word": lambda: "no such thing",
    "empty word": lambda: "",
    "long word": lambda: "x" * 10_000_000,
    "bad word": lambda: "\udcff",
    "bytes": lambda: b"bytes",
    "list": lambda: [1.0],
    "list of None": lambda: [None],
    "long list": lambda: [0.5] * 100_000,
    "empty list": list,
    "tuple": lambda: (1.0, "a"),
    "set": lambda: {3},
    "dict": lambda: {3: 4},
    "empty dict": dict,
    "cyclic list": cyclic,
    "object": object,
    "bad repr": BadRepr,
    "class": lambda: NoInit,
    "module": lambda: np,
    "ellipsis": lambda: ...,
    "generator": lambda: (i for i in range(3)),
    "key": lambda: jax.random.key(0),
    "keys": lambda: jax.random.split(jax.random.key(0)),
    "vector": lambda: jnp.zeros(3),
    "numpy vector": lambda: np.zeros(3),
    "empty vector": lambda: np.zeros(0),
    "int vector": lambda: jnp.arange(3),
    "bool array": lambda: jnp.array(True),
    "complex array": lambda: jnp.array(1j),
    "deleted": lambda: deleted(0.5),
    "deleted int": lambda: deleted(3),
    "numpy nan": lambda: np.array(np.nan),
    "numpy inf": lambda: np.array(np.inf),
    "numpy minus one": lambda: np.array(-1),
    "numpy minus half": lambda: np.float32(-0.5),
    "numpy nan scalar": lambda: np.float64(np.nan),
    "numpy half": lambda: np.array(0.5),
    "numpy three": lambda: np.int64(3),
    "device half": lambda: jnp.array(0.5),
    "device three": lambda: jnp.array(3),
    "device nan": lambda: jnp.array(jnp.nan),
    "numpy text": lambda: np.array("text"),
    "numpy objects": lambda: np.array([None, 1]),
    "numpy date": lambda: np.datetime64("2020-01-01"),
    "shape": lambda: jax.ShapeDtypeStruct((), jnp.float32),
    "no arguments": lambda: lambda: None,
    "one argument": lambda: lambda one: one,
    "two arguments": lambda: lambda one, two: one,
    "five arguments": lambda: five,
    "partial": lambda: functools.partial(five, 1),
}

DEVICE = {"device half", "device three", "device nan"}
ABOVE_ZERO = {
    *("half", "three", "2**31", "2**70", "numpy half", "numpy three"), *DEVICE
}  # fmt: skip
SMALL = {"minus one", "minus half", "numpy minus one", "numpy minus half"}
ANY_FINITE = {*ABOVE_ZERO, "zero", *SMALL}
WORDS = {"word", "empty word", "long word", "bad word"}
ANYTHING = set(VALUES)

# What each kind of argument takes, out of VALUES.
ACCEPTED: dict[str, set[str]] = {
    "number >= 0": {*ABOVE_ZERO, "zero"},
    "number > 0": ABOVE_ZERO,
    "number <= 0": {"zero", *SMALL, *DEVICE},
    "finite number": ANY_FINITE,
    "number in [0, 1)": {"zero", "half", "numpy half", *DEVICE},
    "number in [0, 1]": {"zero", "half", "numpy half", *DEVICE},
    "number >= 0 or inf": {*ABOVE_ZERO, "zero", "inf", "numpy inf"},
    "bool": {"True"},
    "flag": {"True", "bool array", "numpy half", "device half", "device three"}
    | {"device nan", "numpy nan", "numpy inf", "numpy minus one"},
    "key": {"zero", "three", "minus one", "2**31", "numpy three", "numpy minus one"}
    | {"device three", "key"},
    "axis name": {"None", *WORDS},
    "int >= 1": {"three", "numpy three", "2**31", "2**70", "10**400", "10**5000"},
    "int in [1, 2**31)": {"three", "numpy three"},
    "step": {"None", "zero", "three", "numpy three", "device three"},
    "any step": {*ANY_FINITE, "vector", "numpy vector", "empty vector", "int vector"},
    "pack size": {"zero", "three", "numpy three", "2**31", "2**70"}
    | {"10**400", "10**5000"},
    "word": WORDS,
    "encodable word or None": {"None", *WORDS} - {"bad word"},
    "anything": ANYTHING,
}
OR_NONE = {
    kind + " or None": values | {"None"}
    for kind, values in ACCEPTED.items()
    if kind.startswith(("number", "int", "bool"))
}
ACCEPTED |= OR_NONE

# Why a kind takes what looks wrong at first.
REASONS = {
    "device nan": "a device value is judged by its shape and dtype: to look at its "
    "number would wait for the device",
    "flag": "optax.inject_hyperparams makes 0-d arrays of flags; any is true or false",
    "any step": "decays take a float step (an epoch), steps below 0 and arrays of them",
    "axis name": "which axes are bound is known under shard_map alone; JAX says so",
    "pack size": "a size above all leaves packs them all",
    "anything": "a tree in which nothing is ours, or nothing is floating, measures as "
    "nothing; optax asks transforms to pass such trees through",
    "word": "no optimizer matches such a pattern",
}


class Case(NamedTuple):
    """A right call, and what its arguments take besides."""

    name: str
    fn: Callable[..., Any]
    right: dict[str, Any]
    kinds: dict[str, Any]  # to the name of a kind or a set of names of VALUES
    says: str = ""  # what the message begins with, if it is not the name


def named(name):
    return getattr(optloss, name)


def decays():
    number, positive = "finite number", "number > 0"
    common = {"learning_rate": 0.1, "step": 7}
    kinds = {"learning_rate": number, "step": "any step"}
    periodic = {**kinds, "decay_steps": positive}
    stairs = {**periodic, "decay_rate": "number >= 0", "staircase": "bool"}
    cosine = {**periodic, "alpha": number}
    linear = {**cosine, "num_periods": number, "beta": number}
    right = {**common, "decay_steps": 10}
    yield Case("exponential_decay", optloss.exponential_decay,
               {**right, "decay_rate": 0.5}, stairs)  # fmt: skip
    for name in ("natural_exp_decay", "inverse_time_decay"):
        yield Case(name, named(name), {**right, "decay_rate": 0.5},
                   {**stairs, "decay_rate": number})  # fmt: skip
    yield Case("polynomial_decay", optloss.polynomial_decay, right,
               {**periodic, "end_learning_rate": number, "power": "number >= 0",
                "cycle": "bool"})  # fmt: skip
    yield Case("cosine_decay", optloss.cosine_decay, right, cosine)
    yield Case("cosine_decay_restarts", optloss.cosine_decay_restarts,
               {**common, "first_decay_steps": 10},
               {**kinds, "first_decay_steps": positive, "t_mul": positive,
                "m_mul": number, "alpha": number})  # fmt: skip
    yield Case("linear_cosine_decay", optloss.linear_cosine_decay, right, linear)
    yield Case("noisy_linear_cosine_decay", optloss.noisy_linear_cosine_decay, right,
               {**linear, "initial_variance": "number >= 0", "variance_decay": number,
                "key": "key"})  # fmt: skip
    yield Case("piecewise_constant", optloss.piecewise_constant,
               {"step": 3, "boundaries": [5], "values": [0.1, 0.2]},
               {"step": {*ANY_FINITE, "vector", "numpy vector", "empty vector",
                         "int vector"},
                "boundaries": set(),
                "values": set()})  # fmt: skip


def optimizers():
    rate = {"learning_rate": 0.1}
    kinds = {"learning_rate": "number >= 0"}
    positive, not_negative, finite = "number > 0", "number >= 0", "finite number"
    below_one = "number in [0, 1)"
    rows = {
        "adagrad": {"initial_accumulator_value": positive},
        "adam": {"beta1": below_one, "beta2": below_one, "epsilon": not_negative},
        "ftrl": {
            "learning_rate_power": "number <= 0",
            "initial_accumulator_value": not_negative,
            "l1_regularization_strength": not_negative,
            "l2_regularization_strength": not_negative,
            "l2_shrinkage_regularization_strength": not_negative,
        },
        "momentum": {"momentum": finite, "use_nesterov": "bool"},
        "rmsprop": {
            "decay": "number in [0, 1]",
            "momentum": finite,
            "epsilon": not_negative,
            "centered": "bool",
        },
        "sgd": {},
    }
    for name, more in rows.items():
        yield Case(name, getattr(tensorflow, name), rate, {**kinds, **more})


def transforms():
    not_negative, axis = "number >= 0", "axis name"
    yield Case("add_gradient_noise", optloss.add_gradient_noise, {"scale": 0.1},
               {"scale": {*ACCEPTED[not_negative], "one argument"},
                "annealing": not_negative, "distribution": set(),
                "key": "key", "axis_name": axis})  # fmt: skip
    yield Case("clip_by_global_norm", optloss.clip_by_global_norm, {"max_norm": 1.0},
               {"max_norm": {*ACCEPTED["number >= 0 or inf"], "one argument"},
                "axis_name": axis})  # fmt: skip
    yield Case("adaptive_clipping", optloss.adaptive_clipping, {},
               {"std_factor": not_negative, "decay": "number in [0, 1)",
                "static_max_norm": "number >= 0 or inf or None",
                "epsilon": "number > 0", "decay_warmup": "flag", "statistics": set(),
                "axis_name": axis})  # fmt: skip
    whole = {"three", "2**31", "2**70", "numpy three", *DEVICE}
    yield Case("zclip", optloss.zclip, {},
               {"z_threshold": "number > 0", "alpha": "number in [0, 1)",
                "warmup": whole, "mode": set(), "axis_name": axis})  # fmt: skip
    yield Case("autoclip", optloss.autoclip, {},
               {"percentile": {"zero", "half", "three", "numpy half", "numpy three",
                               *DEVICE},
                "history": {"three", "numpy three"}, "axis_name": axis})  # fmt: skip
    yield Case("adagc", optloss.adagc, {},
               {"relative": ABOVE_ZERO - {"half", "numpy half"},
                "beta": "number in [0, 1)", "warmup": {*whole, "zero"},
                "absolute": {*ABOVE_ZERO, "inf", "numpy inf"},
                "axis_name": axis})  # fmt: skip
    yield Case("agc", optloss.agc, {},
               {"clipping": "number >= 0 or inf", "epsilon": "number > 0",
                "exclude": {*WORDS, "empty list"}, "axis_name": axis})  # fmt: skip
    yield Case("skip_nonfinite", optloss.skip_nonfinite, {"inner": optax.sgd(0.1)},
               {"inner": set(), "axis_name": axis})  # fmt: skip
    yield Case("skip_spikes", optloss.skip_spikes, {"inner": optax.sgd(0.1)},
               {"inner": set(), "std_factor": "number > 0",
                "decay": "number in [0, 1)", "warmup": whole, "patience": whole,
                "axis_name": axis})  # fmt: skip
    yield Case("clip_by_function", optloss.clip_by_function, {"fn": lambda p: p},
               {"fn": {"one argument"}})  # fmt: skip
    yield Case("multiply_gradients", optloss.multiply_gradients,
               {"multipliers": {"w": 1.0}},
               {"multipliers": {"empty dict"}})  # fmt: skip
    yield Case("layerwise_decay", optloss.layerwise_decay,
               {"rate": 0.5, "pattern": "layers_{}/**", "num_layers": 2},
               {"rate": ABOVE_ZERO - {"2**70"}, "pattern": set(),
                "num_layers": {"three", "numpy three"}})  # fmt: skip
    for name in ("scale_by_learning_rate", "inject_learning_rate"):
        injects = name.startswith("inject")
        first = {"factory": optax.sgd} if injects else {}
        yield Case(name, named(name), {**first, "learning_rate": 0.1},
                   {**({"factory": {"one argument"}} if injects else {}),
                    "learning_rate": {*ACCEPTED[not_negative], "one argument"},
                    "decay_fn": {"None", "two arguments"}})  # fmt: skip
    state = optloss.scale_by_learning_rate(0.1).init(jnp.zeros(2))
    yield Case("set_learning_rate", optloss.set_learning_rate,
               {"state": state, "value": 0.1}, {"value": not_negative})  # fmt: skip
    for name in ("global_norm", "histogram"):
        yield Case(name, named(name), {"tree": {}}, {"axis_name": axis})


def loss(params):
    return jnp.sum(params["w"] ** 2)


MULTIPLIERS = {"None", "empty dict"}
COMMON = {
    "gradient_noise_scale": {*ACCEPTED["number >= 0 or None"], "one argument"},
    "gradient_multipliers": MULTIPLIERS,
    "clip_gradients": {*ACCEPTED["number >= 0 or inf or None"], "one argument"},
    "learning_rate_multipliers": MULTIPLIERS,
    "variables": {"None", "True", *WORDS, "two arguments"},
    "skip_nonfinite": "bool",
    "skip_spikes": {"None", "True", *ABOVE_ZERO},
    "seed": "key",
    "pack_small_leaves": "pack size",
    "axis_name": "axis name",
}
ONLY_OF_THE_OP = {
    "global_step": "step",
    "update_ops": {"None", "empty list"},
    "name": "encodable word or None",
    "summaries": {"None", "empty list"},
    "colocate_gradients_with_ops": "bool",
    "increment_global_step": "bool",
    "histogram_every": "int in [1, 2**31)",
    "donate": "bool",
}


def whole():
    rated = {"learning_rate": 0.1, "optimizer": "SGD"}
    quick = {"learning_rate": None, "optimizer": optax.sgd(0.1)}
    rates = {
        "learning_rate": {*ACCEPTED["number >= 0"], "one argument"},
        "learning_rate_decay_fn": {"None", "two arguments"},
        "optimizer": set(),
    }
    op = {"loss": loss, "global_step": 0}
    make, optimize = optloss.make_optimizer, optloss.optimize_loss
    yield Case("make_optimizer", make, rated, rates)
    yield Case("make_optimizer", make, quick, COMMON)
    takes_params = {"loss": {"one argument", "two arguments", "five arguments"}
                    | {"partial"}}  # fmt: skip
    yield Case("optimize_loss", optimize, {**op, **rated}, rates)
    yield Case("optimize_loss", optimize, {**op, **quick},
               {**takes_params, **COMMON, **ONLY_OF_THE_OP})  # fmt: skip


def gradients():
    whole = {*("zero", "three", "minus one", "2**31", "2**70", "10**400", "10**5000")}
    # JAX itself has to judge a list in itself.
    axes = {*whole, "minus 10**400", "None", "empty list", "list of None"}
    axes |= {"cyclic list"}
    scale = {"half", "three", "2**31", "2**70", "numpy three"}
    yield Case("accumulate_gradients", optloss.accumulate_gradients, {"steps": 2},
               {"steps": "int >= 1", "in_axes": axes})  # fmt: skip
    yield Case("clip_per_example", optloss.clip_per_example, {"max_norm": 1.0},
               {"max_norm": {*ABOVE_ZERO, "inf", "numpy inf"},
                "batch": "int >= 1 or None", "in_axes": axes})  # fmt: skip
    yield Case("dynamic_loss_scale", optloss.dynamic_loss_scale, {},
               {"initial": scale - {"half"}, "growth_interval": "int in [1, 2**31)",
                "factor": scale - {"half"},
                "minimum": {"half", "three", "numpy three"}})  # fmt: skip
    quick = {"learning_rate": None, "optimizer": optax.sgd(0.1)}
    yield Case("optimize_loss", optloss.optimize_loss,
               {"loss": loss, "global_step": 0, **quick},
               {"value_and_grad": set(), "loss_scale": {*scale, "None"},
                "projection": {"None", "one argument"},
                "moving_average": {"None", "zero", "half", "one argument"}}
               )  # fmt: skip


def names():
    yield Case("list_optimizers", optloss.list_optimizers, {}, {"pattern": "word"})
    yield Case("register_optimizer", optloss.register_optimizer,
               {"name": "of_the_wrong_calls", "factory": optax.sgd},
               {"name": {"long word"},
                "factory": {"one argument", "two arguments", "five arguments",
                            "partial"}})  # fmt: skip


TRAINED = {
    *("half", "minus half", "numpy minus half", "numpy half", "device half", "nan"),
    *("numpy nan scalar", "numpy nan", "numpy inf", "inf", "minus inf", "device nan"),
    *("vector", "numpy vector", "empty vector", "complex array", "list", "long list"),
    *("cyclic list", "shape"),  # which JAX itself has to judge
}
NOT_TRAINED = {
    *("None", "zero", "three", "minus one", "2**31", "list of None", "empty list"),
    *("dict", "empty dict", "key", "keys", "int vector", "bool array", "device three"),
    *("numpy minus one", "numpy three"),
}


def states():
    op = optloss.optimize_loss(loss, 0, 0.1, optax.sgd(0.1))
    tx = optloss.make_optimizer(0.1, optax.sgd(0.1))
    yield Case("init", op.init, {}, {"params": TRAINED}, "(train_op.init|optimize_l)")
    yield Case("describe", op.describe, {}, {"params": TRAINED | NOT_TRAINED}, "opt")
    yield Case("tx.init", tx.init, {}, {"params": TRAINED | NOT_TRAINED}, "make_opt")
    yield Case("update", op.update, {}, {"state": set()}, "train_op")
    yield Case("train_op", op, {}, {"state": set()})


@functools.cache
def writer():
    return tensorboard.SummaryWriter(tempfile.mkdtemp())


def write_tag(value):
    writer().write(0, {"value": value})


def make_writer(**arguments):
    tensorboard.SummaryWriter(**{"logdir": tempfile.mkdtemp(), **arguments}).close()


def integrations():
    state = linen.TrainState.create(
        apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1)
    )
    model = flax.nnx.Linear(2, 1, rngs=flax.nnx.Rngs(0))
    given = {"global_step": 0, "learning_rate": None, "optimizer": optax.sgd(0.1)}
    shown = {*ANY_FINITE, "True", "nan", "inf", "minus inf", "numpy nan", "numpy inf"}
    shown |= {"numpy nan scalar", "bool array", "vector", "numpy vector"}
    shown |= {"empty vector", "int vector"}
    yield Case("SummaryWriter", make_writer, {},
               {"logdir": WORDS, "every": "int >= 1"})  # fmt: skip
    yield Case("SummaryWriter.write", lambda **given: writer().write(**given),
               {"step": 0, "summaries": {}},
               {"step": {"zero", "three", "minus one", "2**31", "numpy three"},
                "summaries": {"empty dict"}})  # fmt: skip
    yield Case("SummaryWriter.write", write_tag, {}, {"value": shown})
    yield Case("TrainState.apply_gradients", state.apply_gradients,
               {"grads": {"w": jnp.ones(2)}},
               {"extra": {"None", "empty dict"}})  # fmt: skip
    yield Case("optimize_loss", nnx.optimize_loss,
               {"model": model, "loss": lambda model: jnp.sum(model.kernel[...]),
                **given},
               {"model": set(), "loss": {"one argument", "two arguments",
                "five arguments", "partial"}})  # fmt: skip


CASES = [
    *decays(),
    *optimizers(),
    *transforms(),
    *whole(),
    *gradients(),
    *names(),
    *states(),
    *integrations(),
]
EXEMPT = {
    "Histogram": "a record of what is given",
    "StepOutput": "a record",
    "TrainOp": "made by optimize_loss",
    "TrainOpState": "a record",
    "UpdateContext": "a record",
    "carry_over": "the states of a run have tests of their own",
    "get_learning_rate": "what holds no rate is refused in tests/test_groups.py",
    "get_summaries": "in a tree without a state of ours nothing was measured",
    "pack_state": "the states of a run have tests of their own",
    "unpack_state": "the states of a run have tests of their own",
}


def trials():
    for case in CASES:
        for argument, kind in case.kinds.items():
            accepted = ACCEPTED[kind] if isinstance(kind, str) else kind
            for value in VALUES:
                if value not in accepted:
                    yield case, argument, value


TRIALS = list(trials())


WORD = {"params": "param"}  # of one parameter the message speaks as such


def complaint(case, arguments, wanted, shown) -> str | None:
    """Return what is wrong with the refusal of a call, None if it is right."""
    start = time.thread_time()
    try:
        case.fn(**arguments)
    except ValueError as error:
        text, kind = str(error), ValueError
    except Exception as error:
        text, kind = str(error), type(error)
    else:
        return f"{case.name}({shown}) is accepted"
    spent = time.thread_time() - start
    if kind is not ValueError:
        return f"{case.name}({shown}) ends in {kind.__name__}: {text[:200]}"
    if (
        not re.match(case.says or re.escape(case.name), text)
        or WORD.get(wanted, wanted) not in text
    ):
        return f"{case.name}({shown}) does not name it: {text[:200]}"
    if len(text) > LONGEST:
        return f"{case.name}({shown}) says {len(text)} letters"
    return f"{case.name}({shown}) takes {spent} s" if spent > SLOWEST else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_wrong_value_is_refused_by_its_name(case):
    faults = []
    for one, argument, value in TRIALS:
        if one is case:
            arguments = {**case.right, argument: VALUES[value]()}
            shown = f"{argument}={value}"
            faults.append(complaint(case, arguments, argument, shown))
    assert not [fault for fault in faults if fault]


def test_of_two_wrong_values_one_is_named():
    chosen = random.Random(0)
    several = [case for case in CASES if len(case.kinds) > 1]
    faults = []
    for _ in range(500):
        case = chosen.choice(several)
        own = [(argument, value) for one, argument, value in TRIALS if one is case]
        wrong = dict(chosen.sample(own, 2))
        arguments = case.right | {
            name: VALUES[value]() for name, value in wrong.items()
        }
        found = [complaint(case, arguments, name, str(wrong)) for name in wrong]
        faults += [found[0]] if all(found) else []
    assert not faults


def test_a_wrong_signature_is_a_type_error():
    for case in CASES:
        for arguments in ({**case.right, "no_such_argument": 1},):
            with pytest.raises((TypeError, ValueError), match=r"argument|takes"):
                case.fn(**arguments)
        required = [
            name
            for name, p in inspect.signature(case.fn).parameters.items()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        if required:
            with pytest.raises(TypeError, match=required[0]):
                case.fn()


def test_there_are_thousands_of_them():
    assert len(TRIALS) > 7000


def test_no_public_function_is_left_out():
    public = {name for name in optloss.__all__ if callable(named(name))}
    assert public - {case.name for case in CASES} == EXEMPT.keys()


def test_what_is_accepted_on_purpose_is_accepted():
    for case in CASES:
        for argument, kind in case.kinds.items():
            if kind in ("number >= 0", "finite number", "number > 0", "bool", "flag"):
                for value in ACCEPTED[kind] - {"10**400", "10**5000"}:
                    case.fn(**{**case.right, argument: VALUES[value]()})

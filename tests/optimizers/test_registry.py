"""Optimizers by name: whose they are, what a text may say, and that each one trains."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optloss
from optloss.optimizers import registry, tensorflow

AIM = 0.2
# Names that need something in order to be quiet, and rates that suit the problem.
SPECS = {"noisy_sgd": "noisy_sgd(key=0)"}
RATES = {
    "adadelta": 10.0,
    "dadapt_adamw": 1.0,
    "dog": 1.0,
    "dowg": 1.0,
    "lars": 10.0,
    "lbfgs": 1.0,
    "prodigy": 1.0,
    "simplified_ademamix": 1e-4,
}
BUILT_IN = optloss.list_optimizers()


def parameters():
    return {
        "float": jnp.full((3, 4), 0.5, jnp.float32),
        "half": jnp.full(5, 0.5, jnp.bfloat16),
        "table": jnp.arange(3),
    }


def loss_of(params):
    wide = (params[name].astype(jnp.float32) for name in ("float", "half"))
    return sum(jnp.sum((leaf - AIM) ** 2) for leaf in wide)


def kinds(tree):
    return jax.tree.structure(tree), [
        (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False))
        for leaf in jax.tree.leaves(tree)
    ]


@pytest.mark.wide
@pytest.mark.parametrize("name", BUILT_IN)
def test_an_optimizer_trains_floats_and_half_floats_with_one_trace(name):
    factory = registry.get_factory("call", SPECS.get(name, name))
    transform = optloss.inject_learning_rate(factory, RATES.get(name, 0.01))
    params, traces = parameters(), []

    @jax.jit
    def step(params, state):
        traces.append(None)
        value, gradients = jax.value_and_grad(loss_of, allow_int=True)(params)
        updates, state = transform.update(
            gradients,
            state,
            params,
            value=value,
            step=jnp.array(0),
            grad=gradients,
            value_fn=lambda trained, step: loss_of(trained),
        )
        updates["table"] = jnp.zeros_like(params["table"])
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    first = kinds(params), kinds(state)
    before = loss_of(params)
    for _ in range(80):
        params, state = step(params, state)
        state = optloss.set_learning_rate(state, state.base)
    assert len(traces) == 1
    assert (kinds(params), kinds(state)) == first
    assert loss_of(params) < 0.9 * before
    np.testing.assert_array_equal(params["table"], [0, 1, 2])


def test_the_names_are_tensorflows_optaxs_and_nothing_else():
    capitalised = {name for name in BUILT_IN if name[0].isupper()}
    assert capitalised == set(optloss.OPTIMIZER_CLS_NAMES)
    for name in set(BUILT_IN) - capitalised:
        own = getattr(optax, name, None) or getattr(contrib, name)
        assert registry.get_factory("call", name) is own
    for name in capitalised:
        own = getattr(tensorflow, name.lower())
        assert registry.get_factory("call", name) is own


def takes_a_rate_alone(function):
    parameters = list(inspect.signature(function).parameters.values())
    return (
        bool(parameters)
        and parameters[0].name == "learning_rate"
        and all(
            p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            for p in parameters[1:]
        )
    )


# Transforms and not optimizers, in need of more than a gradient and a loss, or
# deprecated (optimistic_adam).
LEFT_OUT = {
    "optimistic_adam",
    "scale_by_learning_rate",
    "scale_by_madgrad",
    "scale_by_rprop",
    "sophia",
}


def test_no_optimizer_of_optax_is_forgotten():
    found = {
        name
        for module in (optax, contrib)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and takes_a_rate_alone(function)
    }
    assert found - LEFT_OUT <= set(BUILT_IN)
    assert not LEFT_OUT & set(BUILT_IN)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("[A-Z]*", ["Adagrad", "Adam", "Ftrl", "Momentum", "RMSProp", "SGD"]),
        ("adam", ["adam"]),
        ("?dam", ["Adam", "adam"]),
        ("*muon*", ["muon"]),
        ("nothing*", []),
        ("", []),
    ],
)
def test_the_list_can_be_searched(pattern, names):
    assert optloss.list_optimizers(pattern) == names


def test_the_list_is_sorted_and_all_by_default():
    assert optloss.list_optimizers() == sorted(optloss.list_optimizers("*"))
    assert {"Adam", "adam", "adamw", "muon"} <= set(optloss.list_optimizers())


@pytest.mark.parametrize(
    ("text", "keywords"),
    [
        ("adamw(weight_decay=0.5)", {"weight_decay": 0.5}),
        (" adamw ( b1 = 0.5 , eps = 1e-3 ) ", {"b1": 0.5, "eps": 1e-3}),
        ("adamw()", {}),
        (" adamw", {}),
        ("adamw(weight_decay=-1, mu_dtype='bfloat16')", None),
        ("adamw(nesterov=True, mask=None)", {"nesterov": True, "mask": None}),
    ],
)
def test_a_name_may_carry_keywords(text, keywords):
    if keywords is None:
        keywords = {"weight_decay": -1, "mu_dtype": "bfloat16"}
    params = {"w": jnp.array([1.0, -2.0])}
    results = []
    for factory in (
        registry.get_factory("call", text),
        lambda rate: optax.adamw(rate, **keywords),
    ):
        transform = factory(0.1)
        updates, state = transform.update(params, transform.init(params), params)
        results.append((updates["w"].tolist(), kinds(state)))
    assert results[0] == results[1]


class Ran(Exception):
    pass


def explode(*_):
    raise Ran


@pytest.mark.parametrize(
    "text",
    [
        "adamw(weight_decay=explode())",
        "adamw(weight_decay=__import__('os').getcwd())",
        "adamw(weight_decay=[explode() for _ in 'a'])",
        "adamw(weight_decay=f'{explode()}')",
        "adamw(weight_decay=(lambda: 1)())",
        "adamw(weight_decay=0.1).init",
        "adamw(weight_decay=0.1); explode()",
        "adamw(weight_decay=0.1)(0.1)",
        "explode()(b1=0.1)",
        "adamw(0.1)",
        "adamw(*[0.1])",
        "adamw(**{'b1': 0.1})",
        "adamw(b1=0.1",
        "adamw(b1=b1)",
        "adamw(b1=0.1 + 0.2)",
        "adamw(b1=0.1, b1=0.2)",
        "adamw[b1]",
        "adamw(b1=0.1)\0",
        "adamw(b1=" + "(" * 500 + ")" * 500 + ")",
    ],
)
def test_a_text_is_parsed_and_never_run(text, monkeypatch):
    monkeypatch.setattr("builtins.explode", explode, raising=False)
    with pytest.raises(ValueError, match=r"^call\(optimizer=") as refused:
        registry.get_factory("call", text)
    problem = str(refused.value).partition("): ")[2]
    expected = {
        "adamw[b1]": "no optimizer of that name. Did you mean 'adamw'? "
        "list_optimizers() prints them all.",
    }
    assert text in expected or str(refused.value).endswith(
        "): is not a name with literal keywords. Write it like "
        "'adamw(weight_decay=0.1)', or pass a function of the rate: lambda rate: "
        "optax.adamw(rate, mask=mask)."
    )
    assert problem == expected.get(text, problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "Adm",
            "no optimizer of that name. Did you mean 'Adam'? list_optimizers() prints "
            "them all.",
        ),
        (
            "admw(weight_decay=0.1)",
            "no optimizer of that name. Did you mean 'adamw'? list_optimizers() prints "
            "them all.",
        ),
        ("", "no optimizer of that name. list_optimizers() prints them all."),
        (
            "Momentum(mu=0.5)",
            "it has no keyword 'mu'. It takes 'momentum', 'use_nesterov'.",
        ),
        (
            "adamw(learning_rate=0.1)",
            "it has no keyword 'learning_rate'. It takes 'b1', 'b2', 'eps', "
            "'eps_root', 'mask', 'mu_dtype', 'nesterov', 'weight_decay'.",
        ),
        ("SGD(momentum=1)", "it has no keyword 'momentum'. It takes none."),
        (
            "adam(mu_dtype='x')",
            "its keywords were not taken: data type 'x' not understood. Give them "
            "other values.",
        ),
    ],
)
def test_an_unknown_name_or_keyword_is_refused(text, problem):
    with pytest.raises(ValueError, match=r"^call") as refused:
        registry.get_factory("call", text)
    assert str(refused.value) == f"call(optimizer={text!r}): {problem}"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("Adam", "Adam (TensorFlow)"),
        ("Adam(beta1=0.5)", "Adam(beta1=0.5) (TensorFlow)"),
        ("adam", "optax.adam"),
        ("adamw(b1=0.5)", "optax.adamw(b1=0.5)"),
        ("muon", "optax.contrib.muon"),
        ("of_my_own", "of_my_own"),
    ],
)
def test_the_pipeline_tells_whose_an_optimizer_is(name, title):
    assert registry.title(name) == title


@pytest.fixture
def _own_names(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.mark.usefixtures("_own_names")
def test_an_optimizer_of_ones_own_has_a_name_and_keywords():
    calls = []

    def heavy(learning_rate, *, mass=0.9):
        calls.append((learning_rate, mass))
        return optax.sgd(learning_rate, momentum=mass)

    optloss.register_optimizer("heavy", heavy)
    assert "heavy" in optloss.list_optimizers("he*")
    for text, mass in (("heavy", 0.9), ("heavy(mass=0.5)", 0.5)):
        train_op = optloss.optimize_loss(lambda w: w**2, 0, 0.1, text)
        assert repr(train_op) == f"OptimizeLoss: gradient -> {text} at 0.1 -> step + 1"
        state = train_op.init(jnp.array(1.0))
        for _ in range(2):
            state, _ = train_op(state)
        np.testing.assert_allclose(
            state.params, 0.8 - 0.1 * (1.6 + mass * 2), rtol=1e-6
        )
        assert all(isinstance(rate, jax.core.Tracer) for rate, _ in calls[:1])
        assert calls[-1][1] == mass


@pytest.mark.usefixtures("_own_names")
@pytest.mark.parametrize(
    ("name", "factory", "message"),
    [
        (
            "adam",
            optax.sgd,
            "register_optimizer(name='adam'): is taken. Choose another name; a "
            "registered one is never replaced.",
        ),
        (
            "my adam",
            optax.sgd,
            "register_optimizer(name='my adam'): must be an identifier.",
        ),
        (3, optax.sgd, "register_optimizer(name=3): must be an identifier."),
        ("", optax.sgd, "register_optimizer(name=''): must be an identifier."),
        (
            "mine",
            optax.EmptyState(),
            "register_optimizer(factory=EmptyState()): must be a function of the "
            "learning rate that returns a transformation.",
        ),
    ],
)
def test_a_wrong_registration_is_refused(name, factory, message):
    with pytest.raises(ValueError, match=r"^register_optimizer") as refused:
        optloss.register_optimizer(name, factory)
    assert str(refused.value) == message
    assert optloss.list_optimizers() == BUILT_IN


def test_a_pattern_must_be_a_str():
    with pytest.raises(ValueError, match=r"^list_optimizers") as refused:
        optloss.list_optimizers(3)
    assert str(refused.value) == "list_optimizers(pattern=3): must be a str."


def test_the_library_says_nothing_when_it_builds_an_optimizer():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("Adam", "adam", "adamw(weight_decay=0.1)"):
            optloss.optimize_loss(lambda w: w**2, 0, 0.1, name)

"""Typical uses, which must type-check for users; nothing here is run.

``tests/test_typing.py`` has ``mypy --strict`` and ``pyright`` look at it: an
``assert_type`` that fails is an error.
"""

import re
from functools import partial
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optloss
import optloss.typing as types
from optloss.integrations.linen import TrainState
from optloss.integrations.nnx import ModelTrainOp
from optloss.integrations.nnx import optimize_loss as optimize_model
from optloss.integrations.tensorboard import SummaryWriter

Params = dict[str, jax.Array]


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.mean(x @ params["w"])


def stateful(params: Params, state: Params, x: jax.Array) -> tuple[jax.Array, Params]:
    return loss(params, x), state


def keep(model_state: Params, context: optloss.UpdateContext) -> Params:
    assert_type(context.loss, jax.Array)
    return model_state


def train(params: Params, batches: list[jax.Array]) -> float:
    train_op = optloss.optimize_loss(
        loss,
        0,
        1e-3,
        "adam",
        gradient_noise_scale=optloss.add_gradient_noise(0.1, annealing=0.55),
        gradient_multipliers={"w": 0.5},
        clip_gradients=optloss.adaptive_clipping(statistics="previous"),
        learning_rate_decay_fn=partial(
            optloss.exponential_decay, decay_steps=100, decay_rate=0.9
        ),
        variables=["w"],
        summaries=["loss", "global_gradient_norm"],
        skip_nonfinite=True,
        seed=jax.random.key(0),
    )
    assert_type(train_op, optloss.TrainOp)
    state = train_op.init(params)
    assert_type(state, optloss.TrainOpState)
    state, output = train_op(state, batches[0])
    with SummaryWriter("logs", every=10) as writer:
        for step, batch in enumerate(batches):
            state, output = train_op(state, batch)
            assert_type(state, optloss.TrainOpState)
            assert_type(output, optloss.StepOutput)
            writer.write(step, output.summaries)
    state = optloss.set_learning_rate(state, 1e-4)
    text: str = train_op.describe(params) + repr(train_op)
    return float(output.loss) + len(text)


def scan(params: Params, batches: jax.Array) -> jax.Array:
    train_op = optloss.optimize_loss(
        stateful, 0, optax.constant_schedule(0.1), optax.sgd, update_ops=[keep]
    )

    def step(
        state: optloss.TrainOpState, batch: jax.Array
    ) -> tuple[optloss.TrainOpState, jax.Array]:
        state, output = train_op.update(state, batch)
        return state, output.loss

    state = train_op.init(params, model_state=params)
    return jax.lax.scan(step, state, batches)[1]


def chain(params: Params) -> Params:
    tx = optloss.make_optimizer(
        1e-3,
        "adamw(weight_decay=0.1)",
        learning_rate_multipliers=optloss.layerwise_decay(0.5, "layer_{}/**", 3),
        clip_gradients=1.0,
    )
    assert_type(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(params)
    updates, state = tx.update(params, state, params, value=jnp.zeros(()), step=0)
    moved: Any = optax.apply_updates(params, updates)
    found: dict[str, jax.Array] = optloss.get_summaries(state)
    assert_type(optloss.histogram(params), optloss.Histogram)
    assert_type(optloss.global_norm(params), jax.Array)
    assert_type(optloss.list_optimizers("adam*"), list[str])
    return {**moved, **found}


def parts() -> list[optax.GradientTransformationExtraArgs]:
    return [
        optloss.add_gradient_noise(0.1, distribution="truncated_normal"),
        optloss.multiply_gradients({"**/bias": 2.0}),
        optloss.clip_by_global_norm(1.0, axis_name="data"),
        optloss.clip_by_function(lambda pairs: [(g / 2, v) for g, v in pairs]),
        optloss.scale_by_learning_rate(
            0.1, partial(optloss.cosine_decay, decay_steps=9)
        ),
        optloss.inject_learning_rate(optax.adam, 0.1),
        optloss.skip_nonfinite(optax.adam(0.1)),
        optloss.OPTIMIZER_CLS_NAMES["Adam"](0.1),
    ]


def linen(state: TrainState, grads: Any, value: jax.Array) -> TrainState:
    state = state.apply_gradients(grads=grads, extra={"value": value}, batch_stats={})
    assert_type(state, TrainState)
    return state


class KeyedState(TrainState):
    """Fields of a user's own, one of them required."""

    key: jax.Array
    dynamic_scale: Any = None


def keyed(tx: optax.GradientTransformation, grads: Any) -> KeyedState:
    key = jax.random.key(0)
    state = KeyedState(0, loss, grads, tx, tx.init(grads), key, batch_stats={})
    assert_type(state.key, jax.Array)
    assert_type(state.apply_gradients(grads=grads, key=key), KeyedState)
    return state.replace(key=key)


def model_loss(model: nnx.Linear, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
    return jnp.mean(model(x + rngs.normal(x.shape)))


def model_loss_with_aux(
    model: nnx.Linear, x: jax.Array, metric: nnx.Metric
) -> tuple[jax.Array, dict[str, jax.Array]]:
    metric.update(values=x)
    return jnp.mean(model(x)), {"x": x}


def nnx_ops(model: nnx.Linear, anything: Any, x: jax.Array) -> jax.Array:
    op = optimize_model(
        anything, lambda model, x: jnp.mean(model(x)), 0, 0.1, "adam", None, None, 1.0
    )
    assert_type(op, ModelTrainOp)
    op.restore(op.state)
    assert_type(op.state, optloss.TrainOpState)
    assert_type(op(x), optloss.StepOutput)
    assert_type(op.describe(), str)
    assert_type(op.train_op.tx, optax.GradientTransformationExtraArgs)
    op = optimize_model(
        model,
        model_loss,
        global_step=0,
        learning_rate={"**": 0.1},
        optimizer={"**": "adam"},
        gradient_noise_scale=schedules,
        clip_gradients=optloss.zclip(),
        variables=["kernel", re.compile("b.*")],
        summaries=["loss"],
        skip_nonfinite=True,
        value_and_grad=optloss.accumulate_gradients(2),
        loss_scale=optloss.dynamic_loss_scale(),
        moving_average=0.99,
        wrt=nnx.All(nnx.Param, nnx.PathContains("kernel")),
    )
    op(x, nnx.Rngs(0))
    op = optimize_model(
        model, model_loss_with_aux, 0, 0.1, optax.adam, wrt=(nnx.Param, nnx.BatchStat)
    )
    op((x, x), metric=nnx.metrics.Average(), teacher={"first": nnx.clone(model)})
    found: jax.Array = op(x).loss
    return found


def schedules(step: jax.Array) -> float:
    return 0.1


class Sgd:
    """An optimizer of a user's own, which is no NamedTuple."""

    def __init__(self, rate: jax.Array) -> None:
        self.rate = rate

    def init(self, params: Params) -> tuple[()]:
        return ()

    def update(
        self, updates: Params, state: tuple[()], params: Params | None = None
    ) -> tuple[Params, tuple[()]]:
        return {name: -self.rate * g for name, g in updates.items()}, state


def with_aux(params: Params, x: jax.Array) -> tuple[jax.Array, int]:
    return loss(params, x), 1


def both(
    params: Params, state: Params, x: jax.Array
) -> tuple[jax.Array, Params, jax.Array]:
    return loss(params, x), state, x


def halved(
    pairs: list[tuple[jax.Array, jax.Array]],
) -> list[tuple[jax.Array, jax.Array]]:
    return [(g / 2, v) for g, v in pairs]


def rates_and_optimizers(rate: jax.Array, chosen: str) -> None:
    make = partial(optloss.optimize_loss, loss, 0)
    rates = {"**": 0.1}
    patterns: dict[types.Pattern, types.Scalar] = {"w": 0.1, re.compile(".*"): rate}
    named = {"**/kernel": "muon", "**": "adamw"}
    optloss.optimize_loss(loss, 0, 1, "adam")
    optloss.optimize_loss(loss, rate, rate, chosen)
    optloss.optimize_loss(loss, None, rate, optax.adam)
    optloss.optimize_loss(loss, 0, schedules, Sgd)
    optloss.optimize_loss(loss, 0, lambda step: 0.1 / (step + 1), "Adam")
    optloss.optimize_loss(loss, 0, optax.cosine_decay_schedule(0.1, 9), "Adam")
    optloss.optimize_loss(loss, 0, None, optax.adam(0.1))
    optloss.optimize_loss(loss, 0, None, Sgd(rate))
    optloss.optimize_loss(loss, 0, None, lambda: optax.sgd(0.1))
    optloss.optimize_loss(loss, 0, 0.1, lambda rate: optax.sgd(rate, momentum=0.9))
    optloss.optimize_loss(loss, 0, rates, named)
    optloss.optimize_loss(loss, 0, patterns, "adam")
    optloss.optimize_loss(loss, 0, {"w": 0.1, re.compile(".*"): schedules}, "adam")
    optloss.optimize_loss(
        loss, 0, {"w": None, "**": 0.1}, {"w": Sgd(rate), "**": "adam(b1=0.8)"}
    )
    optloss.optimize_loss(loss, 0, 0.1, {re.compile(".*"): optax.sgd, "b": "adam"})
    assert_type(make(0.1, "adam"), optloss.TrainOp)


def arguments(rate: jax.Array, mask: Any, params: Params) -> None:
    optloss.optimize_loss(with_aux, 0, 0.1, "adam", gradient_noise_scale=0.1)
    optloss.optimize_loss(both, 0, 0.1, "adam", gradient_noise_scale=schedules)
    optloss.optimize_loss(loss, 0, 0.1, "adam", gradient_noise_scale=rate, seed=1)
    optloss.optimize_loss(
        loss, 0, 0.1, "adam", gradient_multipliers={"w": schedules, "b": rate}
    )
    optloss.optimize_loss(
        loss, 0, 0.1, "adam", gradient_multipliers={re.compile("w"): 1, "b": 0.5}
    )
    multipliers = optloss.layerwise_decay(0.5, "layer_{}/**", 3)
    optloss.optimize_loss(loss, 0, 0.1, "adam", learning_rate_multipliers=multipliers)
    for clip in (1, 1.0, rate, halved, optloss.zclip(), optax.clip(1.0), None):
        optloss.optimize_loss(loss, 0, 0.1, "adam", clip_gradients=clip)
    optloss.optimize_loss(
        loss,
        0,
        0.1,
        "adam",
        clip_gradients=lambda pairs: [(g / 2, v) for g, v in pairs],
    )
    optloss.optimize_loss(
        loss,
        0,
        0.1,
        "adam",
        learning_rate_decay_fn=lambda rate, step: rate / (1 + step),
    )
    optloss.optimize_loss(loss, 0, 0.1, "adam", variables="w")
    optloss.optimize_loss(loss, 0, 0.1, "adam", variables={"w", re.compile("b")})
    optloss.optimize_loss(
        loss, 0, 0.1, "adam", variables=lambda name, leaf: leaf.ndim > 1
    )
    optloss.optimize_loss(loss, 0, 0.1, "adam", variables=mask)
    asked = optloss.OPTIMIZER_SUMMARIES
    optloss.optimize_loss(loss, 0, 0.1, "adam", name="", summaries=asked)
    optloss.optimize_loss(loss, 0, 0.1, "adam", summaries=("loss",), histogram_every=9)
    optloss.optimize_loss(loss, 0, 0.1, "adam", None, None, None, None, [keep])
    optloss.optimize_loss(loss, 0, 0.1, "adam", axis_name=("data", "model"))
    optloss.optimize_loss(loss, 0, 0.1, "adam", replica_axis_name="data")
    for differentiate in (
        jax.value_and_grad,
        optloss.accumulate_gradients(4),
        optloss.clip_per_example(1.0, in_axes=(0, None), batch=8),
    ):
        optloss.optimize_loss(loss, 0, 0.1, "adam", value_and_grad=differentiate)
    for scale in (None, 128, 128.0, optloss.dynamic_loss_scale()):
        optloss.optimize_loss(loss, 0, 0.1, "adam", loss_scale=scale)
    for decay in (None, 0.99, schedules):
        optloss.optimize_loss(loss, 0, 0.1, "adam", moving_average=decay)
    optloss.optimize_loss(
        loss, 0, 0.1, "adam", projection=optax.projections.projection_non_negative
    )


def named_types(
    rate: types.LearningRate,
    optimizer: types.Optimizer,
    noise: types.NoiseScale,
    multipliers: types.Multipliers,
    clip: types.Clip,
    decay_fn: types.DecayFn,
    variables: types.Variables,
    op: types.UpdateOp,
    summaries: types.Summaries,
    value_and_grad: types.ValueAndGrad,
    function: types.Loss,
) -> optloss.TrainOp:
    return optloss.optimize_loss(
        function, 0, rate, optimizer, noise, multipliers, clip, decay_fn, [op],
        variables, None, summaries, value_and_grad=value_and_grad,
    )  # fmt: skip


def decays(rate: float, step: jax.Array) -> list[jax.Array]:
    return [
        optloss.exponential_decay(rate, step, 100, 0.9, staircase=True),
        optloss.natural_exp_decay(rate, step, 100, 0.9),
        optloss.inverse_time_decay(rate, step, 100, 0.9),
        optloss.polynomial_decay(rate, step, 100, power=2, cycle=True),
        optloss.cosine_decay(jnp.float32(rate), 7, step, alpha=0.1),
        optloss.cosine_decay_restarts(rate, step, 100, t_mul=1.5),
        optloss.linear_cosine_decay(rate, step, 100),
        optloss.noisy_linear_cosine_decay(rate, step, 100, key=jax.random.key(0)),
        optloss.piecewise_constant(step, [1, 2], [0.1, 0.2, rate]),
    ]


def states(op: optloss.TrainOp, params: Params) -> list[str]:
    state = op.adopt(op.init(params), params)
    assert_type(state, optloss.TrainOpState)
    assert_type(float(optloss.get_learning_rate(state)), float)
    optloss.get_learning_rate(state)["**"]
    assert_type(optloss.set_learning_rate(state, {"**": 0.1}), optloss.TrainOpState)
    state = optloss.unpack_state(optloss.pack_state(state, params, 4), params, 4)
    state = optloss.pack_state(state, params, 4, unpacked_groups=["**/kernel"])
    opt_state, kept, fresh = optloss.carry_over(state.opt_state, state.opt_state)
    state, output = op.apply_gradients(state._replace(opt_state=opt_state), params)
    assert_type(output, optloss.StepOutput)
    optloss.register_optimizer("mine", optax.sgd)
    return kept + fresh


def clips(rate: jax.Array) -> list[optax.GradientTransformationExtraArgs]:
    return [
        optloss.clip_by_global_norm(rate),
        optloss.clip_by_global_norm(schedules),
        optloss.clip_by_function(halved),
        optloss.zclip(2.5, 0.97, warmup=25, mode="mean"),
        optloss.autoclip(10, history=64),
        optloss.adagc(1.04, absolute=rate),
        optloss.agc(0.01, exclude=["**/bias", re.compile("head/.*")]),
        optloss.multiply_gradients({"w": schedules, re.compile("b"): rate}),
        optloss.add_gradient_noise(schedules, key=jax.random.key(0)),
        optloss.scale_by_learning_rate(optax.constant_schedule(0.1)),
        optloss.make_optimizer({"w": 0.1, "**": rate}, {"**": "adam"}, seed=3),
    ]

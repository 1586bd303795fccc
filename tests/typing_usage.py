"""Typical uses, which must type-check for users; nothing here is run.

``mypy --strict`` and ``pyright`` look at it: an ``assert_type`` that fails is an error.
"""

from functools import partial
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

import optloss
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


def nnx(model: Any, x: jax.Array) -> jax.Array:
    op = optimize_model(
        model, lambda model, x: jnp.mean(model(x)), 0, 0.1, "adam", clip_gradients=1.0
    )
    assert_type(op, ModelTrainOp)
    op.restore(op.state)
    return op(x).loss

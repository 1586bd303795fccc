"""Wrong uses, each of which mypy and pyright have to refuse; nothing here is run.

A statement marked ``# wrong`` is one that the library refuses at run time as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optloss
from optloss import make_optimizer, optimize_loss
from optloss.integrations.linen import TrainState
from optloss.integrations.nnx import ModelTrainOp
from optloss.integrations.nnx import optimize_loss as optimize_model
from optloss.integrations.tensorboard import SummaryWriter

Params = dict[str, jax.Array]


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.mean(x @ params["w"])


def text_loss(params: Params, x: jax.Array) -> str:
    return "a text"


def three_auxes(params: Params) -> tuple[jax.Array, int, int, int]:
    return params["w"], 1, 2, 3


def keep(model_state: Params, context: optloss.UpdateContext) -> Params:
    return model_state


def keep_step(model_state: Params, step: int) -> Params:
    return model_state


def the_loss_and_its_step() -> None:
    optimize_loss(None, 0, 0.1, "adam")  # wrong
    optimize_loss("loss", 0, 0.1, "adam")  # wrong
    optimize_loss(text_loss, 0, 0.1, "adam")  # wrong
    optimize_loss(three_auxes, 0, 0.1, "adam")  # wrong
    optimize_loss(loss, 0, 0.1)  # wrong
    optimize_loss(loss, 0.5, 0.1, "adam")  # wrong
    optimize_loss(loss, "0", 0.1, "adam")  # wrong
    optimize_loss(loss, 0, 0.1, "adam", increment_global_step=None)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", update_ops=keep)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", update_ops=["keep"])  # wrong
    optimize_loss(loss, 0, 0.1, "adam", update_ops=[keep_step])  # wrong
    optimize_loss(loss, 0, 0.1, "adam", update_ops=[lambda state: state])  # wrong
    optimize_loss(loss, 0, 0.1, "adam", donate=None)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", clip_norm=1.0)  # wrong


def the_rate() -> None:
    optimize_loss(loss, 0, "0.1", "adam")  # wrong
    optimize_loss(loss, 0, 0.1j, "adam")  # wrong
    optimize_loss(loss, 0, [0.1], "adam")  # wrong
    optimize_loss(loss, 0, lambda step: "0.1", "adam")  # wrong
    optimize_loss(loss, 0, {"**": "fast"}, "adam")  # wrong
    optimize_loss(loss, 0, {3: 0.1}, "adam")  # wrong
    optimize_loss(loss, 0, 0.1, "adam", learning_rate_decay_fn=0.9)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", learning_rate_decay_fn=lambda r: r)  # wrong
    decay = optloss.exponential_decay
    optimize_loss(loss, 0, 0.1, "adam", learning_rate_decay_fn=decay)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", learning_rate_multipliers=0.5)  # wrong


def the_optimizer() -> None:
    optimize_loss(loss, 0, 0.1, None)  # wrong
    optimize_loss(loss, 0, 0.1, 3)  # wrong
    optimize_loss(loss, 0, 0.1, loss)  # wrong
    optimize_loss(loss, 0, 0.1, ["adam"])  # wrong
    optimize_loss(loss, 0, 0.1, {"**": 3})  # wrong
    optimize_loss(loss, 0, 0.1, lambda rate: "adam")  # wrong
    optimize_loss(loss, 0, 0.1, "adam", pack_small_leaves="all")  # wrong
    make_optimizer(0.1)  # wrong
    make_optimizer("0.1", "adam")  # wrong
    make_optimizer(0.1, 3)  # wrong
    make_optimizer(0.1, "adam", clip_gradients="1")  # wrong
    make_optimizer(0.1, "adam", gradient_multipliers=[0.5])  # wrong
    make_optimizer(0.1, "adam", summaries=["loss"])  # wrong


def the_gradient() -> None:
    optimize_loss(loss, 0, 0.1, "adam", gradient_noise_scale="0.1")  # wrong
    optimize_loss(loss, 0, 0.1, "adam", seed=0.5)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", gradient_multipliers=0.5)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", gradient_multipliers={"w": "half"})  # wrong
    optimize_loss(loss, 0, 0.1, "adam", gradient_multipliers={3: 0.5})  # wrong
    optimize_loss(loss, 0, 0.1, "adam", clip_gradients="1")  # wrong
    factory = optloss.adaptive_clipping
    optimize_loss(loss, 0, 0.1, "adam", clip_gradients=factory)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", clip_gradients=lambda pairs: 1.0)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", colocate_gradients_with_ops="yes")  # wrong
    optimize_loss(loss, 0, 0.1, "adam", skip_nonfinite="yes")  # wrong
    optimize_loss(loss, 0, 0.1, "adam", axis_name=3)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", replica_axis_name=["data"])  # wrong
    optimize_loss(loss, 0, 0.1, "adam", value_and_grad=loss)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", loss_scale="dynamic")  # wrong
    optimize_loss(loss, 0, 0.1, "adam", projection=1.0)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", moving_average="0.99")  # wrong


def the_summaries() -> None:
    optimize_loss(loss, 0, 0.1, "adam", name=3)  # wrong
    optimize_loss(loss, 0, 0.1, "adam", summaries="loss")  # wrong
    optimize_loss(loss, 0, 0.1, "adam", summaries=["losses"])  # wrong
    optimize_loss(loss, 0, 0.1, "adam", histogram_every=0.5)  # wrong
    writer = SummaryWriter(3)  # wrong
    writer.write(0, ["loss"])  # wrong


def the_op(op: optloss.TrainOp, state: optloss.TrainOpState) -> None:
    op.init()  # wrong
    op()  # wrong
    op("state")  # wrong
    op.update(None)  # wrong
    _state, _loss, _summaries = op(state)  # wrong
    optloss.set_learning_rate(state, "fast")  # wrong
    optloss.pack_state(state, state.params, "4")  # wrong


def the_transforms(params: Params) -> None:
    optloss.add_gradient_noise(None)  # wrong
    optloss.add_gradient_noise(0.1, key="seed")  # wrong
    optloss.multiply_gradients([0.5])  # wrong
    optloss.layerwise_decay(0.5, 3, 12)  # wrong
    optloss.clip_by_global_norm("1")  # wrong
    optloss.clip_by_function(optax.clip(1.0))  # wrong
    optloss.adaptive_clipping(statistics=3)  # wrong
    optloss.zclip("2.5")  # wrong
    optloss.autoclip(history=0.5)  # wrong
    optloss.adagc(warmup="1")  # wrong
    optloss.agc(exclude=3)  # wrong
    optloss.scale_by_learning_rate(None)  # wrong
    optloss.inject_learning_rate("adam", 0.1)  # wrong
    optloss.skip_nonfinite("adam")  # wrong
    optloss.accumulate_gradients(0.5)  # wrong
    optloss.clip_per_example("1")  # wrong
    optloss.dynamic_loss_scale("large")  # wrong
    optloss.global_norm(params, axis_name=3)  # wrong
    optloss.histogram(params, axis_name=3)  # wrong


def the_decays() -> None:
    optloss.exponential_decay(0.1, 0, "1000", 0.9)  # wrong
    optloss.natural_exp_decay(0.1, 0, 1000)  # wrong
    optloss.inverse_time_decay("0.1", 0, 1000, 0.9)  # wrong
    optloss.polynomial_decay(0.1, 0, 1000, power="2")  # wrong
    optloss.cosine_decay(0.1, "0", 1000)  # wrong
    optloss.cosine_decay_restarts(0.1, 0, 1000, t_mul=None)  # wrong
    optloss.linear_cosine_decay(0.1, 0)  # wrong
    optloss.noisy_linear_cosine_decay(0.1, 0, 1000, key="0")  # wrong
    optloss.piecewise_constant(0, 100, [0.5, 0.25])  # wrong


def the_registry() -> None:
    optloss.list_optimizers(3)  # wrong
    optloss.register_optimizer("mine", 3)  # wrong


def the_nnx_op(model: Any, op: ModelTrainOp) -> None:
    optimize_model("model", loss, 0, 0.1, "adam")  # wrong
    optimize_model(loss, 0, 0.1, "adam")  # wrong
    optimize_model(model, None, 0, 0.1, "adam")  # wrong
    optimize_model(model, text_loss, 0, 0.1, "adam")  # wrong
    optimize_model(model, three_auxes, 0, 0.1, "adam")  # wrong
    optimize_model(model, loss, 0, 0.1)  # wrong
    optimize_model(model, loss, 0.5, 0.1, "adam")  # wrong
    optimize_model(model, loss, 0, "0.1", "adam")  # wrong
    optimize_model(model, loss, 0, 0.1, 3)  # wrong
    optimize_model(model, loss, 0, 0.1, "adam", "0.1")  # wrong
    optimize_model(model, loss, 0, 0.1, "adam", clip_norm=1.0)  # wrong
    optimize_model(model, loss, 0, 0.1, "adam", clip_gradients="1")  # wrong
    optimize_model(model, loss, 0, 0.1, "adam", update_ops=keep)  # wrong
    optimize_model(model, loss, 0, 0.1, "adam", donate=None)  # wrong
    optimize_model(model, loss, 0, 0.1, "adam", value_and_grad=loss)  # wrong
    optimize_model(model, loss, 0, 0.1, "adam", wrt=3)  # wrong
    op.restore()  # wrong
    op.restore(op)  # wrong
    op.describe("params")  # wrong
    _state, _output = op(1.0).loss, op(1.0).losses  # wrong


def the_linen_state(state: TrainState, grads: Params) -> None:
    state.apply_gradients(grads)  # wrong
    state.apply_gradients(grads=grads, extra=0.5)  # wrong
    TrainState(0, loss, grads, optax.sgd(0.1), (), {})  # wrong
    TrainState(0, loss, grads)  # wrong

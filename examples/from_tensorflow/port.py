from functools import partial

import jax
import jax.numpy as jnp

import optloss
from optloss.integrations.tensorboard import SummaryWriter


def layer(params, x):
    return x @ params["kernel"] + params["bias"]


def loss_of(params, averages, x, y, weight):
    hidden = jnp.tanh(layer(params["dense1"], x))
    predicted = layer(params["dense2"], hidden)
    loss = weight * jnp.mean((predicted - y) ** 2)
    now = {
        "mean": hidden.mean(0),
        "variance": hidden.var(0),
    }
    return loss, averages, now


def average(averages, context):
    # What a BatchNorm keeps for later use.
    def move(kept, value):
        return kept - 0.1 * (kept - value)

    return jax.tree.map(move, averages, context.aux)


decay = partial(
    optloss.exponential_decay,
    decay_steps=6,
    decay_rate=0.7,
)


def train(params, batches, logdir):
    averages = {
        "mean": jnp.zeros(7),
        "variance": jnp.ones(7),
    }

    train_op = optloss.optimize_loss(
        loss_of,
        global_step=0,
        learning_rate=0.02,
        optimizer="Adam",
        gradient_multipliers={
            "dense1/kernel": 0.1,
            "dense2/bias": 3.0,
        },
        clip_gradients=5.0,
        learning_rate_decay_fn=decay,
        update_ops=[average],
        variables=["dense2/*", "dense1/kernel"],
        summaries=[
            "loss",
            "learning_rate",
            "global_gradient_norm",
        ],
    )

    state = train_op.init(params, averages)
    with SummaryWriter(logdir) as writer:
        for number, batch in enumerate(batches):
            state, output = train_op(state, *batch)
            writer.write(number, output.summaries)
    return state

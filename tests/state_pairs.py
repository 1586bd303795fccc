"""Pairs of ops that differ in one thing, and what of a state that thing changes."""

import functools

import jax.numpy as jnp
import optax

import optloss

PARAMS = {
    "body": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
}
PACKED = {"pack_small_leaves": 4}
DECAY = functools.partial(
    optloss.exponential_decay, decay_steps=10, decay_rate=jnp.float32(0.9)
)


def loss(params, x):
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"]) ** 2)


def op_of(**options):
    given = {"global_step": 0, "learning_rate": 0.01, "optimizer": "adam"} | options
    return optloss.optimize_loss(loss, **given)


def moments(optimizer):
    return {"optimizer": optimizer}


# name: options of the old op, options of the new one, the part named, what is kept
PAIRS = {
    "clip to none": ({"clip_gradients": 1.0}, {}, "clip"),
    "none to clip": ({}, {"clip_gradients": 1.0}, "clip"),
    "clip to adaptive": (
        {"clip_gradients": 1.0},
        {"clip_gradients": optloss.adaptive_clipping()},
        "clip",
    ),
    "adaptive to clip": (
        {"clip_gradients": optloss.adaptive_clipping()},
        {"clip_gradients": 1.0},
        "clip",
    ),
    "adaptive to optax's clip": (
        {"clip_gradients": optloss.adaptive_clipping()},
        {"clip_gradients": optax.clip(1.0)},
        "clip",
    ),
    "current to previous": (
        {"clip_gradients": optloss.adaptive_clipping()},
        {"clip_gradients": optloss.adaptive_clipping(statistics="previous")},
        "clip",
    ),
    "noise to none": ({"gradient_noise_scale": 0.1}, {}, "noise"),
    "none to noise": ({}, {"gradient_noise_scale": 0.1}, "noise"),
    "noise to optax's": (
        {"gradient_noise_scale": 0.1},
        {"gradient_noise_scale": optax.add_noise(0.1, 0.5, 0)},
        "noise",
    ),
    "number to schedule": ({}, {"learning_rate": lambda step: 0.1}, "optimizer"),
    "schedule to number": ({"learning_rate": lambda step: 0.1}, {}, "optimizer"),
    "counter to none": ({}, {"global_step": None}, "step counter"),
    "none to counter": ({"global_step": None}, {}, "step counter"),
    "guarded to unguarded": ({"skip_nonfinite": True}, {}, "guard"),
    "unguarded to guarded": ({}, {"skip_nonfinite": True}, "guard"),
    "adam to SGD": ({}, moments("SGD"), "optimizer"),
    "SGD to adam": (moments("SGD"), {}, "optimizer"),
    "adam to Adam": ({}, moments("Adam"), "optimizer"),
    "adam to amsgrad": ({}, moments("amsgrad"), "optimizer"),
    "adam to lion": ({}, moments("lion"), "optimizer"),
    "adam to adamw": ({}, moments("adamw"), "optimizer"),
    "Adagrad to Momentum": (moments("Adagrad"), moments("Momentum"), "optimizer"),
    "Momentum to Ftrl": (moments("Momentum"), moments("Ftrl"), "optimizer"),
    "RMSProp, centered": (
        moments("RMSProp"),
        moments("RMSProp(centered=True)"),
        "optimizer",
    ),
    "a rate's own instance": (
        {},
        {"optimizer": optax.adam(0.01), "learning_rate": None},
        "optimizer",
    ),
    "an unfrozen body": ({"variables": "head/*"}, {}, "optimizer"),
    "a frozen body": ({}, {"variables": "head/*"}, "optimizer"),
    "kernels to biases": (
        {"variables": "**/kernel"},
        {"variables": "**/bias"},
        "optimizer",
    ),
    "packed to unpacked": (PACKED, {}, "packing"),
    "unpacked to packed": ({}, PACKED, "packing"),
    "packed at another size": (PACKED, {"pack_small_leaves": 6}, "optimizer"),
    "packed, of like shapes": (
        PACKED | {"variables": "head/bias"},
        PACKED | {"variables": "body/bias"},
        "optimizer",
    ),
    "packed, unfrozen": (PACKED | {"variables": "head/*"}, PACKED, "optimizer"),
    "adam to nadam": ({}, moments("nadam"), None),
    "SGD to sign_sgd's like": (moments("sgd"), moments("sign_sgd"), None),
    "another bound": ({"clip_gradients": 1.0}, {"clip_gradients": 2.0}, None),
    "another rate": ({}, {"learning_rate": 0.5}, None),
    "a decay": ({}, {"learning_rate_decay_fn": DECAY}, None),
    "multipliers": ({}, {"gradient_multipliers": {"head/*": 0.5}}, None),
    "summaries": ({}, {"summaries": ["gradients"]}, None),
}

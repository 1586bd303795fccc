"""The steps that ``targets.py`` compiles: optloss's, and optax's beside each.

A program is named library/target/case/parameters/leaves, for example
``optloss/h100/clip+guard/1e7/16``, and for the TPU a form besides: ``op`` is a training
op, ``chain`` is ``make_optimizer`` with ``apply_updates``. Nothing is allocated: a
program is a function and the shapes of its arguments.

The loss costs nothing: its value and its gradient are arguments, as a backward pass
leaves them in memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optloss

BOUND, STD, RATE = 1.0, 0.1, 1e-3
DECAY_STEPS, DECAY_RATE = 1000, 0.96
GUARDED = ("clip+guard", "everything", "network")
NOISY = ("noise+clip", "everything", "network")
EVERYTHING = {
    "gradient_multipliers": {"layer000": 0.5},
    "learning_rate_multipliers": {"layer001": 0.5},
    "learning_rate_decay_fn": functools.partial(
        optloss.exponential_decay, decay_steps=DECAY_STEPS, decay_rate=DECAY_RATE
    ),
}
SUMMARIES = {
    "everything": ["learning_rate", "loss", "global_gradient_norm"],
    "clip+gradient_norm": ["gradient_norm"],
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One step, of one library, for one target."""

    library: str
    target: str
    case: str
    parameters: int
    leaves: int
    form: str = ""

    @classmethod
    def parse(cls, name: str) -> "Program":
        """Return the program of a name."""
        library, target, case, parameters, leaves, *form = name.split("/")
        return cls(
            library, target, case, int(float(parameters)), int(leaves), *form[:1]
        )

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the parameters: equal matrices, as square as may be."""
        size = self.parameters // self.leaves
        rows = max(n for n in range(1, int(size**0.5) + 1) if size % n == 0)
        return {
            f"layer{i:03d}": jax.ShapeDtypeStruct((rows, size // rows), jnp.float32)
            for i in range(self.leaves)
        }

    def build(self) -> tuple[Callable, tuple]:
        """Return ``step(state, *inputs) -> state, seen`` and the shapes it takes."""
        params = self.shapes()
        if self.case == "network":
            loss, inputs = network, (jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32),)
        else:
            loss, inputs = handed, (params, jax.ShapeDtypeStruct((), jnp.float32))
        steps = {"optloss": optloss_step, "optax": optax_step}
        step, init = steps[self.library](self.case, loss, self.form)
        return step, (jax.eval_shape(init, params), *inputs)


@jax.custom_vjp
def handed(params: Any, gradients: Any, value: jax.Array) -> jax.Array:
    """Be ``value``, with these gradients."""
    del params, gradients
    return value


handed.defvjp(
    lambda params, gradients, value: (value, gradients),
    lambda gradients, _: (
        gradients,
        jax.tree.map(jnp.zeros_like, gradients),
        jnp.zeros(()),
    ),
)


WIDTH, BATCH = 1024, 256


def network(params: Any, x: jax.Array) -> jax.Array:
    """Return a loss of layers of ``WIDTH`` units without biases."""
    for weight in params.values():
        x = jnp.tanh(x @ weight)
    return jnp.mean(x * x)


def optloss_step(case: str, loss: Callable, form: str) -> tuple[Callable, Callable]:
    features: dict[str, Any] = {}
    if case != "adam":
        features["clip_gradients"] = BOUND
    if case == "adaptive":
        features["clip_gradients"] = optloss.adaptive_clipping()
    if case in NOISY:
        features["gradient_noise_scale"] = STD
    if case in GUARDED:
        features["skip_nonfinite"] = True
    if case == "everything":
        features |= EVERYTHING
    if form == "chain":
        return applied(optloss.make_optimizer(RATE, "adam", **features), loss)
    train_op = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=RATE,
        optimizer="adam",
        summaries=SUMMARIES.get(case, []),
        **features,
    )
    return train_op.update, train_op.init


def optax_step(case: str, loss: Callable, form: str) -> tuple[Callable, Callable]:
    """Return the step as an expert writes it."""
    del form
    rate: Any = RATE
    if case == "everything":
        rate = optax.exponential_decay(RATE, DECAY_STEPS, DECAY_RATE)
    stages = [optax.adam(rate)]
    if case != "adam":
        stages.insert(0, optax.clip_by_global_norm(BOUND))
    if case == "everything":
        stages.insert(0, times("layer000"))
        stages.append(times("layer001"))
    if case in NOISY:
        stages.insert(0, optax.add_noise(STD**2, 0.0, 0))
    tx = optax.chain(*stages)
    if case in GUARDED:
        tx = optax.apply_if_finite(tx, 10**9)

    def look(gradients: Any, step: jax.Array) -> dict[str, Any]:
        if case == "everything":
            norm = optax.tree.norm(gradients)
            return {"global_gradient_norm": norm, "learning_rate": rate(step)}
        if case == "clip+gradient_norm":
            return {k: jnp.linalg.norm(jnp.ravel(v)) for k, v in gradients.items()}
        return {}

    return applied(tx, loss, look)


def times(name: str) -> optax.GradientTransformation:
    """Multiply one leaf by a half."""
    return optax.stateless(lambda updates, _: {**updates, name: updates[name] * 0.5})


def applied(
    tx: optax.GradientTransformation,
    loss: Callable,
    look: Callable[[Any, jax.Array], dict[str, Any]] = lambda gradients, step: {},
) -> tuple[Callable, Callable]:
    """Return a step that applies what ``tx`` makes of a loss's gradients."""

    def step(state: Any, *inputs: Any) -> Any:
        step, params, inner = state
        value, gradients = jax.value_and_grad(loss)(params, *inputs)
        updates, inner = tx.update(gradients, inner, params)
        seen = {"loss": value, **look(gradients, step)}
        return (step + 1, optax.apply_updates(params, updates), inner), seen

    return step, lambda params: (jnp.zeros((), jnp.int32), params, tx.init(params))

"""The steps that ``targets.py`` compiles: optloss's, and optax's beside each.

A program is named library/target/case/parameters/leaves, for example
``optloss/h100/clip+guard/1e7/16``, and for the TPU a form besides: ``op`` is a training
op, ``chain`` is ``make_optimizer`` with ``apply_updates``. Nothing is allocated: a
program is a function and the shapes of its arguments.

The loss costs nothing: its value and its gradient are arguments, as a backward pass
leaves them in memory. Two have a real one, forward and backward: the case ``network``,
and all of the target ``tpu64``, a Llama of the width of 7B on an 8 x 8 mesh. In the
case ``known`` the gradients are constants, which XLA knows while compiling.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import large_model
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import optloss

BOUND, STD, RATE = 1.0, 0.1, 1e-3
DECAY_STEPS, DECAY_RATE = 1000, 0.96
GUARDED = ("clip+guard", "noise+clip+guard", "everything", "network")
NOISY = ("noise+clip", "noise+clip+guard", "everything", "network")
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

    def build(self, devices: list[Any]) -> tuple[Callable, tuple]:
        """Return ``step(state, *inputs) -> state, seen`` and the shapes it takes."""
        if self.case == "known":
            place = SingleDeviceSharding(devices[0])
            params = matrices(self.parameters, self.leaves, place)
            return known_step(magnitudes(self.parameters)), (params,)
        if self.target == "tpu64":
            loss, params, inputs = llama(self.leaves, devices)
        else:
            place = SingleDeviceSharding(devices[0])
            params = matrices(self.parameters, self.leaves, place)
            value = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
            loss, inputs = handed, (params, value)
            if self.case == "network":
                params = matrices(self.leaves * WIDTH**2, self.leaves, place)
                loss, inputs = network, (matrix(BATCH, WIDTH, place),)
        steps = {"optloss": optloss_step, "optax": optax_step}
        step, init = steps[self.library](self.case, loss, self.form)
        return step, (beside(params, jax.eval_shape(init, params)), *inputs)


def matrix(rows: int, columns: int, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, columns), jnp.float32, sharding=sharding)


def matrices(parameters: int, leaves: int, sharding: Any) -> dict[str, Any]:
    """Return equal matrices, as square as may be."""
    size = parameters // leaves
    rows = max(n for n in range(1, int(size**0.5) + 1) if size % n == 0)
    return {
        f"layer{i:03d}": matrix(rows, size // rows, sharding) for i in range(leaves)
    }


def beside(params: Any, state: Any) -> Any:
    """Return ``state`` with what mirrors a parameter in its place, the rest everywhere.

    As ``init`` does with arrays.
    """
    places = {
        path: leaf.sharding
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    everywhere = next(iter(places.values()))
    if isinstance(everywhere, NamedSharding):
        everywhere = NamedSharding(everywhere.mesh, P())

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        ends = (path[start:] for start in range(len(path)))
        sharding = next((places[end] for end in ends if end in places), everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def llama(leaves: int, devices: list[Any]) -> tuple[Callable, Any, tuple]:
    """Return the loss, parameters and input of a Llama: 9 leaves a layer, 3 more."""
    mesh = Mesh(
        np.reshape(devices, (8, 8)),
        large_model.AXES,
        axis_types=(AxisType.Auto,) * 2,
    )
    size = large_model.Size(layers=(leaves - 3) // 9)
    tokens = jax.ShapeDtypeStruct(
        (8, 9), jnp.int32, sharding=NamedSharding(mesh, P("data"))
    )
    loss = functools.partial(large_model.loss, heads=size.heads)
    return loss, large_model.shapes_of(size, mesh), (tokens,)


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
    if case == "clip+spikes":
        features["skip_spikes"] = True
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


def magnitudes(parameters: int) -> list[float]:
    """Return constants of which so many have a norm that float32 can hold."""
    exponents = (-38, -30, -20, -10, 0, 10, 20, 30, 36, 38)
    some = [0.0, *(10.0**exponent for exponent in exponents)]
    largest = float(jnp.finfo(jnp.float32).max)
    return [c for c in some if float(c) * parameters**0.5 < largest]


def known_step(constants: list[float]) -> Callable:
    """Return a step that makes of each constant the norm and the skipped updates."""
    train_op = optloss.optimize_loss(
        large_model.given,
        global_step=0,
        learning_rate=RATE,
        optimizer="adam",
        clip_gradients=BOUND,
        skip_nonfinite=True,
        summaries=[],
    )

    def step(params: Any) -> Any:
        seen = []
        for constant in constants:
            fill = functools.partial(jnp.full_like, fill_value=constant)
            gradients = jax.tree.map(fill, params)
            state, _ = train_op.update(train_op.init(params), gradients)
            measured = optloss.get_summaries(state)
            seen += [measured["global_norm/gradient_norm"], measured["skipped/total"]]
        return params, seen

    return step


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

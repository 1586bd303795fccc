"""A Flax ``TrainState`` that passes the loss on to its optimizer.

Flax's own ``apply_gradients`` calls ``tx.update`` with the gradients, the state and the
parameters alone, so a transform that wants to see the loss, such as the guard against
non-finite updates or ``optax.contrib.reduce_on_plateau``, cannot be used with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import optax

from optloss.messages import argument_error, quoted
from optloss.typing import PyTree

try:
    from flax import struct
    from flax.training import train_state
except ImportError as error:
    raise ImportError(
        "optloss.integrations.linen needs flax. Install it: pip install 'optloss[flax]'"
    ) from error


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` with ``batch_stats``, whose optimizer may see the loss.

    Everything else is Flax's: ``create``, ``replace``, ``apply_fn``, subclassing for
    more fields, with or without a default. With :func:`optloss.make_optimizer` as its
    ``tx`` a linen loop has the whole chain.

    Args:
        step: How many times gradients were applied; ``create`` starts it at 0.
        apply_fn: Usually ``model.apply``.
        params: The parameters.
        tx: An optax transformation.
        opt_state: Its state.
        batch_stats: The collection that ``nn.BatchNorm`` keeps, or ``None``; by keyword
            only.

    Example:
        >>> import jax, jax.numpy as jnp, optloss
        >>> from flax import linen as nn
        >>> model, x = nn.Dense(1), jnp.ones((4, 2))
        >>> state = TrainState.create(
        ...     apply_fn=model.apply,
        ...     params=model.init(jax.random.key(0), x)["params"],
        ...     tx=optloss.make_optimizer(0.1, "adam", skip_nonfinite=True),
        ... )
        >>> def loss(params):
        ...     return jnp.mean((state.apply_fn({"params": params}, x) - 1.0) ** 2)
        >>> for _ in range(100):
        ...     value, grads = jax.value_and_grad(loss)(state.params)
        ...     state = state.apply_gradients(grads=grads, extra={"value": value})
        >>> print(state.step, f"{value:.2f}")
        100 0.00

        A subclass with more fields:

        >>> class KeyedState(TrainState):
        ...     key: jax.Array
        >>> keyed = KeyedState.create(
        ...     apply_fn=state.apply_fn,
        ...     params=state.params,
        ...     tx=state.tx,
        ...     key=jax.random.key(0),
        ... )
        >>> keyed.apply_gradients(grads=grads, extra={"value": value}).step
        1

    See also:
        :func:`optloss.get_summaries`, which reads what the chain measured from it.
    """

    # By keyword and with a factory, so that a subclass may add fields without a
    # default, and declare this one anew without one.
    batch_stats: PyTree = struct.field(default_factory=type(None), kw_only=True)

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        extra: Mapping[str, PyTree] | None = None,
        **fields: PyTree,
    ) -> Self:
        """Return the state after one update by ``grads``.

        Args:
            grads: Gradients, a tree like ``params``.
            extra: Arguments handed on to ``tx.update`` by name: ``{"value": loss}``, or
                ``{"value": loss, "step": state.step}`` where decay and annealing are to
                read the step of this state instead of counting their own updates. A
                transform that takes no such arguments is not given them.
            **fields: Fields to replace, such as ``batch_stats``.

        Returns:
            A state with the new parameters and optimizer state, one ``step`` further.

        Raises:
            ValueError: If ``extra`` is no mapping, or the state has no such field.
        """
        call = "TrainState.apply_gradients"
        named = isinstance(extra, Mapping) and all(isinstance(n, str) for n in extra)
        if extra is not None and not named:
            cure = "must map names to values, such as {'value': loss}."
            raise argument_error(call, "extra", extra, cure)
        known = {field.name for field in dataclasses.fields(self)}
        for name in fields.keys() - known:
            raise argument_error(
                call,
                name,
                fields[name],
                "the state has no such field. If it is meant for the optimizer, pass "
                f"extra={{{quoted(name)}: ...}}.",
            )
        tx = optax.with_extra_args_support(self.tx)
        update = functools.partial(tx.update, **(extra or {}))
        seeing = self.replace(tx=optax.GradientTransformation(tx.init, update))
        # The step of a jitted loop must keep its tx: it is part of the cache key.
        fields.setdefault("tx", self.tx)
        flax_state: Any = super(TrainState, seeing)
        return flax_state.apply_gradients(grads=grads, **fields)

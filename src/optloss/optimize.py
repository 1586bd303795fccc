"""The two calls: ``optimize_loss`` makes a step, ``make_optimizer`` its chain alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import optax

from optloss.chain import Chain
from optloss.loss_scale import LossScale
from optloss.summaries import Asked
from optloss.train_op import TrainOp
from optloss.typing import (
    AxisName,
    Clip,
    DecayFn,
    LearningRate,
    Loss,
    Multipliers,
    NoiseScale,
    Optimizer,
    Params,
    Schedule,
    Summaries,
    UpdateOp,
    ValueAndGrad,
    Variables,
)


def optimize_loss(
    loss: Loss,
    global_step: int | jax.Array | None,
    learning_rate: LearningRate,
    optimizer: Optimizer,
    gradient_noise_scale: NoiseScale = None,
    gradient_multipliers: Multipliers | None = None,
    clip_gradients: Clip = None,
    learning_rate_decay_fn: DecayFn | None = None,
    update_ops: Sequence[UpdateOp] | None = None,
    variables: Variables = None,
    name: str | None = None,
    summaries: Summaries | None = None,
    colocate_gradients_with_ops: bool = False,
    increment_global_step: bool = True,
    *,
    learning_rate_multipliers: Multipliers | None = None,
    histogram_every: int = 1,
    skip_nonfinite: bool = False,
    seed: int | jax.Array = 0,
    pack_small_leaves: int = 0,
    axis_name: AxisName = None,
    replica_axis_name: AxisName = None,
    donate: bool = True,
    skip_spikes: float | None = None,
    value_and_grad: ValueAndGrad = jax.value_and_grad,
    loss_scale: float | LossScale | None = None,
    projection: Callable[[Params], Params] | None = None,
    moving_average: float | Schedule | None = None,
) -> TrainOp:
    r"""Make a complete, compiled training step of a loss.

    Each step differentiates the loss and runs, always in the order of
    ``tf.contrib.layers.optimize_loss``::

        gradient -> + noise -> x multipliers -> (norm measured) -> clip
        -> (clipped norm measured) -> optimizer at lr(step) -> x rate multipliers
        -> step + 1

    What is not asked for costs nothing.

    Args:
        loss: ``loss(params, *args, **kwargs)`` returns the loss, a real floating
            scalar, or ``(loss, aux)``. When ``init`` was given a ``model_state``, it is
            ``loss(params, model_state, *args, **kwargs)`` and returns ``(loss,
            new_model_state)`` or ``(loss, new_model_state, aux)``.
        global_step: Where the step counter starts, or ``None`` for no counter.
        learning_rate: A number, a 0-d array, or a schedule (a function of the step).
            ``None`` with an optimizer that brings its own rate. A mapping from names or
            patterns to any of these gives groups of parameters rates of their own.
        optimizer: A name such as ``"adam"`` or ``"adamw(weight_decay=0.1)"``
            (:func:`list_optimizers`; capitalised names are TensorFlow's); a function of
            the learning rate; a class built from the rate; an optax transformation,
            whose own rate then governs; with ``learning_rate=None``, a function without
            arguments. A mapping from names or patterns to any of these gives groups of
            parameters optimizers of their own, behind one clip and one guard.
        gradient_noise_scale: Standard deviation of Gaussian noise on the gradient, a
            function of the step that returns it, or a transformation such as
            :func:`add_gradient_noise`.
        gradient_multipliers: Maps names or patterns of parameters to factors of their
            gradient, numbers or functions of the step. Adam, Adagrad and RMSProp divide
            the gradient by its own size, which nearly undoes a constant factor: with
            0.1, the path of a parameter over its first 1,000 updates was 1.00, 0.92 and
            0.97 times what it was without. See ``learning_rate_multipliers``.
        clip_gradients: Largest global norm (``inf`` only measures), a transformation
            such as :func:`adaptive_clipping`, or a function from a list of ``(gradient,
            variable)`` pairs to such a list.
        learning_rate_decay_fn: ``fn(learning_rate, step) -> rate``, such as
            ``functools.partial(exponential_decay, decay_steps=1000, decay_rate=0.96)``.
        update_ops: Functions ``op(model_state, context) -> model_state``, run in order
            at the end of the update; ``context`` is an :class:`UpdateContext`.
        variables: Which parameters are trained: names or patterns, a predicate
            ``(name, leaf) -> bool`` or a tree of bools; ``None`` for every floating or
            complex one. The others cost no backward pass and come back bit for bit.
        name: Prefix of the summaries' tags, default ``"OptimizeLoss"``; ``""`` for
            none.
        summaries: Which of ``OPTIMIZER_SUMMARIES`` to report; default: learning rate
            and loss.
        colocate_gradients_with_ops: Whether each gradient is constrained to the
            sharding of its parameter.
        increment_global_step: Whether a step increments the counter.
        learning_rate_multipliers: Maps names or patterns to factors of the *update*,
            behind the optimizer, where every optimizer feels them.
        histogram_every: Histograms are computed when the step is a multiple of it.
        skip_nonfinite: Whether a step whose loss or gradient holds NaN or infinity
            changes nothing but the step and two counters.
        seed: Where the noise starts: an int or a JAX key.
        pack_small_leaves: Largest size of a leaf that is packed with its like while an
            elementwise optimizer works on it; 0 packs none.
        axis_name: For ``train_op.update`` under ``shard_map`` or ``pmap``: the mesh
            axes that parameters may be sharded over. The loss returns its
            ``jax.lax.pmean``. Types tell which parameters are; where they do not, every
            one counts as sharded.
        replica_axis_name: The mesh axes along which all devices hold the same
            parameters. Under ``pmap``, and ``shard_map`` with ``check_vma=False``,
            it has to be given, and gradients are averaged over them; elsewhere JAX has
            done so. ``()`` for none.
        donate: Whether ``train_op(state, ...)`` donates the buffers of the state.
        skip_spikes: Whether a step whose loss or gradient lies far above those before
            it is skipped: the ``std_factor`` of :func:`~optloss.skip_spikes`, or
            ``True`` for its default.
        value_and_grad: How the loss is differentiated: a function like
            ``jax.value_and_grad``, such as :func:`accumulate_gradients` or
            :func:`clip_per_example`.
        loss_scale: What the loss is multiplied by before it is differentiated, and the
            gradients are divided by: a number > 0, or :func:`dynamic_loss_scale`, which
            implies ``skip_nonfinite``.
        projection: A function of the trained parameters, such as
            ``optax.projections.projection_non_negative``, applied after each update.
        moving_average: Decay :math:`d` in [0, 1), or a function of the step that
            returns it, of a moving average of the trained parameters; see
            :meth:`TrainOp.averaged`. A number is warmed up, as
            :math:`\min(d, (1 + t) / (10 + t))` with :math:`t` the updates so far; what
            a function returns is not.

    Returns:
        A :class:`TrainOp`. ``train_op.init(params)`` makes a :class:`TrainOpState`, and
        ``train_op(state, *args)`` returns the next one and a :class:`StepOutput`.

    Raises:
        ValueError: If an argument is refused: at once where it can be known, names of
            parameters at ``init``, results of the loss when it is first traced.

    Note:
        The returned loss is the one *before* the update.

    Example:
        >>> import jax.numpy as jnp, optloss
        >>> def loss(params, x, y):
        ...     return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)
        >>> train_op = optloss.optimize_loss(
        ...     loss, global_step=0, learning_rate=0.1, optimizer="adam",
        ...     clip_gradients=1.0,
        ... )
        >>> state = train_op.init({"w": jnp.zeros(2), "b": jnp.zeros(())})
        >>> x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 2.0])
        >>> for _ in range(200):
        ...     state, output = train_op(state, x, y)
        >>> print(f"{output.loss:.4f} at step {state.step}")
        0.0000 at step 200

    See also:
        :func:`make_optimizer`, the chain without the loss.

    References:
        ``tf.contrib.layers.optimize_loss``, TensorFlow 1.15.
    """
    chain = Chain.of("optimize_loss", locals())
    return TrainOp(
        loss=loss,
        chain=chain,
        global_step=global_step,
        update_ops=None if update_ops is None else tuple(update_ops),
        asked=Asked(
            summaries=("loss", "learning_rate")
            if summaries is None
            else tuple(summaries),
            name="OptimizeLoss" if name is None else name,
            histogram_every=int(histogram_every),
            axis_name=chain.axis_name,
        ),
        colocate_gradients_with_ops=colocate_gradients_with_ops,
        increment_global_step=increment_global_step,
        replica_axis_name=replica_axis_name,
        donate=donate,
        value_and_grad=value_and_grad,
        projection=projection,
        moving_average=moving_average,
    )


def make_optimizer(
    learning_rate: LearningRate,
    optimizer: Optimizer,
    *,
    gradient_noise_scale: NoiseScale = None,
    gradient_multipliers: Multipliers | None = None,
    clip_gradients: Clip = None,
    learning_rate_decay_fn: DecayFn | None = None,
    learning_rate_multipliers: Multipliers | None = None,
    variables: Variables = None,
    skip_nonfinite: bool = False,
    seed: int | jax.Array = 0,
    pack_small_leaves: int = 0,
    axis_name: AxisName = None,
    skip_spikes: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Make the whole chain of :func:`optimize_loss` as one optax transformation.

    It is what goes into a Flax ``TrainState``, an ``nnx.Optimizer`` or a loop of your
    own: noise, multipliers, clip, optimizer at the decayed rate, rate multipliers.

    Args:
        learning_rate: A number, a 0-d array, a schedule, or ``None`` with an optimizer
            that brings its own; or a mapping from names or patterns to such.
        optimizer: A name, a function of the learning rate, a class, an instance, or a
            function without arguments, or a mapping from names or patterns to such;
            see :func:`optimize_loss`.
        gradient_noise_scale: Standard deviation of Gaussian noise, a function of the
            step, or a transformation.
        gradient_multipliers: Maps names or patterns to factors of the gradient. Adam,
            Adagrad and RMSProp nearly undo them.
        clip_gradients: Largest global norm, a transformation such as
            :func:`adaptive_clipping`, or a function of ``(gradient, variable)`` pairs.
        learning_rate_decay_fn: ``fn(learning_rate, step) -> rate``.
        learning_rate_multipliers: Maps names or patterns to factors of the update.
        variables: Which parameters are trained: names or patterns, a predicate
            ``(name, leaf) -> bool`` or a tree of bools. The updates of the others are
            negative zeros, which leave them bit for bit.
        skip_nonfinite: Whether an update whose gradient holds NaN or infinity is
            skipped. The loss is judged, too, if ``value=loss`` is passed to ``update``.
        seed: Where the noise starts: an int or a JAX key.
        pack_small_leaves: Largest size of a leaf that is packed with its like while an
            elementwise optimizer works on it; 0 packs none.
        axis_name: Under ``shard_map`` or ``pmap``, the mesh axes that leaves may be
            sharded over.
        skip_spikes: Whether an update is skipped whose gradient, or loss, lies far
            above those before it: the ``std_factor`` of
            :func:`~optloss.skip_spikes`, or ``True`` for its default.

    Returns:
        A transform. Its ``update`` takes the extra arguments ``step=`` (the global
        step, which annealing, warm-up and decay read; without it each counts for
        itself), ``value=`` (the loss), and for line searches ``grad=`` and
        ``value_fn=``, the loss as a function of the parameters. Updates keep shape
        ``[*shape]``; they may be float32 for half-precision leaves until they are
        applied.

    Raises:
        ValueError: As :func:`optimize_loss` for the same arguments.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = make_optimizer(0.1, "SGD", clip_gradients=1.0)
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> print(optax.apply_updates(params, updates)["w"])
        [2.94 3.92]

    See also:
        :func:`optimize_loss`, :func:`set_learning_rate`, :func:`get_summaries`.
    """
    return Chain.of("make_optimizer", locals()).transform()

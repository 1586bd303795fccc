"""The flags of a model, and nnx objects as arguments, beside Flax's own loop."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optloss
from optloss.integrations.nnx import optimize_loss

X = jax.random.normal(jax.random.key(0), (16, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])
BASE = {"global_step": 0, "learning_rate": 0.05, "optimizer": "sgd"}


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.body = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.body(x)))))[..., 0]


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def linear(seed=0):
    return nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(seed))


def flax_loop(model, loss):
    """Return a step of Flax's own, with the arguments of an op."""
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, *args):
        value, grads = nnx.value_and_grad(loss)(model, *args)
        optimizer.update(model, grads)
        return value

    return functools.partial(step, model, optimizer)


def assert_same(found, expected):
    """Assert that two nnx objects hold the same values bit for bit."""
    for one, other in zip(
        *(jax.tree.leaves(nnx.state(node)) for node in (found, expected)), strict=True
    ):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# The flags


@pytest.mark.parametrize("first", ["train", "eval"])
def test_the_op_follows_the_flags_of_its_model_as_flax_s_loop_does(first):
    ours, own = Net(), Net()
    for model in (ours, own):
        getattr(model, first)()
    op, step = optimize_loss(ours, loss, **BASE), flax_loop(own, loss)
    for mode in (None, "eval", "train", "train", "eval", "eval", "train"):
        for model in (ours, own):
            if mode:
                getattr(model, mode)()
        assert_close(op(X, Y).loss, step(X, Y))
        assert ours.dropout.rngs.count[...] == own.dropout.rngs.count[...]
        assert_close(ours.norm.mean[...], own.norm.mean[...])
    assert ours.dropout.rngs.count[...] == (4 if first == "train" else 3)


def test_a_flag_of_one_layer_alone_counts():
    model = Net()
    op = optimize_loss(model, loss, **BASE)
    op(X, Y)
    model.dropout.deterministic = True
    op(X, Y)
    model.dropout.rate = 0.25
    model.dropout.deterministic = False
    op(X, Y)
    assert model.dropout.rngs.count[...] == 2


def test_two_modes_are_two_compilations():
    traces = []

    def counted(model, x, y):
        traces.append(model.dropout.deterministic)
        return loss(model, x, y)

    model = Net()
    op = optimize_loss(model, counted, **BASE)
    for _ in range(50):
        model.train()
        op(X, Y)
        model.eval()
        op(X, Y)
    assert traces == [False, True]


def test_a_model_is_not_taken_apart_for_a_mode_that_was_seen(monkeypatch):
    """It takes longer than many a step."""
    model, rngs = Net(), nnx.Rngs(0)
    op = optimize_loss(
        model, lambda model, x, y, rngs: loss(model, x, y) * rngs.uniform(), **BASE
    )
    modes = [model.eval, model.train]
    for change in modes:
        change()
        op(X, Y, rngs)
    monkeypatch.setattr(nnx, "flatten", None)
    for change in modes:
        change()
        op(X, Y, rngs)
    assert rngs.default.count[...] == 4


def test_a_flag_inside_a_list_or_dict_counts():
    """A model that holds a container which cannot be watched is read at each call."""

    class Listed(nnx.Module):
        def __init__(self):
            self.parts = nnx.data({"drop": nnx.Dropout(0.5, rngs=nnx.Rngs(0))})
            self.head = linear()

        def __call__(self, x):
            return self.head(self.parts["drop"](x))[..., 0]

    model = Listed()
    op = optimize_loss(model, loss, **BASE)
    op(X, Y)
    other = nnx.Dropout(0.5, deterministic=True)
    other.rngs = model.parts["drop"].rngs
    model.parts["drop"] = other
    op(X, Y)
    assert other.rngs.count[...] == 1


def test_a_flag_that_the_loss_sets_holds_inside_it():
    model = Net()
    model.eval()

    def training_loss(model, x, y):
        model.train()
        return loss(model, x, y)

    op = optimize_loss(model, training_loss, **BASE)
    op(X, Y)
    op(X, Y)
    assert model.dropout.rngs.count[...] == 2
    assert model.dropout.deterministic


def test_the_pure_update_sees_the_flags_when_it_is_traced():
    model = Net()
    op = optimize_loss(model, loss, **BASE, donate=False)
    model.eval()
    state, output = jax.jit(op.train_op.update)(op.state, X, Y)
    assert output.aux is None
    assert state.model_state["dropout"]["rngs"]["count"] == 0
    assert op(X, Y).loss == output.loss


# nnx objects as arguments


def test_rngs_and_metrics_equal_flax_s_loop_bit_for_bit():
    runs = []
    for make in (lambda m, f: optimize_loss(m, f, **BASE), flax_loop):
        model, rngs = linear(), nnx.Rngs(noise=3)
        metrics = {"train": nnx.MultiMetric(loss=nnx.metrics.Average())}

        def step_loss(model, batch, rngs, metrics):
            x, y = batch
            x = x + 0.1 * rngs.noise.normal(x.shape)
            value = jnp.mean((model(x)[..., 0] - y) ** 2)
            metrics["train"].update(values=value)
            return value

        step = make(model, step_loss)
        losses = [step((X, Y), rngs, metrics) for _ in range(4)]
        losses = [getattr(one, "loss", one) for one in losses]
        runs.append((model, rngs, metrics["train"], losses))
    (ours, *objects, losses), (own, *others, expected) = runs
    np.testing.assert_array_equal(losses, expected)
    for found, wanted in zip([ours, *objects], [own, *others], strict=True):
        assert_same(found, wanted)
    assert objects[0].noise.count[...] == 4
    np.testing.assert_allclose(objects[1].compute()["loss"], np.mean(losses), 1e-6)


def test_objects_at_each_call_are_one_compilation():
    traces = []

    def counted(model, x, rngs):
        traces.append(1)
        return jnp.mean(model(x * rngs.uniform(x.shape)) ** 2)

    op = optimize_loss(linear(), counted, **BASE)
    for seed in range(4):
        op(X, nnx.Rngs(seed))
    assert len(traces) == 1


def test_an_object_may_be_given_twice_and_be_the_model_s_own():
    """Which Flax's own loop refuses as inconsistent aliasing."""
    model = Net()

    def shared(model, x, y, rngs, *, again):
        assert rngs is again["rngs"]
        assert rngs is model.dropout.rngs
        rngs.uniform()
        return loss(model, x, y)

    op = optimize_loss(model, shared, **BASE)
    for _ in range(2):
        op(X, Y, model.dropout.rngs, again={"rngs": model.dropout.rngs})
    assert model.dropout.rngs.count[...] == 4


def test_what_a_model_shares_with_an_argument_is_trained():
    actor, critic = Net(0), Net(1)
    critic.body = actor.body
    head = np.array(critic.head.kernel[...])
    op = optimize_loss(
        actor,
        lambda actor, critic, x, y: loss(actor, x, y) + loss(critic, x, y),
        **BASE,
    )
    before = np.array(actor.body.kernel[...])
    op(critic, X, Y)
    assert critic.body.kernel is actor.body.kernel
    assert not np.array_equal(critic.body.kernel[...], before)
    np.testing.assert_array_equal(critic.head.kernel[...], head)
    assert critic.norm.mean[...].any()


def test_a_teacher_stays_the_array_that_it_was():
    teacher, model = Net(1), linear()
    teacher.eval()
    kernel = teacher.head.kernel[...]

    def distil(model, x, teacher):
        return jnp.mean((model(x)[..., 0] - teacher(x)) ** 2)

    op = optimize_loss(model, distil, **BASE)
    losses = [op(X, teacher=teacher).loss for _ in range(3)]
    assert losses[0] > losses[2]
    assert teacher.head.kernel.get_raw_value() is kernel
    teacher.train()
    op(X, teacher=teacher)
    assert teacher.norm.mean[...].any()


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_target_network_is_a_clone(made):
    def td_loss(model, x, y, target):
        return jnp.mean((model(x)[..., 0] - y - 0.9 * target(x)[..., 0]) ** 2)

    runs = []
    for ours in (True, False):
        model = linear()
        target = nnx.clone(model) if made == "before" else None
        step = optimize_loss(model, td_loss, **BASE) if ours else None
        step = step or flax_loop(model, td_loss)
        # Its arrays are the model's own, which the next step takes.
        target = target or nnx.clone(model)
        losses = []
        for i in range(6):
            output = step(X, Y, target)
            losses.append(output.loss if ours else output)
            if i % 2:
                nnx.update(target, nnx.state(model))
        runs.append((losses, target))
    assert_close(runs[0][0], runs[1][0])
    assert_close(runs[0][1].kernel[...], runs[1][1].kernel[...])


def test_two_models_train_against_each_other():
    class Generator(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(1, use_scale=False, rngs=nnx.Rngs(0))
            self.shift = nnx.Param(jnp.zeros(()))

        def __call__(self, noise):
            return self.norm(noise) + self.shift[...]

    class Critic(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.hidden = nnx.Linear(1, 8, rngs=rngs)
            self.out = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x)))

    def critic_loss(critic, generator, real, noise):
        fake = generator(noise)
        return jnp.mean(nnx.softplus(-critic(real)) + nnx.softplus(critic(fake)))

    def generator_loss(generator, critic, noise):
        return jnp.mean(nnx.softplus(-critic(generator(noise))))

    runs = []
    for ours in (True, False):
        generator, critic = Generator(), Critic()
        make = (lambda m, f: optimize_loss(m, f, **BASE)) if ours else flax_loop
        train_critic = make(critic, critic_loss)
        train_generator = make(generator, generator_loss)
        losses = []
        for i in range(4):
            noise = jax.random.normal(jax.random.key(i), (16, 1))
            losses += [
                train_critic(generator, 3.0 + noise[::-1], noise),
                train_generator(critic, noise),
            ]
        losses = [getattr(one, "loss", one) for one in losses]
        runs.append((losses, generator, critic))
    (losses, generator, critic), (expected, *own) = runs
    assert_close(losses, expected)
    for found, wanted in zip((generator, critic), own, strict=True):
        jax.tree.map(
            assert_close, *(nnx.to_pure_dict(nnx.state(m)) for m in (found, wanted))
        )


def test_slices_hand_an_object_on():
    model, rngs, metric = linear(), nnx.Rngs(0), nnx.metrics.Average()

    def counted(model, x, y, rngs, metric):
        rngs.uniform()
        value = jnp.mean((model(x)[..., 0] - y) ** 2)
        metric.update(values=value)
        return value

    ways = optloss.accumulate_gradients(4)
    op = optimize_loss(model, counted, **BASE, value_and_grad=ways)
    output = op(X, Y, rngs, metric)
    assert rngs.default.count[...] == 4
    assert metric.count[...] == 4
    np.testing.assert_allclose(metric.compute(), output.loss, rtol=1e-6)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"value_and_grad": optloss.clip_per_example(1.0)}, 3),
        ({"value_and_grad": optloss.accumulate_gradients(2, in_axes=(0, 0, None))}, 6),
        ({"optimizer": lambda: optax.lbfgs(), "learning_rate": None}, 3),
        ({"optimizer": {"bias": "sgd", "**": "adam"}, "clip_gradients": 1.0}, 3),
        ({"loss_scale": optloss.dynamic_loss_scale()}, 3),
        ({"skip_spikes": True, "pack_small_leaves": 9, "moving_average": 0.9}, 3),
        ({"donate": False, "gradient_noise_scale": 0.1}, 3),
    ],
)
def test_objects_go_with_every_option(options, count):
    model, rngs = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), nnx.Rngs(0)

    def scaled(model, x, y, rngs):
        return jnp.mean((model(x)[..., 0] - y) ** 2) + 0.0 * rngs.uniform()

    op = optimize_loss(model, scaled, **BASE | options)
    losses = [op(X, Y, rngs).loss for _ in range(3)]
    assert losses[2] < losses[0]
    assert rngs.default.count[...] == count


def test_a_loss_may_be_given_the_step_and_the_parameters():
    def decayed(model, x, y, step, params):
        assert params["kernel"].shape == model.kernel.shape
        return jnp.mean((model(x)[..., 0] - y) ** 2) / (1 + step)

    op = optimize_loss(linear(), decayed, **BASE)
    losses = [op(X, Y, op.state.step, op.state.params).loss for _ in range(3)]
    assert op.state.step == 3
    assert losses[1] < 0.5 * losses[0]


def test_a_skipped_step_leaves_the_objects():
    rngs = nnx.Rngs(0)

    def scaled(model, x, rngs):
        return jnp.mean(model(x) ** 2) * rngs.uniform()

    op = optimize_loss(linear(), scaled, **BASE, skip_nonfinite=True)
    op(X * jnp.nan, rngs)
    assert rngs.default.count[...] == 0
    op(X, rngs)
    assert rngs.default.count[...] == 1


def test_update_ops_see_the_model_s_variables_alone():
    seen = []

    def look(model_state, context):
        seen.append(sorted(model_state))
        return model_state

    op = optimize_loss(
        Net(),
        lambda model, x, y, rngs: loss(model, x, y) * rngs.uniform(),
        **BASE,
        update_ops=[look],
    )
    op(X, Y, nnx.Rngs(0))
    assert seen == [["dropout", "norm"]]


def test_variables_and_states_of_variables_are_arguments_too():
    counter = nnx.Variable(jnp.zeros((), jnp.int32))
    other = nnx.state(linear(1))

    def counting(model, x, counter, other):
        counter[...] += 1
        return jnp.mean((x @ (model.kernel[...] - other["kernel"][...])) ** 2)

    op = optimize_loss(linear(), counting, **BASE)
    losses = [op(X, counter, other).loss for _ in range(2)]
    assert counter[...] == 2
    assert losses[0] > losses[1]


# What a variable holds


class Trees(nnx.Module):
    def __init__(self):
        self.params = nnx.Param({"w": jnp.ones(3), "b": jnp.zeros(())})
        self.seen = nnx.BatchStat({"sum": jnp.zeros(3), "n": jnp.zeros((), jnp.int32)})
        self.table = jnp.zeros(2)  # held bare

    def __call__(self, x):
        p, s = self.params.get_value(), self.seen.get_value()
        self.seen.set_value({"sum": s["sum"] + x.sum(0), "n": s["n"] + 1})
        self.table = self.table + 1.0
        return x @ p["w"] + p["b"]


def test_a_variable_may_hold_a_tree_and_a_module_an_array():
    model = Trees()
    op = optimize_loss(model, loss, **BASE, variables="params/*")
    losses = [op(X, Y).loss for _ in range(3)]
    assert losses[0] > losses[2]
    assert sorted(op.state.params["params"]) == ["b", "w"]
    assert model.seen.get_value()["n"] == 3
    assert model.table.tolist() == [3.0, 3.0]
    model.params.set_value({"w": jnp.full(3, 2.0), "b": jnp.zeros(())})
    assert op.state.params["params"]["w"].tolist() == [2.0, 2.0, 2.0]
    op.restore(op.state)
    own = Trees()
    own.params.set_value({"w": jnp.full(3, 2.0), "b": jnp.zeros(())})
    assert_close(op(X, Y).loss, loss(own, X, Y))


# What cannot be carried


RNGS, METRIC, OTHER = nnx.Rngs(0), nnx.metrics.Average(), Net(1)
OUTSIDE = (
    "optimize_loss: the loss changes an nnx object that was made outside it: Cannot "
    "mutate {} from a different trace level. Make it an argument, whose changes are "
    "kept: write loss(model, batch, rngs), and call op(batch, rngs)."
)


def with_outer_rngs(model, x, y):
    return loss(model, x * RNGS.uniform(), y)


def with_outer_metric(model, x, y):
    value = loss(model, x, y)
    METRIC.update(values=value)
    return value


def with_outer_model(model, x, y):
    return loss(model, x, OTHER(x))


@pytest.mark.parametrize(
    ("outer_loss", "kind"),
    [
        (with_outer_rngs, "RngCount"),
        (with_outer_metric, "MetricState"),
        (with_outer_model, "BatchStat"),
    ],
)
def test_what_the_loss_changes_outside_of_it_is_refused(outer_loss, kind):
    op = optimize_loss(linear(), outer_loss, **BASE)
    assert_refused(lambda: op(X, Y), OUTSIDE.format(kind))


def assert_refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        call()
    assert str(caught.value) == message


def test_another_set_of_variables_is_refused():
    cure = (
        "Make another op. To keep what fits of the optimizer's state: opt_state, *_ = "
        "optloss.carry_over(op.state.opt_state, other.state.opt_state); other.restore("
        "other.state._replace(step=op.state.step, opt_state=opt_state))."
    )
    begins = "op: the model has other variables than when the op was made"
    model = Net()
    op = optimize_loss(model, loss, **BASE)
    op(X, Y)
    head = model.head
    model.head = nnx.Linear(8, 1, rngs=nnx.Rngs(1))
    message = f"{begins}; new are 'head/bias', 'head/kernel'. {cure}"
    assert_refused(lambda: op(X, Y), message)
    model.head = head
    op(X, Y)
    model.body.bias, model.body.use_bias = None, False
    assert_refused(lambda: op(X, Y), f"{begins}. {cure}")
    model.norm = nnx.BatchNorm(8, use_scale=False, rngs=nnx.Rngs(0))
    other = optimize_loss(model, loss, **BASE)
    opt_state, *_ = optloss.carry_over(op.state.opt_state, other.state.opt_state)
    other.restore(other.state._replace(step=op.state.step, opt_state=opt_state))
    other(X, Y)
    assert other.state.step == 3


def test_a_variable_that_the_loss_adds_is_refused():
    def adding(model, x):
        model.seen = nnx.BatchStat(x)
        return jnp.mean(model(x) ** 2)

    message = (
        "optimize_loss: the loss adds variables, 'seen'. At its end the model has "
        "those that it had before: make a new one before the op is made, and take away "
        "what was sown: nnx.pop(model, nnx.Intermediate)."
    )
    op = optimize_loss(linear(), adding, **BASE)
    assert_refused(lambda: op(X), message)


def test_a_tree_of_another_structure_is_refused():
    model = Trees()
    op = optimize_loss(model, loss, **BASE)
    model.params.set_value({"w": jnp.ones(3)})
    message = (
        "op: a variable of the model holds a tree of another structure than when the "
        "op was made. Write a tree of the same one, or make another op."
    )
    assert_refused(lambda: op(X, Y), message)


def test_a_call_inside_a_traced_function_is_refused_and_leaves_the_op():
    op = optimize_loss(linear(), loss, **BASE)
    message = (
        "op: it was called inside a function that JAX traces, where it cannot write to "
        "its model. Call it outside, or use the pure "
        "op.train_op.update(state, ...) there, and op.restore(state) after it."
    )
    assert_refused(lambda: jax.jit(lambda x: op(x, Y).loss)(X), message)
    assert jnp.isfinite(op(X, Y).loss)


def test_the_pure_update_takes_no_objects():
    op = optimize_loss(linear(), lambda model, x, rngs: jnp.mean(model(x)), **BASE)
    message = (
        "op.train_op: takes no nnx objects, whose changes it cannot keep. Call the op."
    )
    assert_refused(lambda: op.train_op.update(op.state, X, nnx.Rngs(0)), message)


def test_an_array_in_a_tuple_is_refused():
    model = linear()
    model.tables = nnx.data((jnp.ones(2),))
    message = (
        "optimize_loss: the array 'tables/0' lies in a tuple, where no step can "
        "replace it. Make it an nnx.Variable."
    )
    assert_refused(lambda: optimize_loss(model, loss, **BASE), message)


@pytest.mark.parametrize(
    ("argument", "value", "problem"),
    [
        ("model", 3, "must be an nnx.Module."),
        ("wrt", 3, "must be an nnx filter, such as nnx.Param: Invalid "),
    ],
)
def test_what_is_no_model_and_no_filter_is_refused(argument, value, problem):
    given = {"model": linear(), "loss": loss, **BASE, argument: value}
    begin = re.escape(f"optimize_loss({argument}=3): {problem}")
    with pytest.raises(ValueError, match=f"^{begin}"):
        optimize_loss(**given)


def test_the_signature_is_that_of_optimize_loss():
    """With the model before it and ``wrt`` behind; so that neither drifts away."""
    ours = dict(inspect.signature(optimize_loss).parameters)
    pure = dict(inspect.signature(optloss.optimize_loss).parameters)
    assert next(iter(ours)) == "model"
    assert [*ours][-1] == "wrt"
    del ours["model"], ours["wrt"]
    assert ours.pop("loss").kind is pure.pop("loss").kind
    assert [*ours.values()] == [*pure.values()]

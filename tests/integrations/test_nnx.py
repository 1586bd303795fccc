import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optloss
from optloss.integrations.nnx import optimize_loss


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(3, 8, use_bias=False, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.layers[0](x)))
        return self.head(self.dropout(x))[..., 0]


X = jax.random.normal(jax.random.key(0), (32, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])
BASE = {"global_step": 0, "learning_rate": 0.05, "optimizer": "adam"}


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def everything(model):
    """Return copies of all the model holds, keys as numbers."""
    leaves = jax.tree.leaves(nnx.state(model))
    return [
        np.array(jax.random.key_data(leaf))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else np.array(leaf)
        for leaf in leaves
    ]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_model_trains_as_by_flax_s_own_loop():
    ours, own = Net(), Net()
    op = optimize_loss(ours, loss, **BASE)
    optimizer = nnx.Optimizer(own, optax.adam(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(loss)(model, x, y)
        optimizer.update(model, grads)
        return value

    for _ in range(5):
        output = op(X, Y)
        value = step(own, optimizer, X, Y)
        np.testing.assert_allclose(output.loss, value, rtol=1e-5)
    assert ours.dropout.rngs.count[...] == own.dropout.rngs.count[...] == 5
    assert not np.array_equal(ours.norm.mean[...], np.zeros(8))
    for found, expected in zip(everything(ours), everything(own), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_it_is_compiled_once():
    traces = []

    def counted(model, x, y):
        traces.append(1)
        return loss(model, x, y), {"shape": jnp.array(x.shape)}

    op = optimize_loss(Net(), counted, **BASE)
    for _ in range(4):
        output = op(X, y=Y)
    assert len(traces) == 1
    assert output.aux["shape"].tolist() == [32, 3]
    assert op.state.step == 4


def test_what_wrt_leaves_is_not_trained():
    model = Net()
    before = np.array(model.layers[0].kernel[...])
    head = np.array(model.head.kernel[...])
    op = optimize_loss(
        model, loss, **BASE, wrt=nnx.All(nnx.Param, nnx.PathContains("head"))
    )
    op(X, Y)
    np.testing.assert_array_equal(model.layers[0].kernel[...], before)
    assert not np.array_equal(model.head.kernel[...], head)
    assert list(op.state.params) == ["head"]


def test_arguments_behind_the_optimizer_keep_their_order_and_names():
    model = Net()
    op = optimize_loss(
        model, loss, 0, 0.1, "SGD", 0.25, {"layers/*/kernel": 0.0}, 0.5, name="run"
    )
    kernel = np.array(model.layers[0].kernel[...])
    output = op(X, Y)
    np.testing.assert_array_equal(model.layers[0].kernel[...], kernel)
    assert optloss.get_summaries(op.state)["noise_std"] == 0.25
    assert optloss.get_summaries(op.state)["global_norm/clipped_gradient_norm"] <= 0.5
    assert set(output.summaries) == {"run/loss", "run/learning_rate"}


def test_a_shared_variable_is_one_parameter():
    class Tied(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.again = self.one

        def __call__(self, x):
            return self.again(self.one(x)).sum(-1)

    model = Tied()
    op = optimize_loss(model, loss, **BASE)
    op(X, Y)
    assert len(jax.tree.leaves(op.state.params)) == 2
    assert model.again.kernel is model.one.kernel


@pytest.mark.wide
def test_a_run_restored_from_disk_goes_on_bit_for_bit(tmp_path):
    def start():
        model = Net()
        return model, optimize_loss(model, loss, **BASE, gradient_noise_scale=0.1)

    whole, op = start()
    for _ in range(3):
        op(X, Y)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", op.state)
        checkpointer.wait_until_finished()
        resumed, other = start()
        other.restore(checkpointer.restore(tmp_path / "state", other.state))
    for _ in range(3):
        op(X, Y)
        other(X, Y)
    assert other.state.step == 6
    assert_same(everything(resumed), everything(whole))


def test_restoring_copies():
    op = optimize_loss(Net(), loss, **BASE)
    op(X, Y)
    kept = jax.tree.map(jnp.copy, op.state)
    first = [(op.restore(kept), op(X, Y).loss)[1] for _ in range(2)]
    assert first[0] == first[1]


def test_what_is_written_to_the_model_counts():
    model = Net()
    op = optimize_loss(model, loss, **BASE)
    op(X, Y)
    pretrained = jnp.full((8, 1), 0.5)
    model.head.kernel.set_value(pretrained)
    np.testing.assert_array_equal(op.state.params["head"]["kernel"], pretrained)
    op(X, Y)
    moved = model.head.kernel[...] - 0.5
    assert 0.01 < jnp.abs(moved).max() < 0.1  # one step of Adam from there
    np.testing.assert_array_equal(pretrained, np.full((8, 1), 0.5))


def test_the_arrays_the_model_came_with_outlive_the_training():
    model = Net()
    kernel = model.head.kernel[...]
    op = optimize_loss(model, loss, **BASE)
    for _ in range(2):
        op(X, Y)
    assert np.isfinite(kernel).all()


def test_evaluation_in_between_changes_nothing():
    losses = []
    for evaluate in (False, True):
        model = Net()
        op = optimize_loss(model, loss, **BASE)
        op(X, Y)
        if evaluate:
            model.eval()
            assert jnp.isfinite(model(X)).all()
            model.train()
        losses.append(op(X, Y).loss)
    assert losses[0] == losses[1]


def test_update_ops_work_on_what_the_model_carries():
    def double(model_state, context):
        del context
        norm = model_state["norm"] | {"mean": model_state["norm"]["mean"] * 2}
        return model_state | {"norm": norm}

    plain, doubled = Net(), Net()
    optimize_loss(plain, loss, **BASE)(X, Y)
    optimize_loss(doubled, loss, **BASE, update_ops=[double])(X, Y)
    np.testing.assert_array_equal(
        doubled.norm.mean[...], np.asarray(plain.norm.mean[...]) * 2
    )


def test_a_changed_rate_is_restored_without_a_new_compilation():
    traces = []

    def counted(model, x, y):
        traces.append(1)
        return loss(model, x, y)

    op = optimize_loss(Net(), counted, **BASE)
    op(X, Y)
    op.restore(optloss.set_learning_rate(op.state, 0.5))
    output = op(X, Y)
    assert output.summaries["OptimizeLoss/learning_rate"] == 0.5
    assert len(traces) == 1


def test_it_says_what_it_is():
    op = optimize_loss(Net(), loss, **BASE, clip_gradients=1.0)
    pipeline = "gradient -> clip_by_global_norm(1.0) -> optax.adam at 0.05 -> step + 1"
    assert repr(op) == f"Net: OptimizeLoss: {pipeline}"
    assert "layers/0/kernel  3x8    float32  trained" in op.describe()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: optimize_loss(Net(), None, **BASE),
            "optimize_loss(loss=None): must be a function loss(model, *args).",
        ),
        (
            lambda: optimize_loss(Net(), lambda *_: (0.0, 1, 2), **BASE)(X, Y),
            "optimize_loss: the loss returned 3 results. With an nnx model it returns "
            "loss or (loss, aux); what it changes in the model is kept.",
        ),
        (
            lambda: optimize_loss(
                Net(), loss, **BASE, gradient_multipliers={"heat/*": 2.0}
            ),
            "optimize_loss, gradient_multipliers: the pattern 'heat/*' matches no "
            "parameter. Nearest: 'head/bias', 'head/kernel'.",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert str(caught.value) == message


def test_the_state_of_another_run_is_refused():
    op = optimize_loss(Net(), loss, **BASE)
    message = r"^op\.restore\(state=1\): must be a TrainOpState of this run\. "
    with pytest.raises(
        ValueError, match=message + r"Restore a checkpoint into op\.state"
    ):
        op.restore(1)


def test_the_chain_works_in_flax_s_optimizer():
    model = Net()
    tx = optloss.make_optimizer(
        0.05,
        "adam",
        gradient_multipliers={"layers/*/kernel": 0.0},
        clip_gradients=0.5,
        skip_nonfinite=True,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    kernel = np.array(model.layers[0].kernel[...])

    @nnx.jit
    def step(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(loss)(model, x, y)
        optimizer.update(model, grads, value=value)
        return optloss.get_summaries(optimizer)

    inside = step(model, optimizer, X, Y)
    outside = optloss.get_summaries(optimizer)
    assert {tag: float(value) for tag, value in inside.items()} == outside
    np.testing.assert_allclose(
        outside["global_norm/clipped_gradient_norm"], 0.5, rtol=1e-6
    )
    np.testing.assert_array_equal(model.layers[0].kernel[...], kernel)
    step(model, optimizer, X, Y * jnp.nan)
    assert optloss.get_summaries(optimizer)["skipped/total"] == 1


def test_a_model_with_more_than_parameters_is_none_for_the_plain_call():
    """Its statistics and random streams would stay as they are, in silence."""
    plain = optloss.optimize_loss(loss, **BASE)
    words = (
        "the parameters hold variables that a step changes, 'BatchStat', 'RngCount', "
        "'RngKey'. Use optloss.integrations.nnx.optimize_loss(model, loss, ...)"
    )
    for params in (Net(), nnx.state(Net())):
        with pytest.raises(ValueError, match=re.escape(words)):
            plain.init(params)
    linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    for params in (linear, nnx.state(linear), nnx.state(Net(), nnx.Param)):
        assert plain.init(params).step == 0


def test_a_state_that_is_gone_or_another_op_s_is_said_to_be():
    op = optimize_loss(Net(), loss, **BASE)
    held = op.state
    op(X, Y)
    with pytest.raises(ValueError, match=r"^op.restore\(state\): this state was given"):
        op.restore(held)
    other = optimize_loss(Net(), loss, **BASE, clip_gradients=1.0)
    with pytest.raises(ValueError, match=r"another op\. Its opt_state") as said:
        op.restore(other.state)
    assert len(str(said.value)) < 400
    assert "op.train_op.adopt(state)" in str(said.value)


@pytest.mark.parametrize("rate", [0.1, {"kernel": 0.1, "**": 0.1}])
def test_the_rate_of_an_nnx_optimizer_is_set_in_its_state(rate):
    model, traces = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), []
    tx = optloss.make_optimizer(rate, "sgd")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        traces.append(None)
        optimizer.update(model, nnx.grad(loss)(model, X, Y[:, None]))

    step(model, optimizer)
    before = everything(model)
    optimizer.opt_state = optloss.set_learning_rate(optimizer.opt_state, 0.0)
    step(model, optimizer)
    assert_same(everything(model), before)
    optimizer.opt_state = optloss.set_learning_rate(optimizer.opt_state, 0.1)
    step(model, optimizer)
    assert any(map(np.any, np.subtract(everything(model)[0], before[0])))
    assert len(traces) == 1


def test_a_loss_that_takes_other_arguments_is_told_of():
    op = optimize_loss(Net(), loss, **BASE)
    words = "the loss loss(model, x, y) cannot be called with (model) and 1 positional"
    with pytest.raises(ValueError, match=re.escape(words)):
        op(X)
    words = "cannot be called with (model, z=...) and 2 positional arguments more."
    with pytest.raises(ValueError, match=re.escape(words)):
        op(X, Y, z=1.0)

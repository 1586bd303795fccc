import functools
import importlib
import os
import re
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import optloss
from optloss.histograms import Histogram, histogram
from optloss.integrations import tensorboard
from optloss.integrations.tensorboard import SummaryWriter

NOT_A_STEP = (
    "must be a Python int of 64 bits. Count the steps in Python: reading one from the "
    "device would wait for it."
)
NOT_A_VALUE = (
    "must be a real scalar or a Histogram under a str, or those of several steps "
    "stacked by jax.lax.scan."
)
VALUES = np.random.default_rng(0).normal(0.0, 0.1, (4, 500)).astype(np.float32)


def read(logdir):
    everything = {"scalars": 0, "histograms": 0}
    events = EventAccumulator(os.fspath(logdir), size_guidance=everything)
    events.Reload()
    return events


def scalars(logdir, tag):
    return [(event.step, event.value) for event in read(logdir).Scalars(tag)]


def buckets(limits, counts):
    return {
        limit: count for limit, count in zip(limits, counts, strict=True) if count > 0
    }


def numpy_buckets(values):
    """From limit to count, by NumPy's own histogram."""
    positive = [1e-12]
    while positive[-1] * 1.1 < 1e20:
        positive.append(positive[-1] * 1.1)
    positive.append(np.finfo(np.float32).max)
    edges = np.array([-v for v in reversed(positive)] + [0.0] + positive, np.float32)
    counts, _ = np.histogram(values, edges)
    return buckets(edges[1:].tolist(), counts.tolist())


def refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert str(caught.value) == message


def test_scalars_come_back(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for step in range(3):
            summaries = {"a/loss": jnp.float32(step / 4), "b [ms]:0": jnp.int32(step)}
            writer.write(step, summaries)
    assert scalars(tmp_path, "a/loss") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert scalars(tmp_path, "b [ms]:0") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def loss_of(params, x):
    return jnp.mean((params["w"] * x - 1.0) ** 2)


@pytest.mark.parametrize("rate", [0.1, {"w": 0.1, "**": 0.2}])
def test_what_a_step_and_its_state_both_tell_is_written_once(rate, tmp_path):
    op = optloss.optimize_loss(
        loss_of, 0, rate, "adam", clip_gradients=1.0,
        summaries=["loss", "learning_rate", "gradient_norm"],
    )  # fmt: skip
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    state, output = op(op.init(params), jnp.ones(3))
    with SummaryWriter(tmp_path) as writer:
        writer.write(0, output.summaries | optloss.get_summaries(state))
        writer.write(1, optloss.get_summaries(state))
    keys = [""] if rate == 0.1 else ["/w", "/**"]
    both = [f"learning_rate{key}" for key in keys]
    both += ["global_norm/gradient_norm", "global_norm/clipped_gradient_norm"]
    alone = ["clip_factor", "clipped_share"]
    in_the_first = {event: len(scalars(tmp_path, event)) for event in both + alone}
    # The second call has no other tag for them.
    assert in_the_first == dict.fromkeys(both, 1) | dict.fromkeys(alone, 2)
    tags = {*output.summaries, *both, *alone}
    assert set(read(tmp_path).Tags()["scalars"]) == tags


@pytest.mark.parametrize(
    "value", [3, 3.0, True, np.float64(3), np.int8(3), np.array(3), jnp.bfloat16(3)]
)
def test_a_scalar_may_be_of_any_real_type(value, tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.write(np.int64(5), {"value": value})
    assert scalars(tmp_path, "value") == [(5, float(value))]


def test_nan_comes_back(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.write(0, {"loss": jnp.float32(jnp.nan)})
    ((_, value),) = scalars(tmp_path, "loss")
    assert np.isnan(value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_histograms_come_back_with_every_count(dtype, tmp_path):
    values = np.append(VALUES[0], [0.0, -1e-20, 1e15, np.nan]).astype(dtype)
    with jax.enable_x64(dtype == np.float64), SummaryWriter(tmp_path) as writer:
        found = jax.device_get(histogram(jnp.asarray(values)))
        writer.write(7, {"gradients/w": histogram(jnp.asarray(values))})
    (event,) = read(tmp_path).Histograms("gradients/w")
    histo = event.histogram_value
    limits, counts = found.bucket_limits.tolist(), found.bucket_counts.tolist()
    assert event.step == 7
    assert buckets(histo.bucket_limit, histo.bucket) == buckets(limits, counts)
    assert (histo.num, sum(histo.bucket)) == (503, 503)
    wide = values[:-1].astype(np.float64)
    assert (histo.min, histo.max) == (wide.min(), wide.max())
    np.testing.assert_allclose(histo.sum, wide.sum(), rtol=1e-6)
    np.testing.assert_allclose(histo.sum_squares, np.square(wide).sum(), rtol=1e-6)


def test_each_bucket_begins_where_it_should(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.write(0, {"h": histogram(jnp.asarray(VALUES))})
    (event,) = read(tmp_path).Histograms("h")
    limits, counts = event.histogram_value.bucket_limit, event.histogram_value.bucket
    lefts = dict(zip(limits[1:], limits[:-1], strict=True))
    all_limits = histogram(jnp.zeros(1)).bucket_limits.tolist()
    before = dict(zip(all_limits[1:], all_limits[:-1], strict=True))
    for limit, count in zip(limits[1:], counts[1:], strict=True):
        assert count == 0 or lefts[limit] == before[limit]
    assert counts[0] == 0
    assert buckets(limits, counts) == numpy_buckets(VALUES)


def test_a_histogram_of_nothing_is_left_out(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.write(0, {"h": histogram(None), "n": histogram(jnp.full(2, jnp.nan))})
        writer.write(1, {"h": histogram(jnp.ones(2)), "loss": 1.0})
    events = read(tmp_path)
    assert [event.step for event in events.Histograms("h")] == [1]
    assert events.Tags()["histograms"] == ["h"]


def stacked():
    """Summaries of four steps, a histogram in every second."""

    def step(count, values):
        looked_at = jax.lax.cond(
            count % 2 == 0, lambda: histogram(values), lambda: histogram(None)
        )
        return count + 1, {"sum": values.sum(), "h": looked_at}

    return jax.lax.scan(step, 0, jnp.asarray(VALUES))[1]


def test_stacked_summaries_are_written_step_by_step(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.write(10, stacked())
    found = scalars(tmp_path, "sum")
    assert [step for step, _ in found] == [10, 11, 12, 13]
    np.testing.assert_allclose([v for _, v in found], VALUES.sum(1), rtol=1e-5)
    events = read(tmp_path).Histograms("h")
    assert [event.step for event in events] == [10, 12]
    for event, values in zip(events, VALUES[::2], strict=True):
        histo = event.histogram_value
        assert buckets(histo.bucket_limit, histo.bucket) == numpy_buckets(values)


def test_stacked_summaries_of_no_step_are_nothing(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.write(0, {"loss": jnp.zeros(0)})
        writer.write(0, {})
    assert read(tmp_path).Tags()["scalars"] == []


@pytest.mark.parametrize("every", [1, 3, 10])
def test_only_multiples_of_every_are_written(every, tmp_path):
    with SummaryWriter(tmp_path / "one", every=every) as writer:
        for step in range(20):
            writer.write(step, {"loss": float(step)})
    with SummaryWriter(tmp_path / "stacked", every=every) as writer:
        writer.write(0, {"loss": jnp.arange(7.0)})
        writer.write(7, {"loss": np.arange(7.0, 20.0)})
    expected = [(step, float(step)) for step in range(0, 20, every)]
    assert scalars(tmp_path / "one", "loss") == expected
    assert scalars(tmp_path / "stacked", "loss") == expected


@pytest.fixture
def fetches(monkeypatch):
    """The threads that fetched something from the device, one entry a fetch."""
    threads = []
    array = type(jnp.zeros(0))
    value = array._value

    def fetch(self):
        threads.append(threading.current_thread())
        return value.fget(self)

    monkeypatch.setattr(array, "_value", property(fetch))
    float(jnp.zeros(()))
    assert threads.pop() is threading.current_thread()
    return threads


def test_nothing_is_fetched_by_the_training_loop(tmp_path, fetches):
    here = threading.current_thread()
    with SummaryWriter(tmp_path, every=10) as writer:
        for step in range(31):
            writer.write(step, {"loss": jnp.float32(step), "h": histogram(jnp.ones(3))})
            if step == 9:
                writer.flush()
                after_one = len(fetches)
        writer.flush()
        once_more = len(fetches)
    assert here not in fetches
    assert after_one == 2  # one of floats, one of counts
    assert once_more == 4 * after_one
    assert len(scalars(tmp_path, "loss")) == 4


def test_a_skipped_step_costs_nothing(tmp_path, fetches, monkeypatch):
    with SummaryWriter(tmp_path, every=10) as writer:
        monkeypatch.setattr(tensorboard, "_join", None)
        for step in range(1, 10):
            writer.write(step, {"loss": jnp.float32(step)})
    assert fetches == []


def test_the_training_loop_does_not_wait(tmp_path):
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 60, lambda _, x: jnp.tanh(x @ x), x)

    x = jnp.full((400, 400), 1e-3)
    with SummaryWriter(tmp_path) as writer:
        writer.write(0, {"loss": jax.block_until_ready(slow(x))[0, 0]})
        writer.flush()
        value = slow(x)[0, 0]
        writer.write(1, {"loss": value})
        assert not value.is_ready()
    assert [step for step, _ in scalars(tmp_path, "loss")] == [0, 1]


def test_the_transfer_guard_does_not_fire(tmp_path):
    with jax.transfer_guard("disallow"), SummaryWriter(tmp_path) as writer:
        writer.write(0, {"loss": jax.device_put(np.float32(2.0))})
    assert scalars(tmp_path, "loss") == [(0, 2.0)]


def test_summaries_outlive_the_state_they_came_from(tmp_path, monkeypatch):
    write, trained = tensorboard._Worker._write, threading.Event()

    def wait_and_write(self, pending):
        assert trained.wait(timeout=30)
        write(self, pending)

    monkeypatch.setattr(tensorboard._Worker, "_write", wait_and_write)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x * 2, state)

    state = {"norm": jnp.float32(1.0), "share": jnp.float32(3.0)}
    lone = {"vector": jnp.ones(3)}
    with SummaryWriter(tmp_path) as writer:
        for i in range(50):
            writer.write(i, state)
            writer.write(i, lone)
            state, lone = step(state), step(lone)
        trained.set()
    assert state["norm"] == 2.0**50
    assert scalars(tmp_path, "norm") == [(i, 2.0**i) for i in range(50)]
    expected = [(i + k, 2.0**i) for i in range(50) for k in range(3)]
    assert scalars(tmp_path, "vector") == expected


def test_numpy_summaries_may_be_overwritten(tmp_path):
    value = np.ones(())
    with SummaryWriter(tmp_path) as writer:
        writer.write(0, {"loss": value})
        value[...] = 2.0
    assert scalars(tmp_path, "loss") == [(0, 1.0)]


# Explicit first: a program compiled for the other kind would be found and do.
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_summaries_may_live_on_a_mesh(kind, tmp_path):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    put = functools.partial(jax.device_put, device=everywhere)
    with SummaryWriter(tmp_path) as writer:
        writer.write(0, {"x": put(1.0), "h": put(histogram(VALUES)), "y": jnp.ones(())})
        spread = jax.device_put(
            jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("a"))
        )
        writer.write(
            0, {"spread": spread, "last": jax.device_put(spread, mesh.devices[7])}
        )
    assert scalars(tmp_path, "x") == scalars(tmp_path, "y") == [(0, 1.0)]
    expected = [(i, float(i)) for i in range(8)]
    assert scalars(tmp_path, "spread") == scalars(tmp_path, "last") == expected


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("a")])
def test_no_program_is_run_on_more_than_one_device(spec):
    # The other processes of a run would not take part in it.
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    value = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, spec))
    (vector,) = tensorboard._pack({"x": value}).vectors
    assert len(vector.devices()) == 1


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with SummaryWriter(tmp_path / "runs") as writer:
        writer.write(0, {"loss": jnp.float32(1.0)})
        writer.flush()
        refused(
            lambda: writer.write(0.5, {}),
            f"SummaryWriter.write(step=0.5): {NOT_A_STEP}",
        )
    assert not (tmp_path / "runs").exists()


def test_flush_puts_everything_on_disk(tmp_path):
    writer = SummaryWriter(tmp_path)
    for step in range(20):
        writer.write(step, {"loss": jnp.float32(step)})
    writer.flush()
    assert len(scalars(tmp_path, "loss")) == 20
    writer.close()
    writer.flush()


def test_close_loses_nothing_and_may_be_called_twice(tmp_path):
    writer = SummaryWriter(tmp_path)
    for step in range(200):
        writer.write(step, {"loss": jnp.float32(step)})
    writer.close()
    writer.close()
    assert scalars(tmp_path, "loss") == [(step, float(step)) for step in range(200)]


def test_two_writers_share_a_folder(tmp_path):
    with SummaryWriter(tmp_path) as one, SummaryWriter(tmp_path) as other:
        one.write(0, {"loss": 1.0})
        other.write(1, {"loss": 2.0})
    assert len(list(tmp_path.iterdir())) == 2
    assert sorted(scalars(tmp_path, "loss")) == [(0, 1.0), (1, 2.0)]


def test_an_error_in_the_loop_does_not_lose_what_came_before(tmp_path):
    def train():
        with SummaryWriter(tmp_path) as writer:
            writer.write(0, {"loss": jnp.float32(1.0)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert scalars(tmp_path, "loss") == [(0, 1.0)]


UNCLOSED = """
import sys, jax.numpy as jnp
import optloss
from optloss.integrations.tensorboard import SummaryWriter
writer = SummaryWriter(sys.argv[1])
for step in range(100):
    writer.write(step, {"loss": jnp.float32(step)})
"""


def test_a_forgotten_close_loses_nothing_when_the_program_ends(tmp_path):
    subprocess.run([sys.executable, "-c", UNCLOSED, tmp_path], check=True, timeout=60)
    assert len(scalars(tmp_path, "loss")) == 100


def test_a_disk_that_fails_is_told_at_the_next_call(tmp_path, monkeypatch):
    def fail(self, event):
        raise OSError(28, "No space left on device")

    writer = SummaryWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tensorboard.EventsWriter, "write_event", fail)
        writer.write(0, {"loss": 1.0})
        with pytest.raises(OSError, match=r"^\[Errno 28\] No space left"):
            writer.flush()
    writer.write(1, {"loss": 2.0})
    writer.close()
    assert scalars(tmp_path, "loss") == [(1, 2.0)]


def test_a_loop_far_ahead_of_the_disk_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "MOST_PENDING", 2)
    ahead = []
    writer = SummaryWriter(tmp_path)
    original = tensorboard.EventsWriter.write_event

    def slow(self, event):
        time.sleep(0.01)
        ahead.append(writer._worker._queue.qsize())
        original(self, event)

    monkeypatch.setattr(tensorboard.EventsWriter, "write_event", slow)
    for step in range(10):
        writer.write(step, {"loss": float(step)})
    writer.close()
    assert max(ahead) <= 3
    assert len(scalars(tmp_path, "loss")) == 10


@pytest.mark.parametrize(
    ("every", "shown"),
    [(0, "0"), (-1, "-1"), (1.0, "1.0"), (True, "True"), (None, "None")],
)
def test_every_must_be_a_positive_int(every, shown, tmp_path):
    message = f"SummaryWriter(every={shown}): must be an int >= 1."
    refused(lambda: SummaryWriter(tmp_path, every=every), message)


def test_logdir_must_be_a_path():
    refused(lambda: SummaryWriter(3), "SummaryWriter(logdir=3): must be a path.")


def test_write_after_close_is_refused(tmp_path):
    writer = SummaryWriter(tmp_path)
    writer.close()
    refused(
        lambda: writer.write(0, {"loss": 1.0}),
        "SummaryWriter.write: the writer is closed. Make another SummaryWriter.",
    )


REFUSED = {
    "a float step": (
        (1.5, {}),
        f"SummaryWriter.write(step=1.5): {NOT_A_STEP}",
    ),
    "a bool step": (
        (True, {}),
        f"SummaryWriter.write(step=True): {NOT_A_STEP}",
    ),
    "a step on the device": (
        (jnp.int32(3), {}),
        f"SummaryWriter.write(step=int32[]): {NOT_A_STEP}",
    ),
    "a step beyond 64 bits": (
        (2**63, {}),
        f"SummaryWriter.write(step=9223372036854775808): {NOT_A_STEP}",
    ),
    "a number beyond float64": (
        (0, {"a": 10**400}),
        f"SummaryWriter.write(summaries['a']=1{'0' * 56}...): {NOT_A_VALUE}",
    ),
    "a tag that is no UTF-8": (
        (0, {"\udcff": 1.0}),
        f"SummaryWriter.write(summaries['\\udcff']=1.0): {NOT_A_VALUE}",
    ),
    "a histogram of lists": (
        (0, {"a": Histogram(0.0, 1.0, 2, 1.0, 1.0, 0, [0.0, 1.0], [1, 1])}),
        f"SummaryWriter.write(summaries['a']=Histogram(float32[])): {NOT_A_VALUE}",
    ),
    "no dict": (
        (0, [1.0]),
        "SummaryWriter.write(summaries=[1.0]): must be a dict from tag to value, such "
        "as output.summaries.",
    ),
    "a str": (
        (0, {"a": "b"}),
        f"SummaryWriter.write(summaries['a']='b'): {NOT_A_VALUE}",
    ),
    "None": (
        (0, {"a": None}),
        f"SummaryWriter.write(summaries['a']=None): {NOT_A_VALUE}",
    ),
    "a matrix": (
        (0, {"a": jnp.ones((2, 3))}),
        f"SummaryWriter.write(summaries['a']=float32[2,3]): {NOT_A_VALUE}",
    ),
    "a complex number": (
        (0, {"a": 1j}),
        f"SummaryWriter.write(summaries['a']=1j): {NOT_A_VALUE}",
    ),
    "a key": (
        (0, {"a": jax.random.key(0)}),
        f"SummaryWriter.write(summaries['a']=key<fry>[]): {NOT_A_VALUE}",
    ),
    "a tag that is no str": (
        (0, {3: 1.0}),
        f"SummaryWriter.write(summaries[3]=1.0): {NOT_A_VALUE}",
    ),
    "different numbers of steps": (
        (0, {"a": jnp.ones(2), "b": 1.0}),
        "SummaryWriter.write: the summaries have the shapes () and (2,). All must be "
        "of one step, or stacked of equally many.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused(case, tmp_path):
    arguments, message = REFUSED[case]
    with SummaryWriter(tmp_path) as writer:
        refused(lambda: writer.write(*arguments), message)


@pytest.mark.parametrize("make", [jnp.sum, histogram])
def test_a_traced_value_is_refused(make, tmp_path):
    shown = "float32[]" if make is jnp.sum else "Histogram(float32[])"
    message = (
        f"SummaryWriter.write(summaries['a']={shown}): is traced. Return it from the "
        "jitted function, then write it."
    )
    with SummaryWriter(tmp_path) as writer:
        step = jax.jit(lambda x: writer.write(0, {"a": make(x)}))
        refused(lambda: step(jnp.ones(3)), message)


def test_without_tensorboardx_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    for name in list(sys.modules):
        if name.startswith("tensorboardX."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "optloss.integrations.tensorboard")
    message = (
        "optloss.integrations.tensorboard needs tensorboardX. Install it: "
        "pip install 'optloss[tensorboard]'"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        importlib.import_module("optloss.integrations.tensorboard")


def test_a_donated_value_is_refused(tmp_path):
    gone = jnp.ones(())
    gone.delete()
    with SummaryWriter(tmp_path) as writer:
        refused(
            lambda: writer.write(0, {"a": gone}),
            "SummaryWriter.write(summaries['a']=float32[]): was donated to a later "
            "step, and is deleted. Write it before that step.",
        )


FORKED = """
import os, sys, warnings
import optloss
from optloss.integrations.tensorboard import SummaryWriter
warnings.simplefilter("ignore")
writer = SummaryWriter(sys.argv[1])
writer.write(0, {"a": 1.0})
child = os.fork()
if child == 0:
    refused = 0
    for call in (writer.flush, lambda: writer.write(1, {"a": 1.0})):
        try:
            call()
        except ValueError as error:
            refused += "forked" in str(error)
    writer.close()
    os._exit(refused)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
writer.close()
"""


def test_a_forked_process_neither_hangs_nor_writes(tmp_path):
    subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path)], check=True, timeout=300
    )

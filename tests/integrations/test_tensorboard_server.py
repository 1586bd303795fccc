"""A real TensorBoard server shows what was written: asked by its HTTP data API."""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optloss
from optloss.histograms import Histogram
from optloss.integrations.tensorboard import SummaryWriter
from optloss.summaries import OPTIMIZER_SUMMARIES

STEPS, EVERY = 6, 3
PATIENCE = 60.0  # seconds; it is there in three
SCALARS = {
    "OptimizeLoss/loss",
    "OptimizeLoss/learning_rate",
    "OptimizeLoss/global_norm/gradient_norm",
    "OptimizeLoss/global_norm/clipped_gradient_norm",
    "OptimizeLoss/gradient_norm/w",
    "OptimizeLoss/gradient_norm/b",
    # The rate and the norms, of which the state tells as well, once.
    "clip_factor",
    "clipped_share",
    "global_norm/adaptive_max_gradient_norm",
    "adaptive/mean",
    "adaptive/sq_mean",
    "clip_threshold",
    "noise_std",
    "skipped/total",
    "skipped/consecutive",
}
HISTOGRAMS = {"OptimizeLoss/gradients/w", "OptimizeLoss/gradients/b"}


def until(call):
    """Return the first result of ``call`` that counts as true."""
    end = time.monotonic() + PATIENCE
    while not (found := call()):
        assert time.monotonic() < end, f"nothing within {PATIENCE} s"
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def serving(logdir, said):
    """Run a server, and hand out its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    command += ["--host", "127.0.0.1", "--port", "0", "--load_fast=false"]

    def address():
        assert server.poll() is None, said.read_text()
        return re.search(r"http://127\.0\.0\.1:\d+/", said.read_text())

    with (
        said.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output) as server,
    ):
        try:
            yield until(address).group()
        finally:
            server.kill()


def asking(address):
    """Return the function that gets a route's answer; None where there is none yet."""
    # Loopback is no business of a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(route, **query):
        url = f"{address}data/{route}?{urllib.parse.urlencode(query)}"
        try:
            with opener.open(url, timeout=PATIENCE) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            return None

    return ask


def train(logdir):
    """Write a run with everything on; return what was written, fetched by hand."""
    train_op = optloss.optimize_loss(
        lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2),
        global_step=0,
        learning_rate=0.1,
        optimizer="adam",
        gradient_noise_scale=0.01,
        clip_gradients=optloss.adaptive_clipping(),
        learning_rate_decay_fn=lambda rate, step: rate / (1 + step),
        summaries=OPTIMIZER_SUMMARIES,
        histogram_every=EVERY,
        skip_nonfinite=True,
    )
    state = train_op.init({"w": jnp.ones((5, 30)), "b": jnp.zeros(30)})
    x, written = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32), []
    with SummaryWriter(logdir) as writer:
        for step in range(STEPS):
            state, output = train_op(state, x)
            summaries = output.summaries | optloss.get_summaries(state)
            writer.write(step, summaries)
            written.append(jax.device_get(summaries))
    return written


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Return what was written, and how to ask the server."""
    folder = tmp_path_factory.mktemp("served")
    written = train(folder / "logs" / "run")
    with serving(folder / "logs", folder / "said.txt") as address:
        ask = asking(address)
        # A thread of its own reads the file: the last tag of the last step comes last.
        last = {"run": "run", "tag": list(written[-1])[-1]}
        until(lambda: len(ask("plugin/scalars/scalars", **last) or []) == STEPS)
        yield written, ask


@pytest.mark.wide
def test_it_serves_the_run_and_every_tag(served):
    _, ask = served
    assert ask("runs") == ["run"]
    assert set(ask("plugin/scalars/tags")["run"]) == SCALARS
    assert set(ask("plugin/histograms/tags")["run"]) == HISTOGRAMS
    shown = ask("plugin/timeseries/tags")
    assert set(shown["scalars"]["runTagInfo"]["run"]) == SCALARS
    assert set(shown["histograms"]["runTagInfo"]["run"]) == HISTOGRAMS


@pytest.mark.wide
@pytest.mark.parametrize("tag", sorted(SCALARS))
def test_it_gives_back_every_scalar(tag, served):
    written, ask = served
    series = ask("plugin/scalars/scalars", run="run", tag=tag)
    expected = [[step, float(row[tag])] for step, row in enumerate(written)]
    # JSON has no infinity: TensorBoard spells it.
    assert [[step, float(value)] for _, step, value in series] == expected
    times = [wall_time for wall_time, _, _ in series]
    assert times == sorted(times)
    assert abs(times[-1] - time.time()) < 10 * PATIENCE


@pytest.mark.parametrize("tag", sorted(HISTOGRAMS))
def test_it_gives_back_every_histogram(tag, served):
    written, ask = served
    events = ask("plugin/histograms/histograms", run="run", tag=tag)
    assert [step for _, step, _ in events] == list(range(0, STEPS, EVERY))
    for _, step, buckets in events:
        found: Histogram = written[step][tag]
        filled = [bucket for bucket in buckets if bucket[2]]
        counts = found.bucket_counts[found.bucket_counts > 0]
        limits = found.bucket_limits[found.bucket_counts > 0]
        assert [count for _, _, count in filled] == counts.tolist()
        assert [right for _, right, _ in filled[:-1]] == limits[:-1].tolist()
        # The outermost edges are those of the values.
        assert (buckets[0][0], buckets[-1][1]) == (found.min, found.max)

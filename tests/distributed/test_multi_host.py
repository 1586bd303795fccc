"""The example of several processes, run as two, and continued as one."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from distributed.meshes import distance

import optloss

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_host.py"
LINE = re.compile(
    r"(\S+), process (\d) of 2, 2 of 4 devices: step (\d+), "
    r"loss ([\d.]+) -> ([\d.]+), parameters (\w{16})"
)
PROCESSES, STEPS, MORE = 2, 20, 40


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("multi_host", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(process, port, folder):
    command = [
        *(sys.executable, str(EXAMPLE), str(folder), "--steps", str(STEPS)),
        *("--coordinator", f"127.0.0.1:{port}", "--processes", str(PROCESSES)),
        *("--process", str(process), "--cpu-devices", "2"),
    ]
    home = str(Path(optloss.__file__).parents[1])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": home, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes of two devices printed, and the folder they saved to."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [start(process, port, folder) for process in range(PROCESSES)]
    try:
        results = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], results
    return [LINE.findall(printed) for printed, _ in results], folder


@pytest.mark.wide
def test_two_processes_hold_the_same_bits(two_processes):
    (first, second), _ = two_processes
    assert [line[:3] for line in first] == [
        ("data-parallel", "0", "20"),
        ("fully-sharded", "0", "20"),
    ]
    for one, other in zip(first, second, strict=True):
        layout, _, step, before, after, fingerprint = one
        assert other == (layout, "1", step, before, after, fingerprint)
        assert float(after) < float(before)


@pytest.fixture(scope="module")
def undisturbed(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return example.train("data-parallel", MORE, folder)


@pytest.mark.wide
@pytest.mark.parametrize("layout", ["data-parallel", "fully-sharded"])
def test_one_process_goes_on_where_two_ended(
    layout, two_processes, undisturbed, example, tmp_path
):
    _, folder = two_processes
    shutil.copytree(folder / layout, tmp_path / layout)
    assert jax.device_count() == 8
    state, losses = example.train(layout, MORE, tmp_path / layout)
    expected, all_losses = undisturbed
    assert len(losses) == MORE - STEPS
    assert int(state.step) == MORE
    assert distance(state.params, expected.params) < 1e-5
    np.testing.assert_allclose(losses, all_losses[STEPS:], rtol=1e-5)
    kernel = state.params["second"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (layout == "data-parallel")
    assert len(kernel.sharding.device_set) == 8

"""Eight host devices, and one store of compiled programs for all tests of a run.

Sharded tests run in the same process as the others. Arrays still live on the first
device unless a test says otherwise.

Most of the suite's time is XLA's, and many tests compile a program that another test,
or the other process of ``pytest -n 2``, has compiled already. JAX's own cache on disk
hands it on, for the length of the run. Processes that a test starts do not read it.
"""

import os
import tempfile

import jax
import pytest

# XLA has a thread a core, and a device that waits for the others in a collective keeps
# one. With several steps in flight, eight devices on a few cores wait for ever.
os.environ.setdefault("NPROC", "32")

# What is printed is as wide as the terminal, and here as if there were none.
os.environ["COLUMNS"] = "100"

jax.config.update("jax_num_cpu_devices", 8)

PROGRAMS = pytest.StashKey[str]()


def pytest_configure(config):
    """Make the store, or in a worker of pytest-xdist open that of the whole run."""
    given = getattr(config, "workerinput", {})
    if "programs" in given:
        config.stash[PROGRAMS] = given["programs"]
    else:
        folder = tempfile.TemporaryDirectory(prefix="programs-")
        config.add_cleanup(folder.cleanup)
        config.stash[PROGRAMS] = folder.name
    jax.config.update("jax_compilation_cache_dir", config.stash[PROGRAMS])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["programs"] = node.config.stash[PROGRAMS]

"""Compilers for devices that are not there, and what can be read off their programs.

    python benchmarks/compilers.py optloss/h100/clip/1e7/16     one program's figures

XLA compiles for an H100 and for TPUs on a machine that has neither:

    pip install jax==0.10.2 jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 libtpu

The figures do not depend on the machine, but for the seconds. ``bytes`` is what XLA's
cost analysis says of the optimized program; a body of a loop counts once.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks a cloud who it is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no TPU to share

H100 = Path(__file__).with_name("h100.txtpb")
NEEDED = {"h100": ("jax_cuda12_plugin",), "tpu": ("libtpu",)}
CONTAINERS = {"kCommandBuffer", "kWhile", "kConditional", "kSequential"}

Figures = dict[str, Any]


def missing(target: str) -> list[str]:
    """Return the packages that compiling for ``target`` lacks here."""
    return [name for name in NEEDED[target] if importlib.util.find_spec(name) is None]


def compile_h100(step: Callable, arguments: tuple) -> tuple[Figures, str]:
    """Return what XLA makes of a step for an H100, and the optimized program."""
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology="1x1x1",
        target_config=H100.read_text(),
    )
    with tempfile.TemporaryDirectory() as dump:
        options = {
            "xla_gpu_autotune_level": 0,  # it needs the device
            "xla_dump_to": dump,
            "xla_dump_hlo_as_text": True,
        }
        figures, hlo = compiled(
            step, arguments, description.devices[0], "cuda", options
        )
        # Written only if the passes changed anything.
        final = sorted(Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt"))
        first = sorted(Path(dump).glob("*.thunk_sequence.txt"))
        figures |= launches((final or first)[-1].read_text())
    return figures, hlo


def compiled(
    step: Callable, arguments: tuple, device: Any, platform: str, options: Any = None
) -> tuple[Figures, str]:
    """Compile a step, its state donated, and return what all compilers tell."""
    import jax
    from jax.sharding import SingleDeviceSharding
    from jaxlib import _jax

    place = SingleDeviceSharding(device)
    jitted = jax.jit(step, donate_argnums=0, in_shardings=place, out_shardings=place)
    start = time.perf_counter()
    traced = jitted.trace(*arguments)
    lowered = traced.lower(lowering_platforms=(platform,))
    traced_at = time.perf_counter()
    executable = lowered.compile(compiler_options=options).runtime_executable()
    done = time.perf_counter()
    memory = executable.get_compiled_memory_stats()
    (module,) = executable.hlo_modules()
    cost = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    hlo = module.to_string()
    state = jax.tree.leaves(traced.out_info[0])
    figures = {
        "bytes": round(cost["bytes accessed"]),
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "copied": copied(hlo, state),
        "trace_s": round(traced_at - start, 1),
        "compile_s": round(done - traced_at, 1),
    }
    return figures, hlo


def copied(hlo: str, state: list[Any]) -> int:
    """Return the bytes of the new state's arrays that are not in the old one's place.

    Scalars do not count: where the old one is not read, there is none to reuse.
    """
    header = hlo.split("\n", 1)[0]
    aliases = re.findall(r"\{(\d*)\}: \(\d+, \{[\d, ]*\}, \w+-alias\)", header)
    in_place = {int(index or 0) for index in aliases}
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for i, leaf in enumerate(state)
        if i not in in_place and leaf.shape
    )


def launches(thunks: str) -> Figures:
    """Return what the host starts, by XLA's list of thunks.

    A command buffer is one launch, whatever is in it. A loop or a branch outside of one
    is run by the host, which waits for the device at each test.
    """
    counts = {"launches": 0, "host_waits": 0, "kernels": 0, "copies": 0}
    inside: int | None = None  # how far the command buffer that we are in is indented
    for line in thunks.splitlines():
        found = re.match(r"( *)\d+: (k\w+)", line)
        if found is None:
            continue
        depth, kind = len(found[1]), found[2]
        if inside is not None and depth <= inside:
            inside = None
        counts["launches"] += depth == 0
        counts["host_waits"] += inside is None and kind in ("kWhile", "kConditional")
        counts["kernels"] += kind.endswith("Kernel")
        counts["copies"] += kind not in CONTAINERS and not kind.endswith("Kernel")
        if inside is None and kind == "kCommandBuffer":
            inside = depth
    return counts


COMPILE = {"h100": compile_h100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", help="library/target/case/parameters/leaves[/form]")
    parser.add_argument("--cpus", type=int, default=2, help="devices of the host")
    parser.add_argument("--hlo", type=Path, help="where to write the program")
    args = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.cpus)
    from programs import Program

    program = Program.parse(args.program)
    step, arguments = program.build()
    figures, hlo = COMPILE[program.target](step, arguments)
    if args.hlo is not None:
        args.hlo.write_text(hlo)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

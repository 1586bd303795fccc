"""Compilers for devices that are not there, and what can be read off their programs.

    python benchmarks/compilers.py optloss/h100/clip/1e7/16     one program's figures

XLA compiles for an H100 and for TPUs on a machine that has neither:

    pip install jax==0.10.2 jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 libtpu

The figures do not depend on the machine, but for the seconds, which are a CPU's.
``bytes`` is what XLA's cost analysis says of the optimized program, ``cycles`` what its
model of a TPU does; a loop counts as one turn.
"""

import argparse
import functools
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
NEEDED = {"h100": ("jax_cuda12_plugin",), "tpu": ("libtpu",), "tpu64": ("libtpu",)}
COLLECTIVE = (
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|"
    r"collective-broadcast)(-start)?\("
)
CONTAINERS = {"kCommandBuffer", "kWhile", "kConditional", "kSequential"}

HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")  # of a computation in HLO
PLAIN = ("bitcast", "broadcast", "convert", "copy", "reshape")

Figures = dict[str, Any]
Build = Callable[[list[Any]], tuple[Callable, tuple]]  # of devices: a step, its shapes


def missing(target: str) -> list[str]:
    """Return the packages that compiling for ``target`` lacks here."""
    return [name for name in NEEDED[target] if importlib.util.find_spec(name) is None]


def compile_h100(build: Build) -> tuple[Figures, str]:
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
        figures, hlo = compiled(*build(description.devices), "cuda", options)
        # Written only if the passes changed anything.
        final = sorted(Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt"))
        first = sorted(Path(dump).glob("*.thunk_sequence.txt"))
        figures |= launches((final or first)[-1].read_text())
    return figures, hlo


def compile_tpu(build: Build, topology: str = "v5e:1x1") -> tuple[Figures, str]:
    """Return what XLA makes of a step for a TPU v5e, and the optimized program."""
    from jax.experimental import topologies

    description = topologies.get_topology_desc(topology, platform="tpu")
    figures, hlo = compiled(*build(description.devices), "tpu")
    figures |= {
        "cycles": cycles(hlo),
        "loops": len(re.findall(r" while\(", hlo)),
        "collectives": len(re.findall(COLLECTIVE, hlo)),
    }
    return figures, hlo


def compiled(
    step: Callable, arguments: tuple, platform: str, options: Any = None
) -> tuple[Figures, str]:
    """Compile a step, its state donated, and return what all compilers tell."""
    import jax
    from jaxlib import _jax

    kept = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(kept, None))
    start = time.process_time()
    lowered = jitted.trace(*arguments).lower(lowering_platforms=(platform,))
    traced = time.process_time()
    executable = lowered.compile(compiler_options=options).runtime_executable()
    done = time.process_time()
    memory = executable.get_compiled_memory_stats()
    (module,) = executable.hlo_modules()
    cost = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    hlo = module.to_string()
    figures = {
        "bytes": round(cost["bytes accessed"]),
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "copied": copied(hlo, jax.tree.leaves(arguments[0])),
        "trace_s": round(traced - start, 1),
        "compile_s": round(done - traced, 1),
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


def cycles(hlo: str) -> int:
    """Return the cycles that XLA estimates for the kernels of a TPU's program.

    A loop counts as one turn, a branch as its dearest side.
    """
    own: dict[str, int] = {}
    inner: dict[str, list[list[str]]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if head := HEAD.match(line):
            name = head[2]
            entry = name if head[1] else entry
            own[name], inner[name] = 0, []
        elif found := re.search(r'"estimated_cycles":"(\d+)"', line):
            own[name] += int(found[1])
        if re.search(r" (while|call)\(", line):
            called = re.findall(r"(?:body|condition|to_apply)=%?([\w.-]+)", line)
            inner[name] += [[one] for one in called]
        if " conditional(" in line:
            sides = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
            if several := re.search(r"branch_computations=\{([^}]*)\}", line):
                sides = re.findall(r"[\w.-]+", several[1])
            inner[name].append(sides)

    def total(name: str) -> int:
        return own[name] + sum(max(map(total, sides)) for sides in inner[name])

    return total(entry)


def constants(hlo: str) -> list[float | None]:
    """Return the outputs of a program, None for those that are not known constants."""
    made: dict[str, dict[str, str]] = {}  # of each computation: names, what makes them
    roots: dict[str, str] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if head := HEAD.match(line):
            name = head[2]
            entry = name if head[1] else entry
            made[name] = {}
        elif found := re.match(r" +(ROOT )?%?([\w.-]+) = (.*)", line):
            made[name][found[2]] = found[3]
            if found[1]:
                roots[name] = found[2]

    def value(where: str, what: str, inputs: list[float | None]) -> Any:
        """Return a number, None, or of a tuple a list of them."""
        text = made[where][what]
        operation = re.search(r" ([\w-]+)\(([^()]*)\)", text)
        if operation is None:
            return None
        kind, arguments = operation[1], operation[2]
        if kind == "constant":
            literal = arguments.strip("{} ")
            return float({"true": "1", "false": "0"}.get(literal, literal))
        if kind == "parameter":
            return inputs[int(arguments)] if inputs else None
        operands = re.findall(r"%([\w.-]+)", arguments)
        if kind not in ("tuple", "get-tuple-element", "fusion", *PLAIN):
            return None
        values = [value(where, one, inputs) for one in operands]
        if kind == "tuple":
            return values
        if kind == "fusion":
            called = re.search(r"calls=%?([\w.-]+)", text)[1]
            return value(called, roots[called], values)
        if kind == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", text)[1])
            return None if values[0] is None else values[0][index]
        return values[0]

    return value(entry, roots[entry], [])


COMPILE = {
    "h100": compile_h100,
    "tpu": compile_tpu,
    "tpu64": functools.partial(compile_tpu, topology="v5e:8x8"),
}


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
    figures, hlo = COMPILE[program.target](program.build)
    if args.hlo is not None:
        args.hlo.write_text(hlo)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

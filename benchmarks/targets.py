"""What optloss is on GPUs and TPUs: compiled for an H100 and a TPU v5e, beside optax.

    python benchmarks/targets.py                            every cell: half an hour
    python benchmarks/targets.py h100/clip tpu/noise+clip   those whose names begin so
    python benchmarks/targets.py --list

No device is needed (``compilers.py`` says which packages are), and no figure but the
seconds depends on the machine. Each program is compiled in a process of its own. Cells
are named target/case/parameters/leaves, and for the TPU op or chain: a training op, or
``make_optimizer`` with ``apply_updates``. ``programs.py`` has the steps.

Prints a table, and says of each cell whether it holds its bars, which stand below; the
exit status is 1 if one does not. A run of all cells writes the figures to
``benchmarks/results/`` and the tables of the documentation. A run of some takes optax's
figures from there, if the same versions found them (``--fresh``: compiles these, too).
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from compilers import missing
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "targets.json"
TABLES = HERE.parent / "docs" / "tables" / "targets.md"
PACKAGES = ("jax", "jaxlib", "optax", "jax-cuda12-plugin", "libtpu")

Found = dict[str, dict[str, Any]]  # the figures of each program


@dataclasses.dataclass(frozen=True)
class Bar:
    """A figure is at most ``factor`` times that of a program, and ``plus``."""

    figure: str
    plus: float = 0
    factor: float = 0
    of: str = ""  # a case of optax's; "": plus is all
    decimals: int | None = None  # the ratio is rounded first

    def excess(self, ours: float, theirs: float) -> str:
        """Return by how much ``ours`` is above, or nothing."""
        if self.decimals is not None:
            within = round(ours / theirs, self.decimals) <= self.factor
        else:
            within = ours <= self.factor * theirs + self.plus
        if within:
            return ""
        most = f"{self.factor * theirs + self.plus:,.0f}"
        if self.of:
            most += f" ({self.factor} of optax's {self.of}"
            most += f" and {self.plus:,.0f})" if self.plus else ")"
        return f"{self.figure} {ours:,.0f}, at most {most}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A step of optloss's, its like in optax, and what is asked of it."""

    name: str
    like: str  # the case of optax's program, "": there is none
    bars: tuple[Bar, ...]

    @property
    def ours(self) -> str:
        return f"optloss/{self.name}"

    def optax(self, case: str) -> str:
        """Return the name of optax's program of a case, of this cell's size."""
        target, _, *size = self.name.split("/")
        return "/".join(["optax", target, case, *size[:2]])

    @property
    def programs(self) -> list[str]:
        """Return the names of what has to be compiled."""
        others = [self.like, *(bar.of for bar in self.bars)]
        return [self.ours, *map(self.optax, filter(None, dict.fromkeys(others)))]

    def above(self, found: Found) -> list[str]:
        """Return what is above its bar."""
        excess = [
            bar.excess(
                found[self.ours][bar.figure],
                found[self.optax(bar.of)][bar.figure] if bar.of else 0,
            )
            for bar in self.bars
        ]
        return [text for text in excess if text]


def h100(name: str, of: str, share: float, *more: Bar) -> Cell:
    """Return a cell of the H100; ``share`` is of the bytes of optax's case ``of``."""
    case = name.split("/")[0]
    like = {"adaptive": "clip"}.get(case, case)
    bars = (
        Bar("launches", 2),
        Bar("host_waits", 0),
        Bar("copied", 0),
        Bar("bytes", 0, share, of, decimals=2),
        Bar("temporaries", 1e6, 1, of),
    )
    return Cell(f"h100/{name}", like, bars + more)


def tpu(name: str, share: float) -> Cell:
    """Return a cell of one TPU v5e; ``share`` is of the cycles of optax's like."""
    case = name.split("/")[0]
    bars = (
        Bar("loops", 0),
        Bar("copied", 0),
        Bar("cycles", 0, share, case),
        Bar("temporaries", 2e6, 1.05, case),
    )
    return Cell(f"tpu/{name}", case, bars)


def tpu64(name: str, peak: int, collectives: int) -> Cell:
    """Return a cell of a mesh of 8 x 8 TPUs, with figures of the first version.

    They are those of commit 9ad8acc, and of c0150ba before it for 291 leaves.
    """
    case = name.split("/")[0]
    bars = (
        Bar("loops", 0),
        Bar("copied", 0),
        Bar("peak", peak),
        Bar("collectives", collectives),
    )
    return Cell(f"tpu64/{name}", case, bars)


CELLS = [
    h100("adam/1e7/16", "adam", 1.00),
    h100("clip/1e7/16", "clip", 1.00),
    h100("adaptive/1e7/16", "clip", 1.00),
    h100("clip+guard/1e7/16", "clip", 1.01),
    h100("clip+spikes/1e7/16", "clip", 1.01),
    h100("noise+clip/1e7/16", "noise+clip", 1.12),
    h100("everything/1e7/16", "noise+clip", 1.12),
    h100("clip+gradient_norm/1e7/16", "clip", 1.02),
    h100("clip+guard/1e7/400", "clip", 1.01, Bar("kernels", 1400)),
    *(
        tpu(f"{case}/{size}/{form}", share)
        for case, size, share in (
            ("clip", "1e8/16", 1.01),
            ("noise+clip", "1e8/16", 0.95),
            ("clip+guard", "1e8/16", 0.75),
            ("network", "1e7/10", 0.85),
        )
        for form in ("op", "chain")
    ),
    tpu64("clip+guard/1e9/39/op", 318_355_456, 211),
    tpu64("noise+clip+guard/1e9/39/op", 318_392_320, 258),
    tpu64("clip+guard/7e9/291/op", 1_689_300_992, 1555),
]


def measure(program: str, cpus: int = 2, hlo: Path | None = None) -> dict[str, Any]:
    """Compile a program in a process of its own, and return its figures."""
    command = [sys.executable, str(HERE / "compilers.py"), program, f"--cpus={cpus}"]
    command += [f"--hlo={hlo}"] if hlo is not None else []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program}: no program\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    """Return what decides the figures."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def remembered() -> Found:
    """Return optax's figures of the last full run, if these packages found them."""
    if not RESULTS.exists():
        return {}
    last = json.loads(RESULTS.read_text())
    if last["about"] != versions():
        return {}
    return {k: v for k, v in last["programs"].items() if k.startswith("optax/")}


FORMS = {
    "launches": ("launches", "{:.0f}", 1),
    "host_waits": ("host waits", "{:.0f}", 1),
    "loops": ("loops", "{:.0f}", 1),
    "kernels": ("kernels", "{:.0f}", 1),
    "collectives": ("collectives", "{:.0f}", 1),
    "cycles": ("Mcycles", "{:.2f}", 1e-6),
    "bytes": ("MB moved", "{:.1f}", 1e-6),
    "temporaries": ("temporary MB", "{:.1f}", 1e-6),
    "peak": ("peak MB", "{:.0f}", 1e-6),
    "copied": ("MB not in place", "{:.0f}", 1e-6),
    "compile_s": ("compile s", "{:.0f}", 1),
}
H100 = (
    "launches", "host_waits", "kernels", "bytes", "temporaries", "copied", "compile_s",
)  # fmt: skip
TPU = (
    "cycles", "loops", "collectives", "bytes", "temporaries", "peak", "copied",
    "compile_s",
)  # fmt: skip


def table(cells: list[Cell], found: Found, columns: tuple[str, ...]) -> str:
    """Return a row a cell in Markdown, each figure with optax's in brackets."""
    ratio = "bytes" if columns == H100 else "cycles"
    titles = ["cell", *(FORMS[key][0] for key in columns), f"{ratio} to optax", "bars"]
    lines = [
        f"| {' | '.join(titles)} |",
        f"|---|{'---:|' * (len(columns) + 1)}---|",
    ]
    for cell in cells:
        both = [found[cell.ours]]
        both += [found[cell.optax(cell.like)]] if cell.like else []
        texts = []
        for key in columns:
            _, form, unit = FORMS[key]
            ours, *theirs = (form.format(one[key] * unit) for one in both)
            texts.append(" ".join([ours, *(f"({text})" for text in theirs)]))
        of = next((bar.of for bar in cell.bars if bar.figure == ratio), "")
        share = both[0][ratio] / found[cell.optax(of)][ratio] if of else None
        texts.append("" if share is None else f"{share:.3f}")
        texts.append("above" if cell.above(found) else "ok")
        lines.append(f"| {' | '.join([cell.name, *texts])} |")
    return "\n".join(lines)


def page(cells: list[Cell], found: Found) -> str:
    """Return a table a compiler."""
    tables = [
        table(some, found, columns)
        for columns, of_h100 in ((H100, True), (TPU, False))
        if (some := [c for c in cells if c.name.startswith("h100/") is of_h100])
    ]
    return "\n\n".join(tables) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", help="beginnings of names; none: all")
    parser.add_argument("--list", action="store_true", help="the names, and no more")
    parser.add_argument("--fresh", action="store_true", help="optax's figures too")
    args = parser.parse_args()
    wanted = [name.rstrip("/") + "/" for name in args.cells] or [""]
    chosen = [cell for cell in CELLS if f"{cell.name}/".startswith(tuple(wanted))]
    if args.list:
        print("\n".join(cell.name for cell in chosen))
        return 0
    if not chosen:
        parser.error(f"no cell of the names {args.cells}; --list prints them")
    for target in {cell.name.split("/")[0] for cell in chosen}:
        if lacking := missing(target):
            parser.error(f"{target}: {', '.join(lacking)} not installed")
    full = chosen == CELLS
    found = {} if full or args.fresh else remembered()
    programs = dict.fromkeys(name for cell in chosen for name in cell.programs)
    bar = tqdm([name for name in programs if name not in found], disable=None)
    for name in bar:
        bar.set_postfix_str(name)
        found[name] = measure(name)
    printed = page(chosen, found)
    print(printed)
    above = [f"{cell.name}: {text}" for cell in chosen for text in cell.above(found)]
    print("\n".join(above) or "every cell holds its bars")
    if full:
        rows = [{"cell": cell.name, "above": cell.above(found)} for cell in chosen]
        result = {"about": versions(), "cells": rows, "programs": found}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        TABLES.write_text(printed)
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())

"""What optloss is on GPUs and TPUs: compiled for an H100 and a TPU v5e, beside optax.

    python benchmarks/targets.py                            every cell, some 15 minutes
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
    like: str  # the case of optax's program
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
        others = [self.like, *(bar.of for bar in self.bars if bar.of)]
        return list(dict.fromkeys([self.ours, *map(self.optax, others)]))

    def above(self, found: dict[str, dict[str, Any]]) -> list[str]:
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


CELLS = [
    h100("adam/1e7/16", "adam", 1.00),
    h100("clip/1e7/16", "clip", 1.00),
    h100("adaptive/1e7/16", "clip", 1.00),
    h100("clip+guard/1e7/16", "clip", 1.01),
    h100("noise+clip/1e7/16", "noise+clip", 1.12),
    h100("everything/1e7/16", "noise+clip", 1.12),
    h100("clip+gradient_norm/1e7/16", "clip", 1.02),
    h100("clip+guard/1e7/400", "clip", 1.01, Bar("kernels", 1400)),
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


def remembered() -> dict[str, dict[str, Any]]:
    """Return optax's figures of the last full run, if these packages found them."""
    if not RESULTS.exists():
        return {}
    last = json.loads(RESULTS.read_text())
    if last["about"] != versions():
        return {}
    return {k: v for k, v in last["programs"].items() if k.startswith("optax/")}


COLUMNS = {
    "launches": ("launches", "{:.0f}", 1),
    "host_waits": ("host waits", "{:.0f}", 1),
    "bytes": ("MB moved", "{:.1f}", 1e-6),
    "temporaries": ("temporary MB", "{:.1f}", 1e-6),
    "copied": ("MB not in place", "{:.1f}", 1e-6),
    "kernels": ("kernels", "{:.0f}", 1),
    "compile_s": ("compile s", "{:.1f}", 1),
}


def shown(figures: dict[str, Any], key: str) -> str:
    _, form, unit = COLUMNS[key]
    return form.format(figures[key] * unit) if key in figures else ""


def table(cells: list[Cell], found: dict[str, dict[str, Any]]) -> str:
    """Return a row a cell in Markdown, each figure beside optax's in brackets."""
    titles = [title for title, _, _ in COLUMNS.values()]
    lines = [
        "| " + " | ".join(["cell", *titles, "of the bar's MB", ""]) + " |",
        "|---|" + "---:|" * (len(titles) + 1) + "---|",
    ]
    for cell in cells:
        ours, theirs = found[cell.ours], found[cell.optax(cell.like)]
        texts = [f"{shown(ours, key)} ({shown(theirs, key)})" for key in COLUMNS]
        (bar,) = (bar for bar in cell.bars if bar.figure == "bytes")
        share = ours["bytes"] / found[cell.optax(bar.of)]["bytes"]
        above = cell.above(found)
        verdict = "above its bar" if above else "ok"
        row = [cell.name.split("/", 1)[1], *texts, f"{share:.2f}", verdict]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


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
    printed = table(chosen, found)
    print(printed)
    above = [f"{cell.name}: {text}" for cell in chosen for text in cell.above(found)]
    print("\n" + ("\n".join(above) or "every cell holds its bars"))
    if full:
        rows = [{"cell": cell.name, "above": cell.above(found)} for cell in chosen]
        result = {"about": versions(), "cells": rows, "programs": found}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        TABLES.write_text(printed + "\n")
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())

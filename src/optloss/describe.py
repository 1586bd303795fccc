"""What ``describe`` prints: the pipeline, a table of the parameters, the totals."""

import math
import re
import shutil
import textwrap
from typing import NamedTuple

import jax

from optloss.arguments import as_arrays
from optloss.chain import Chain
from optloss.messages import is_number, short_repr
from optloss.names import first_match, leaf_names
from optloss.stages import Stage
from optloss.typing import PyTree

WIDTH = 100
"""Columns where there is no terminal."""
NARROWEST = 40
INDENT = 4
WIDEST_CELL = 20
HEADER = (
    "parameter",
    "shape",
    "dtype",
    "trained",
    "optimizer",
    "rate",
    "x gradient",
    "x rate",
)
# A number that does not stand inside braces, where an earlier fold put it.
NUMBER = re.compile(r"\d+(?![^{]*})")


class Row(NamedTuple):
    """One parameter, or several like ones folded together."""

    name: str
    shape: str
    dtype: str
    trained: str
    optimizer: str = ""  # where there are several, or several rates
    rate: str = ""
    gradient: str = ""
    multiplier: str = ""


def describe(chain: Chain, pipeline: str, params: PyTree) -> str:
    """Return the ``pipeline``, the folded table of ``params`` and the totals."""
    params = as_arrays(chain.start.call, params)
    state = jax.eval_shape(chain.start.init, params)
    selected = chain.start.selected(params)
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    groups = chain.start.stages.optimizer.groups
    columns = zip(
        names,
        leaves,
        selected,
        [("", "") if groups is None else groups.words(name) for name in names],
        _multipliers(chain.start.stages.multipliers, names),
        _multipliers(chain.start.stages.rate_multipliers, names),
        strict=True,
    )
    unfolded = [
        Row(
            name or "(the tree itself)",
            "x".join(map(str, leaf.shape)) or "scalar",
            str(leaf.dtype),
            "trained" if trained else "frozen",
            *((*group, gradient, multiplier) if trained else ()),
        )
        for name, leaf, trained, group, gradient, multiplier in columns
    ]
    rows = fold(unfolded)
    width = max(shutil.get_terminal_size((WIDTH, 24)).columns, NARROWEST)
    totals = textwrap.wrap(_totals(leaves, selected, state), width)
    return "\n".join([*_wrap(pipeline, width), "", *_table(rows, width), "", *totals])


def _multipliers(stage: Stage, names: list[str]) -> list[str]:
    values = [f"{v:g}" if is_number(v) else short_repr(v) for v in stage.rules.values()]
    rules = first_match(tuple(stage.rules), names)
    return ["" if rule is None else values[rule] for rule in rules]


def fold(rows: list[Row]) -> list[Row]:
    """Fold three or more layers that differ in one number: ``layers_{0..11}/kernel``.

    The numbers of a name are folded one after the other, the innermost first.
    """
    most = max((len(NUMBER.findall(row.name)) for row in rows), default=0)
    for place in reversed(range(most)):
        rows = _fold_number(rows, place)
    return rows


def _fold_number(rows: list[Row], place: int) -> list[Row]:
    groups: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for i, row in enumerate(rows):
        before, number, after = _split(row.name, place)
        group = groups.setdefault((before, after, *row[1:]), [])
        group.append((int(number or 0), i))
    folded = dict(enumerate(rows))
    for (before, after, *_), group in groups.items():
        if len(group) > 2:
            span = _spans([number for number, _ in group])
            _, first = min(group)
            for _, i in group:
                del folded[i]
            folded[first] = rows[first]._replace(name=f"{before}{{{span}}}{after}")
    return [folded[i] for i in sorted(folded)]


def _split(name: str, place: int) -> tuple[str, str, str]:
    """Return what stands before, in and behind the number at ``place`` in ``name``."""
    found = list(NUMBER.finditer(name))
    if place >= len(found):
        return name, "", ""
    start, end = found[place].span()
    return name[:start], name[start:end], name[end:]


def _spans(numbers: list[int]) -> str:
    """Return sorted numbers in words: ``0..5,7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs
    )


def _table(rows: list[Row], width: int) -> list[str]:
    table = [Row(*HEADER), *rows]
    used = [i for i in range(len(HEADER)) if i < 4 or any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in table) for i in used}
    if sum(widths.values()) + 2 * len(used[1:]) > width:
        widths |= {i: min(widths[i], WIDEST_CELL) for i in used[1:]}
        room = max(width - sum(widths[i] + 2 for i in used[1:]), len(HEADER[0]))
        widths[0] = min(widths[0], room)
    return [
        "  ".join(_cut(row[i], widths[i]).ljust(widths[i]) for i in used).rstrip()
        for row in table
    ]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def _wrap(line: str, width: int) -> list[str]:
    """Return ``line`` in lines that begin at an arrow, or at a word where none fits."""
    lines = [""]
    for part in re.split(r" (?=-> )", line):
        joined = f"{lines[-1]} {part}".lstrip()
        if len(joined) + INDENT <= width or lines == [""]:
            lines[-1] = joined
        else:
            lines.append(part)
    return [
        piece
        for i, part in enumerate(lines)
        for piece in textwrap.wrap(
            part,
            width,
            initial_indent=" " * INDENT * (i > 0),
            subsequent_indent=" " * INDENT * (1 + (i > 0)),
            break_on_hyphens=False,
        )
    ]


def _totals(leaves: list[PyTree], selected: list[bool], state: PyTree) -> str:
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    trained = sum(n for n, wanted in zip(sizes, selected, strict=True) if wanted)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return (
        f"trained: {trained:,} parameters, frozen: {sum(sizes) - trained:,}, "
        f"optimizer state: {held:,} bytes"
    )

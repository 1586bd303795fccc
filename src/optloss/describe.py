"""The chain in words: one line for ``repr``, a table of the parameters for ``describe``."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optloss.chain import Chain
from optloss.messages import show
from optloss.names import assign, leaf_names
from optloss.stages import Stage

WIDTH = 100
HEADER = ("parameter", "shape", "dtype", "trained", "x gradient", "x rate")


class Row(NamedTuple):
    """One parameter, or several like ones folded together."""

    name: str
    shape: str
    dtype: str
    trained: str
    gradient: str
    rate: str


def one_line(chain: Chain, name: str) -> str:
    """Return the pipeline in order."""
    stages = " -> ".join(
        ["gradient", *(stage.text for stage in chain.stages), "step + 1"]
    )
    skip = " (skipped if not finite)" if chain.skip_nonfinite else ""
    return f"{name}: {stages}{skip}" if name else f"{stages}{skip}"


def describe(chain: Chain, name: str, params: Any) -> str:
    """Return the pipeline, the folded table of ``params`` and the totals."""
    state = jax.eval_shape(chain.init, params)
    selected = chain.selected(params)
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    columns = zip(
        names,
        leaves,
        selected,
        _multipliers(chain.multipliers, names),
        _multipliers(chain.rate_multipliers, names),
        strict=True,
    )
    rows = _fold([_row(*column) for column in columns])
    return "\n".join(
        [
            *_wrap(one_line(chain, name)),
            "",
            *_table(rows),
            "",
            *_totals(leaves, selected, state),
        ]
    )


def _multipliers(stage: Stage, names: list[str]) -> list[str]:
    values = list(stage.rules.values())
    rules = assign(stage.argument, tuple(stage.rules), names, check=False)
    return ["" if rule is None else show(values[rule]) for rule in rules]


def _row(name: str, leaf: Any, trained: bool, gradient: str, rate: str) -> Row:
    dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
    return Row(
        name or "(the tree itself)",
        "x".join(map(str, shape)) or "scalar",
        str(dtype),
        "trained" if trained else "frozen",
        gradient if trained else "",
        rate if trained else "",
    )


def _fold(rows: list[Row]) -> list[Row]:
    """Fold layers that differ in their number alone: ``layers_{0..11}/kernel``."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        like = re.sub(r"\d+", "#", row.name, count=1)
        groups.setdefault((like, *row[1:]), []).append(row)
    return [
        row
        for group in groups.values()
        for row in (_folded(group) if len(group) > 2 else group)
    ]


def _folded(group: list[Row]) -> list[Row]:
    numbers = [
        int(found.group()) for row in group if (found := re.search(r"\d+", row.name))
    ]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return group
    span = f"{{{numbers[0]}..{numbers[-1]}}}"
    name = re.sub(r"\d+", lambda _: span, group[0].name, count=1)
    return [group[0]._replace(name=name)]


def _table(rows: list[Row]) -> list[str]:
    table = [Row(*HEADER), *rows]
    used = [i for i in range(len(HEADER)) if i < 4 or any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in table) for i in used}
    room = WIDTH - sum(widths[i] + 2 for i in used[1:])
    widths[0] = min(widths[0], max(room, 12))
    return [
        "  ".join(_cut(row[i], widths[i]).ljust(widths[i]) for i in used).rstrip()
        for row in table
    ]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def _wrap(line: str) -> list[str]:
    lines, rest = [], line
    while len(rest) > WIDTH:
        cut = rest.rfind(" -> ", 0, WIDTH - 3)
        cut = WIDTH - 4 if cut <= 4 else cut
        lines.append(rest[:cut])
        rest = "    " + rest[cut:].lstrip()
    return [*lines, rest]


def _totals(leaves: list[Any], selected: list[bool], state: Any) -> list[str]:
    sizes = [math.prod(jnp.shape(leaf)) for leaf in leaves]
    trained = sum(n for n, wanted in zip(sizes, selected, strict=True) if wanted)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return [
        f"trained: {trained:,} parameters, frozen: {sum(sizes) - trained:,}, "
        f"optimizer state: {held:,} bytes"
    ]

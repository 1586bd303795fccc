"""JAX interfaces that may change under us are used in one module, ``mesh``.

A release of JAX that moves one of them is then mended in one place.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "optloss"
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
ROOM = Path("mesh.py")

# What JAX says may change without notice, or is not public at all.
UNSTABLE = {
    "jax._src",
    "jax.core",
    "jax.experimental",
    "jax.extend",
    "jax.interpreters",
    "jaxlib",
}
# Names for kinds of axes, types of values and placement, whatever they hang on.
NAMES = {
    "AxisType",
    "aval",
    "committed",
    "get_abstract_mesh",
    "manual_axis_type",
    "pcast",
    "pvary",
    "reshard",
    "shard_map",
    "typeof",
    "vma",
}


def violations(source: str) -> list[str]:
    """Return the lines of ``source`` with a name that belongs in the room."""
    tree = ast.parse(source)
    aliases = {
        alias.asname or alias.name.partition(".")[0]: (
            alias.name if alias.asname else alias.name.partition(".")[0]
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    found = {
        (node.lineno, name)
        for node in ast.walk(tree)
        for name in used(node, aliases)
        if name in NAMES or any(name.startswith(f"{part}.") for part in UNSTABLE)
    }
    return [f"line {line}: {name.rstrip('.')}" for line, name in sorted(found)]


def used(node: ast.AST, aliases: dict[str, str]) -> Iterator[str]:
    """Yield what ``node`` names: a module's path with a dot at its end, or a word."""
    match node:
        case ast.Import():
            yield from (f"{alias.name}." for alias in node.names)
        case ast.ImportFrom():
            yield from (f"{node.module}.{alias.name}." for alias in node.names)
            yield from (alias.name for alias in node.names)
        case ast.Attribute(attr=name):
            yield name
            yield f"{dotted(node, aliases)}."
        case ast.Name(id=name):
            yield name
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr"),
            args=[_, ast.Constant(str(name)), *_],
        ):
            yield name


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """Return ``jax.core`` for these two words in a row, "?" for what is no name."""
    match node:
        case ast.Attribute(value=value, attr=name):
            return f"{dotted(value, aliases)}.{name}"
        case ast.Name(id=name):
            return aliases.get(name, name)
        case _:
            return "?"


@pytest.mark.parametrize("path", [path for path in MODULES if path != ROOM], ids=str)
def test_what_may_change_in_jax_stands_in_one_room(path):
    assert violations((SOURCE / path).read_text()) == []


def test_the_room_exists_and_has_a_use():
    assert violations((SOURCE / ROOM).read_text()) != []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import jax.core", ["jax.core"]),
        ("import jax.extend.random as random", ["jax.extend.random"]),
        ("from jax import core", ["jax.core"]),
        ("from jax.core import Tracer", ["jax.core.Tracer"]),
        ("from jax._src.lax import lax", ["jax._src.lax.lax"]),
        ("from jax.experimental.x import y", ["jax.experimental.x.y"]),
        ("from jax.interpreters import mlir", ["jax.interpreters.mlir"]),
        ("import jaxlib", ["jaxlib"]),
        ("import jax\n\ndef f():\n    jax.core.x", ["jax.core", "jax.core.x"]),
        ("import jax as j\nj.experimental", ["jax.experimental"]),
        ("import jax.numpy as jnp\nimport jax\njax.extend", ["jax.extend"]),
        ("import jax\njax.typeof(x).sharding", ["typeof"]),
        ("from jax import typeof", ["typeof"]),
        ("from jax.sharding import AxisType, NamedSharding", ["AxisType"]),
        ("import jax\njax.sharding.AxisType.Auto", ["AxisType"]),
        ("x.manual_axis_type.varying", ["manual_axis_type"]),
        ("getattr(leaf, 'committed', False)", ["committed"]),
        ("x.committed", ["committed"]),
        ("x.aval.vma", ["aval", "vma"]),
        ("from jax import lax\nlax.pcast(x, 'a', to='varying')", ["pcast"]),
        ("jax.shard_map(f)", ["shard_map"]),
        ("jax.sharding.reshard(x, s)", ["reshard"]),
        ("jax.sharding.get_abstract_mesh()", ["get_abstract_mesh"]),
    ],
)
def test_a_name_out_of_its_room_is_seen(source, names):
    line = source.count("\n") + 1
    assert violations(source) == [f"line {line}: {name}" for name in names]


@pytest.mark.parametrize(
    "source",
    [
        "import jax\nimport jax.numpy as jnp\njax.tree.map(f, jnp.ones(3))",
        "from jax import lax\nlax.platform_dependent(x, default=f)",
        "from jax.sharding import NamedSharding, PartitionSpec",
        '"""Under ``shard_map`` or ``pmap``, see jax.core."""',
        "from optloss.mesh import explicit_sharding",
        "import core\ncore.experimental\nextend.core",
        "leaf.sharding",
    ],
)
def test_what_is_public_and_stable_is_allowed(source):
    assert violations(source) == []

"""A module imports only from floors below its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "optloss"
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))

# From the ground up; a package is one room. "" is the public API, `optloss` itself.
HOUSE = (
    ("typing",),
    ("trees",),
    ("extra", "mesh"),
    ("made_by", "messages"),
    ("donation", "hyperparams", "knobs", "plateau"),
    ("batches", "names", "norms", "replicas"),
    ("loss",),
    ("gradients", "histograms", "optimizers"),
    ("fast",),
    ("decays", "summaries"),
    ("spikes",),
    ("guard",),
    ("transforms",),
    ("averages", "groups", "loss_scale", "per_example", "rates"),
    ("compiled", "objective", "stages"),
    ("state_check", "state_nodes"),
    ("adopt", "optimizer_argument"),
    ("arguments",),
    ("chain_start",),
    ("chain",),
    ("describe", "evaluation"),
    ("train_op",),
    ("optimize",),
    ("", "integrations"),
    ("demo",),
    ("__main__",),
)
FLOORS = {room: height for height, rooms in enumerate(HOUSE) for room in rooms}
STRANGERS = {"transforms"}  # one feature a file, none imports another
PACKAGES = {"fast", "integrations", "optimizers", "transforms"}
USERS_OF_THE_PUBLIC_API = {"__main__", "demo"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of the package that ``tree`` imports, without "optloss."."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        for name in names:
            if name.startswith("."):
                raise ValueError(f"relative import {name!r}")
            package, _, module = name.partition(".")
            if package == "optloss":
                yield module


def home(path: Path) -> str:
    """Return the module's name: ("transforms/noise.py") -> "transforms.noise"."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def violations(path: Path, source: str) -> list[str]:
    """Return what is wrong with the imports of ``source``, which lives at ``path``."""
    module = home(path)
    room = module.partition(".")[0]
    if room not in FLOORS:
        return [f"{module} has no floor: give it one, in the design and here"]
    faults = []
    for target in imported(ast.parse(source)):
        other = target.partition(".")[0]
        if other not in FLOORS:
            faults.append(f"{module} imports {target}, which has no floor")
        elif target == "" and room not in USERS_OF_THE_PUBLIC_API:
            faults.append(f"{module} imports optloss itself")
        elif other == room and room in PACKAGES:
            if room in STRANGERS and module != room:
                faults.append(f"{module} imports its neighbour {target}")
        elif FLOORS[other] >= FLOORS[room]:
            faults.append(f"{module} imports {target}, which is not below it")
    return faults


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_only_from_below(path):
    assert violations(path, (SOURCE / path).read_text()) == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_room_for_speed_asks_what_is_packed(path):
    asks = re.search(r"isinstance\([^)]*Packed", (SOURCE / path).read_text())
    assert path.parts[0] == "fast" or asks is None


def test_there_are_modules():
    assert Path("messages.py") in MODULES


def test_rooms_that_are_folders_are_the_packages():
    folders = {path.parts[0] for path in MODULES if len(path.parts) > 1}
    assert folders == PACKAGES


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        (
            "trees.py",
            "def f():\n    from optloss.names import x",
            "trees imports names, which is not below it",
        ),
        (
            "names.py",
            "import optloss.decays",
            "names imports decays, which is not below it",
        ),
        (
            "transforms/noise.py",
            "from optloss.transforms.clipping import x",
            "transforms.noise imports its neighbour transforms.clipping",
        ),
        ("chain.py", "from optloss import trees", "chain imports optloss itself"),
        (
            "integrations/nnx.py",
            "import optloss",
            "integrations.nnx imports optloss itself",
        ),
        (
            "helpers.py",
            "",
            "helpers has no floor: give it one, in the design and here",
        ),
        (
            "demo.py",
            "from optloss.helpers import x",
            "demo imports helpers, which has no floor",
        ),
    ],
)
def test_a_wrong_import_is_seen(path, source, fault):
    assert violations(Path(path), source) == [fault]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from optloss.optimize import x as x"),
        ("demo.py", "import optloss"),
        ("optimizers/registry.py", "from optloss.optimizers.tensorflow import x"),
        ("transforms/__init__.py", "from optloss.transforms.noise import x"),
        ("chain.py", "from optloss.transforms.noise import x\nimport jax.numpy"),
    ],
)
def test_a_right_import_is_allowed(path, source):
    assert violations(Path(path), source) == []


def test_relative_imports_are_refused():
    with pytest.raises(ValueError, match=r"relative import '\.'"):
        violations(Path("trees.py"), "from . import names")

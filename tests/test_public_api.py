"""The public names, the API pages and the sections of the docstrings go together."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optloss

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")}
DIRECTIVE = re.compile(
    r"^\.\. (?:auto(?:function|class)|py:data):: ([\w.]+)", re.MULTILINE
)
SECTIONS = [
    "Args", "Attributes", "Returns", "Raises", "Note", "Example", "See also",
    "References",
]  # fmt: skip
ROOMS = ["optimizers.tensorflow", "integrations.linen", "integrations.nnx"]
ROOMS += ["integrations.tensorboard"]


def exported():
    """Return the names that ``__init__`` imports as themselves."""
    tree = ast.parse(Path(optloss.__file__).read_text())
    aliases = [a for node in ast.walk(tree) for a in getattr(node, "names", [])]
    assert all(alias.asname == alias.name for alias in aliases)
    return sorted(alias.name for alias in aliases)


def own(room):
    """Return what a module outside ``optloss`` itself offers."""
    module = importlib.import_module(f"optloss.{room}")
    return [
        f"optloss.{room}.{name}"
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


PUBLIC = [f"optloss.{name}" for name in exported()]
DOCUMENTED = PUBLIC + [name for room in ROOMS for name in own(room)]


def find(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def methods(name):
    """Return the methods that a documented class brings, by name."""
    return {
        f"{name}.{attribute}": value
        for attribute, value in vars(find(name)).items()
        if not attribute.startswith("_") and inspect.isfunction(value)
    }


FUNCTIONS = [name for name in DOCUMENTED if inspect.isfunction(find(name))]
DATA = {"optloss.OPTIMIZER_CLS_NAMES", "optloss.OPTIMIZER_SUMMARIES"}


def entries(page):
    """Yield each name documented on a page, with the text up to the next one."""
    _, *parts = DIRECTIVE.split(page)
    yield from zip(parts[::2], parts[1::2], strict=True)


ENTRIES = [entry for page in PAGES.values() for entry in entries(page)]


def headings(text):
    return [line[:-1] for line in text.splitlines() if re.match(r"[A-Z][\w ]*:$", line)]


def section(text, heading):
    match = re.search(rf"^{heading}:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    return "" if match is None else match[1]


def test_the_package_offers_what_its_init_exports_and_its_modules():
    offered = {
        name
        for name, value in vars(optloss).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert offered == set(exported())
    assert sorted(optloss.__all__) == exported()
    rooms = {"integrations", "optimizers", "typing"}
    assert set(dir(optloss)) == {*exported(), *rooms, "__version__"}
    assert optloss.__version__ == importlib.metadata.version("optloss")
    assert len(exported()) == len(set(exported()))
    assert {"optimize_loss", "make_optimizer", "get_summaries"} <= offered


def test_the_plain_library_imports_none_of_its_extras():
    code = "import optloss, sys; print(*{name.split('.')[0] for name in sys.modules})"
    called = [sys.executable, "-c", code]
    done = subprocess.run(called, capture_output=True, text=True, check=True)
    extras = {"equinox", "flax", "matplotlib", "orbax", "sklearn", "tensorboardX"}
    assert "optax" in done.stdout.split()
    assert not extras & set(done.stdout.split())


def test_every_public_name_is_on_one_api_page_and_nothing_else_is():
    names = [name for name, _ in ENTRIES]
    assert len(names) == len(set(names))
    assert set(DOCUMENTED) <= set(names)
    states = {name for name in names if name.endswith("State")}
    assert set(names) - set(DOCUMENTED) <= states
    for name in names:
        assert find(name) is not None


def test_every_api_page_is_in_the_index():
    listed = set(re.findall(r"^(\w+)$", PAGES["index.md"], re.MULTILINE))
    assert listed == {name.removesuffix(".md") for name in PAGES} - {"index"}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs(name):
    doc = inspect.getdoc(find(name)) or ""
    beside = dict(ENTRIES)[name]
    assert ">>>" in section(doc, "Example") or ">>>" in beside


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_docstring_begins_with_a_sentence_and_keeps_the_order_of_sections(name):
    if name in DATA:
        return
    doc = inspect.getdoc(find(name))
    first = doc.split("\n\n")[0]
    assert "\n" not in first
    assert first.endswith(".")
    order = [heading for heading in headings(doc) if heading in SECTIONS]
    assert order == sorted(order, key=SECTIONS.index)
    assert len(order) == len(set(order))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_documents_its_arguments_and_what_it_returns(name):
    doc = inspect.getdoc(find(name))
    documented = re.findall(r"^    (\*{0,2}\w+):", section(doc, "Args"), re.MULTILINE)
    parameters = inspect.signature(find(name)).parameters.values()
    assert documented == [str(p).split(":")[0].split("=")[0] for p in parameters]
    returns = inspect.signature(find(name)).return_annotation
    assert section(doc, "Returns") or returns == "None"


def test_what_is_returned_is_a_sentence():
    """Of "Words: more" the first would be taken for a type, and set in italics."""
    documented = {name: find(name) for name in FUNCTIONS}
    for name in set(DOCUMENTED) - set(FUNCTIONS) - DATA:
        documented |= methods(name)
    returns = {
        name: section(inspect.getdoc(function), "Returns")
        for name, function in documented.items()
    }
    assert any(returns.values())
    assert not [
        name for name, text in returns.items() if re.match(r"\s+[^`(\n]*:\s", text)
    ]


def test_what_is_wrong_is_seen():
    doc = "Do it.\n\nReturns:\n    It.\n\nArgs:\n    x: That.\n\nExample:\n    >>> 1\n"
    assert headings(doc) == ["Returns", "Args", "Example"]
    assert section(doc, "Args").strip() == "x: That."
    page = ".. autofunction:: optloss.a\n.. autoclass:: optloss.b()\n   >>> 1\n"
    assert [name for name, _ in entries(page)] == ["optloss.a", "optloss.b"]

"""Every ``>>>`` of the README and of the docs runs and prints what it says.

The examples of a page share one namespace. The docstrings' own are run by
``pytest --doctest-modules src``.
"""

import doctest
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = {"_build", "gallery"}
PAGES = [
    path.relative_to(ROOT)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.exists() and not BUILT & set(path.parts)
]
# The fence that closes a block would be read as expected output.
FENCE = re.compile(r"^\s*(`{3,}|:{3,}).*$", re.MULTILINE)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run(text: str, name: str) -> str:
    """Return what doctest has against the examples in ``text``: "" if nothing."""
    parser = doctest.DocTestParser()
    examples = parser.get_doctest(FENCE.sub("", text), {}, name, name, 0)
    report = io.StringIO()
    doctest.DocTestRunner(optionflags=OPTIONS).run(examples, out=report.write)
    return report.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run((ROOT / page).read_text(), str(page))
    assert not report, report


def test_a_wrong_example_is_seen():
    report = run("```python\n>>> 1 + 1\n3\n```\n", "a page")
    assert 'File "a page", line 2' in report
    assert run("```python\n>>> 1 + 1\n2\n```\n", "a page") == ""

"""The pages run, print what they say, lead somewhere, and are written plainly.

Two kinds of code run on the README and on every page of the docs. Examples with ``>>>``
are doctests. A block marked ``python`` without ``>>>`` is a program: its output stands
in the next block marked ``text``, where numbers with a decimal point count as equal to
within two per cent. All code of a page shares one namespace; a block marked ``py`` is
only shown. The docstrings' own examples are run by ``pytest --doctest-modules src``.
"""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BUILT = {"_build", "gallery"}
PAGES = [
    path.relative_to(ROOT)
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted(DOCS.rglob("*.md")),
    ]
    if path.exists() and not BUILT & set(path.parts)
]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(
    r"^ *(?P<fence>`{3,})(?P<kind>\S*)[^\n]*\n(?P<code>.*?)^ *(?P=fence)`* *$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?")


def blocks(text):
    """Yield the kind, the first line's number and the code of each fenced block."""
    for found in BLOCK.finditer(text):
        yield found["kind"], text.count("\n", 0, found.start()) + 1, found["code"]


def run_doctest(code, name, line, namespace):
    parser = doctest.DocTestParser()
    examples = parser.get_doctest(code, namespace, name, name, line)
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(examples, out=report.write, clear_globs=False)
    namespace.update(examples.globs)
    return report.getvalue()


def same_output(expected, printed):
    """Whether two texts are equal, their decimal numbers nearly."""
    want, got = (NUMBER.findall(text) for text in (expected, printed))
    texts = [" ".join(NUMBER.sub("#", text).split()) for text in (expected, printed)]
    return texts[0] == texts[1] and all(
        float(b) == pytest.approx(float(a), rel=0.02, abs=0.002)
        for a, b in zip(want, got, strict=True)
    )


def run(text, name):
    """Return what is wrong with the code in ``text``: "" if nothing."""
    namespace, report, printed = {"__name__": name}, [], ""
    for kind, line, code in blocks(text):
        if kind in ("python", "{eval-rst}", "") and ">>>" in code:
            report.append(run_doctest(code, name, line, namespace))
        elif kind == "python":
            output = io.StringIO()
            program = compile("\n" * line + code, name, "exec")
            with contextlib.redirect_stdout(output):
                exec(program, namespace)
            printed += output.getvalue()
        elif kind == "text" and printed:
            if not same_output(code, printed):
                report.append(f"{name}, line {line}: printed\n{printed}\n")
            printed = ""
    if printed:
        report.append(f"{name}: the output is not on the page:\n{printed}")
    return "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run((ROOT / page).read_text(), str(page))
    assert not report, report


def test_a_wrong_example_is_seen():
    report = run("```python\n>>> 1 + 1\n3\n```\n", "a page")
    assert 'File "a page", line 2' in report
    assert run("```python\n>>> 1 + 1\n2\n```\n", "a page") == ""


def test_wrong_output_of_a_program_is_seen():
    program = "```python\nprint('loss', 0.5)\n```\n"
    assert run(f"{program}\n```text\nloss 0.501\n```\n", "a page") == ""
    assert "line 5" in run(f"{program}\n```text\nloss 0.6\n```\n", "a page")
    assert "not on the page" in run(program, "a page")
    with pytest.raises(ZeroDivisionError):
        run("```python\n1 / 0\n```\n", "a page")

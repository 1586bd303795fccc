"""The types: how often they say nothing, and what they let a user write."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_ANYS = 5.0  # for each 100 lines of code

USAGE = Path("tests", "typing_usage.py")
WRONG = Path("tests", "typing_wrong.py")
CHECKERS = {
    "mypy": ["mypy", "--no-error-summary"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}
BLANK = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


def docstring_lines(source):
    found = set()
    for node in ast.walk(ast.parse(source)):
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, holders) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def anys_and_lines(source):
    """Return how often ``source`` says ``Any``, and how many lines of code it has."""
    docs, lines, anys = docstring_lines(source), set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in BLANK:
            lines |= set(range(token.start[0], token.end[0] + 1)) - docs
        anys += token.type == tokenize.NAME and token.string == "Any"
    return anys, len(lines)


def test_a_count_leaves_out_what_is_no_code():
    source = '"""Any."""\n\nfrom typing import Any  # Any\n\nx: "str" = (\n    Any\n)\n'
    assert anys_and_lines(source) == (2, 4)


def test_the_types_say_something():
    counts = [anys_and_lines(p.read_text()) for p in (ROOT / "src").rglob("*.py")]
    anys, lines = map(sum, zip(*counts, strict=True))
    assert lines > 1000
    assert 100 * anys / lines <= MOST_ANYS


def faults(checker, path):
    """Return the lines of ``path`` in which a checker finds errors, with its words."""
    beside = shutil.which(checker, path=Path(sys.executable).parent)
    if beside is None:
        pytest.skip(f"{checker} is not installed")
    called = [beside, *CHECKERS[checker][1:], str(path)]
    environment = os.environ | {"MYPYPATH": "src"}
    done = subprocess.run(
        called, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    mark = re.compile(rf"^.*{path.name}:(\d+):.* ?error[ :].*$", re.MULTILINE)
    return {int(match[1]): match[0] for match in mark.finditer(done.stdout)}


@pytest.mark.parametrize("checker", CHECKERS)
def test_right_uses_pass(checker):
    assert faults(checker, USAGE) == {}


@pytest.mark.parametrize("checker", CHECKERS)
def test_wrong_uses_are_refused(checker):
    lines = (ROOT / WRONG).read_text().splitlines()
    wrong = {i for i, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert len(wrong) >= 30
    assert faults(checker, WRONG).keys() == wrong

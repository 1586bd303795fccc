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


@pytest.mark.wide
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


# Prose --------------------------------------------------------------------------------

# To be rewritten together with the benchmarks it reports.
UNEDITED = {Path("docs/changelog.md")}
PHRASES = [
    "a page a ",
    "when the step is over",
    "by who has",
    "is looked at by",
    "where the noise starts",
    "stands in a loop",
    "dearer",
    "is the business of",
    "behind",
    "anew",
    "the parts",
    "the chain",
    "gives in",
    "give in",
    "bites",
]
SHORT = [
    page
    for page in PAGES
    if page.name in ("README.md", "start.md") or page.parent.name == "recipes"
]
LONGEST_MEAN = 20.0
LINK = re.compile(r"(?<!`)\[(?P<text>[^][]*)\]\((?P<target>[^()\s]+)\)")


def prose(text):
    """Return the paragraphs and list items of a page, without its code."""
    text = BLOCK.sub("\n\n", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r"^\s*:::.*$|^:\w[\w-]*:.*$|^#.*$|^\|.*$", "", text, flags=re.MULTILINE
    )
    text = re.sub(r"^( {4,}|\(.*\)=$).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\{\w+\}`[^`]*`|`[^`]*`|\$[^$]*\$", "CODE", text)
    text = LINK.sub(lambda link: link["text"], text)
    parts = re.split(r"\n\s*\n|^\s*(?:[*:-]|\d+\.) ", text, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in parts if part.strip()]


def sentence_lengths(text):
    """Return how many words each sentence of a page has."""
    sentences = [
        sentence.split()
        for paragraph in prose(text)
        for sentence in re.split(r"(?<=[.!?:])\s+", paragraph)
    ]
    return [len(words) for words in sentences if len(words) > 1]


@pytest.mark.parametrize("page", sorted(set(PAGES) - UNEDITED), ids=str)
def test_no_page_has_words_that_users_need_not_learn(page):
    text = (ROOT / page).read_text()
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), flags=re.MULTILINE)
    text = " ".join(headings + prose(text)).lower()
    assert [x for x in PHRASES if re.search(rf"\b{re.escape(x)}", text)] == []


@pytest.mark.parametrize("page", SHORT, ids=str)
def test_sentences_are_short(page):
    lengths = sentence_lengths((ROOT / page).read_text())
    assert sum(lengths) / max(len(lengths), 1) < LONGEST_MEAN


def test_prose_is_told_from_code():
    text = (
        "# T\n\nOne `a b` three. Two words:\n\n```python\nno = 1\n```\n\n* [a b](c) d\n"
    )
    assert prose(text) == ["One CODE three. Two words:", "a b d"]
    assert sentence_lengths(text) == [3, 2, 3]


# Links --------------------------------------------------------------------------------


def anchors(path):
    """Return the anchors that MyST makes of a page's headings."""
    headings = re.findall(
        r"^#+ (.*)$", BLOCK.sub("", path.read_text()), flags=re.MULTILINE
    )
    kept = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def broken(target, page):
    """Return what is wrong with a link of a page: "" if nothing."""
    if target.startswith("http"):
        good = re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./%#?=&+~-]*)?", target)
        return "" if good else f"{target}: not a https address"
    name, _, anchor = target.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    if "gallery" in path.parts:
        stem = re.sub(r"sphx_glr_|_\d+$", "", path.with_suffix("").name)
        found = stem == "index" or (ROOT / "examples" / f"{stem}.py").exists()
        return "" if found else f"{target}: no such example"
    if not path.exists():
        return f"{target}: no such file"
    if anchor and anchor not in anchors(path):
        return f"{target}: no such heading"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = [link["target"] for link in LINK.finditer(BLOCK.sub("", text))]
    targets += re.findall(
        r"^[`:]{3,}\{(?:figure|literalinclude)\} (\S+)", text, re.MULTILINE
    )
    for target in re.findall(r"^:link: (\S+)$", text, re.MULTILINE):
        targets.append(target if target.startswith("gallery") else f"{target}.md")
    assert [report for x in targets if (report := broken(x, page))] == []


def test_a_broken_link_is_seen():
    page = Path("docs/start.md")
    assert broken("https://docs.jax.dev", page) == ""
    assert broken("doors/pod.md", page) == ""
    assert broken("gallery/plot_noise", page) == ""
    assert "heading" in broken("doors/pod.md#nowhere", page)
    assert "file" in broken("nowhere.md", page)
    assert "example" in broken("gallery/plot_nothing", page)
    assert "https" in broken("http://docs.jax.dev", page)


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        text = (ROOT / page).read_text()
        for entries in re.findall(
            r"^```\{toctree\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
        ):
            names = [line for line in entries.split() if not line.startswith(":")]
            listed |= {((ROOT / page).parent / f"{x}.md").resolve() for x in names}
    pages = {ROOT / page for page in PAGES if page.parts[0] == "docs"}
    tables = {path for path in pages if path.parent.name == "tables"}
    assert pages - tables - listed == {DOCS / "index.md"}

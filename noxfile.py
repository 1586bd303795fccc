"""The project's chores, each in an environment of its own: ``nox -l`` lists them."""

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "typing", "tests", "doctests"]
# An absent interpreter skips its sessions, with a line that says so, on CI as well.
nox.options.error_on_missing_interpreters = False

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
FLOORS = ["jax==0.10.0", "jaxlib==0.10.0", "optax==0.2.8"]
NEWEST = ["jax", "jaxlib", "optax"]
# pip offers Python 3.11 no jax above 0.10.2, so the newest needs a newer Python.
PAIRS = [
    nox.param("3.11", FLOORS, id="py3.11-jax0.10.0"),
    nox.param("3.11", ["jax==0.10.2", "jaxlib==0.10.2"], id="py3.11-jax0.10.2"),
    nox.param("3.12", ["jax==0.11.2", "jaxlib==0.11.2"], id="py3.12-jax0.11.2"),
    nox.param("3.12", NEWEST, id="py3.12-newest"),
    nox.param("3.13", NEWEST, id="py3.13-newest"),
]
EVIDENCE = ["gradient_noise", "adaptive_clipping", "fine_tuning", "precision"]
LINES, BRANCHES = 99.0, 97.0
# A worker keeps the tests of a file together, which share what they compile.
IN_TWO = ("-n", "2", "--dist", "worksteal")


def pyenv_folders() -> list[str]:
    """Return where pyenv keeps the Pythons that are supported, newest first.

    Its shims stand on the PATH for every version, but run only the active ones.
    """
    if shutil.which("pyenv") is None:
        return []
    root = subprocess.run(["pyenv", "root"], capture_output=True, text=True).stdout
    versions = [
        [int(part) for part in folder.name.split(".")]
        for python in PYTHONS
        for folder in Path(root.strip(), "versions").glob(f"{python}.*")
        if folder.name.replace(".", "").isdigit()
    ]
    return [
        str(Path(root.strip(), "versions", ".".join(map(str, version)), "bin"))
        for version in sorted(versions, reverse=True)
    ]


os.environ["PATH"] = os.pathsep.join([*pyenv_folders(), os.environ["PATH"]])
NEWEST_PYTHON = next((p for p in PYTHONS[::-1] if shutil.which(f"python{p}")), "3.13")

SMOKE = """
import sys
import jax.numpy as jnp
import optloss

def loss(params, x):
    return jnp.mean((params["w"] * x - 1.0) ** 2)

train_op = optloss.optimize_loss(
    loss, global_step=0, learning_rate=0.1, optimizer="Adam", clip_gradients=1.0
)
state = train_op.init({"w": jnp.zeros(3)})
for _ in range(200):
    state, output = train_op(state, jnp.ones(3))
assert output.loss < 1e-3, output.loss
assert int(state.step) == 200, state.step
strangers = {"flax", "equinox", "tensorboardX", "orbax", "pytest"} & set(sys.modules)
assert not strangers, strangers
print("smoke test passed:", optloss.__file__)
"""


def groups(*names: str) -> list[str]:
    """Return the requirements of pyproject's dependency groups ``names``."""
    return list(nox.project.dependency_groups(PROJECT, *names))


@nox.session
def lint(session: nox.Session) -> None:
    """Check the layout and the style."""
    session.install(*groups("lint"))
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types, by mypy and by pyright."""
    session.install("-e", ".", *groups("typing"))
    session.run("mypy", *session.posargs)
    session.run("pyright", *session.posargs)
    session.run("pytest", "tests/test_typing.py")


@nox.session
@nox.parametrize("python, versions", PAIRS)
def tests(session: nox.Session, versions: list[str]) -> None:
    """Run the suite, wide tests too, on each pair of a Python and a JAX promised."""
    session.install("--upgrade", "-e", ".", *groups("test"), *versions)
    session.run("python", ".ci/versions.py")
    session.run("pytest", *IN_TWO, "-m", "not soak", *session.posargs)


@nox.session
def wide(session: nox.Session) -> None:
    """Run what the suite leaves out for its length: tables of many like cases."""
    session.install("-e", ".", *groups("test"))
    session.run("pytest", *IN_TWO, "-m", "wide", *session.posargs)


@nox.session
def doctests(session: nox.Session) -> None:
    """Run every ``>>>`` of the docstrings, the README and the docs."""
    session.install("-e", ".", *groups("test"))
    pages = "tests/test_documents.py"
    session.run(
        "pytest", "--doctest-modules", "-m", "not soak", "src", pages, *session.posargs
    )


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site, with every warning an error."""
    session.install("-e", ".", *groups("docs"))
    session.run(
        "sphinx-build", "-n", "-W", "--keep-going", "docs", "docs/_build/html",
        *session.posargs,
    )  # fmt: skip


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks: all, or those given behind ``--``."""
    session.install("-e", ".", *groups("bench"))
    for script in session.posargs or sorted(Path("benchmarks").glob("bench_*.py")):
        session.run("python", str(script))


@nox.session
def evidence(session: nox.Session) -> None:
    """Train what docs/evidence.md reports: all, or the scripts named after ``--``."""
    session.install("-e", ".", *groups("evidence"))
    scripts = Path("benchmarks", "evidence")
    flags = [word for word in session.posargs if word.startswith("-")]
    names = [word for word in session.posargs if word not in flags]
    for name in names or EVIDENCE:
        session.run("python", str(scripts / f"{name}.py"), *flags)


@nox.session
def coverage(session: nox.Session) -> None:
    """Hold the shares of lines and branches of ``src`` that the tests reach."""
    session.install("-e", ".", *groups("test"))
    report = Path(session.create_tmp(), "coverage.json")
    session.run(
        "pytest", *IN_TWO, "-m", "not soak", "--cov", "--cov-report=term-missing",
        f"--cov-report=json:{report}", *session.posargs,
    )  # fmt: skip
    totals = json.loads(report.read_text())["totals"]
    lines = 100 * (1 - totals["missing_lines"] / totals["num_statements"])
    branches = 100 * (1 - totals["missing_branches"] / max(totals["num_branches"], 1))
    print(
        f"lines {lines:.1f} % (>= {LINES}), branches {branches:.1f} % (>= {BRANCHES})"
    )
    if lines < LINES or branches < BRANCHES:
        session.error("the tests reach too little of src")


@nox.session
@nox.parametrize(
    "python, versions",
    [
        nox.param("3.11", FLOORS, id="oldest"),
        nox.param(NEWEST_PYTHON, NEWEST, id="newest"),
    ],
)
def wheel(session: nox.Session, versions: list[str]) -> None:
    """Build the sdist and from it the wheel; use the wheel with jax and optax alone."""
    place = Path(session.create_tmp()).resolve()
    dist = place / "dist"
    for old in dist.glob("*"):
        old.unlink()
    session.run("python", "-m", "venv", str(place / "builder"))
    python = str(place / "builder" / "bin" / "python")
    session.run(python, "-m", "pip", "install", "-q", "build", external=True)
    session.run(python, "-m", "build", "-o", str(dist), external=True)
    (built,) = dist.glob("*.whl")
    names = zipfile.ZipFile(built).namelist()
    if odd := [n for n in names if not n.startswith(("optloss/", "optloss-"))]:
        session.error(f"the wheel holds more than the package: {odd}")
    session.install(str(built), *versions)
    session.run("python", ".ci/versions.py")
    with session.chdir(place):
        session.run("python", "-I", "-W", "error", "-c", SMOKE)


@nox.session
def soak(session: nox.Session) -> None:
    """Run the long tests, which the suite leaves out."""
    session.install("-e", ".", *groups("test"))
    session.run("pytest", "-m", "soak", *session.posargs)


@nox.session(python="3.11")
def targets(session: nox.Session) -> None:
    """Compile the steps for an H100 and for TPUs: all, or those given behind ``--``."""
    compilers = [
        f"{name}==0.10.2"
        for name in ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt")
    ]
    session.install("-e", ".", *groups("bench"), *compilers, "libtpu==0.0.52")
    session.run("python", "benchmarks/targets.py", *session.posargs)

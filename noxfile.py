"""Every task of this repository; ``nox -l`` lists them.

Papers are discovered: a folder in ``packages/`` with a ``pyproject.toml`` takes part everywhere.
"""

import json
import os
import re
import shlex
import shutil
import time
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nox
from nox.command import CommandFailed

# Sessions start Python hundreds of times; without byte code kept, each start compiles torch anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "imports", "tests", "contract"]

ROOT = Path(__file__).parent
SHARED = Path("shared")
PACKAGES = sorted(file.parent.relative_to(ROOT) for file in ROOT.glob("packages/*/pyproject.toml"))
PROJECTS = [SHARED, *PACKAGES]

TORCH = "torch==2.13.0"
BENCH = ["x-transformers"]
BUILD = ["build", "hatchling"]
CONTRACT = ["pytest", "pyyaml"]
# Later releases of soupsieve refuse Python before 3.11.5, which Debian 12 has.
DOCS = ["sphinx", "myst-parser", "furo", "pyyaml", "soupsieve<3.0.2"]
IMPORTS = ["import-linter", "deptry"]
LINT = ["ruff", "codespell", "cffconvert"]
TYPES = ["mypy", "types-pyyaml", "nox"]
PARALLEL = ["pytest-xdist"]

# One worker for each core, each with one thread; idle workers take tests of busy ones.
WORKERS = ["-n", "auto", "--dist", "worksteal"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def metadata(project: Path) -> dict[str, Any]:
    """The ``pyproject.toml`` of ``project``."""
    return tomllib.loads((ROOT / project / "pyproject.toml").read_text(encoding="utf-8"))


def module(project: Path) -> str:
    """Import name of ``project``."""
    return str(metadata(project)["project"]["name"]).replace("-", "_")


def extras(project: Path) -> list[str]:
    """Extras of ``project``."""
    return list(metadata(project)["project"].get("optional-dependencies", {}))


def without_dependencies(project: Path) -> list[str]:
    """Packages whose files the sample of ``project`` reads; nothing of them is imported."""
    return list(metadata(project)["tool"]["separata"].get("without-dependencies", []))


def requirement(project: Path, wanted: Iterable[str]) -> str:
    """``project`` as pip takes it, with those of the ``wanted`` extras that it has."""
    chosen = [extra for extra in wanted if extra in extras(project)]
    return f"./{project.as_posix()}[{','.join(chosen)}]"


def everything() -> list[str]:
    """All projects with all their extras, except that ``triton`` takes 700 MB for few tests."""
    return [
        requirement(project, (extra for extra in extras(project) if extra != "triton"))
        for project in PROJECTS
    ]


def install(session: nox.Session, *requirements: str, silent: bool = True) -> None:
    """Install the reference versions; compiling torch to bytecode takes longer than it saves."""
    session.install("--no-compile", "-c", "constraints.txt", *requirements, silent=silent)


def run_all(session: nox.Session, commands: Iterable[Sequence[str]], **options: Any) -> None:
    """Run every command, whatever the earlier ones did, and fail at the end if any failed."""
    failed = []
    for command in commands:
        try:
            session.run(*command, **options)
        except CommandFailed:
            failed.append(shlex.join(command)[:60])
    if failed:
        session.error("failed: " + "; ".join(failed))


@nox.session
@nox.parametrize("folder", [nox.param(str(project), id=project.name) for project in PROJECTS])
def tests(session: nox.Session, folder: str) -> None:
    """Test shared, or one paper with nothing but shared beside it."""
    project = Path(folder)  # a parameter must be text: `nox --report` writes it as JSON
    if project == SHARED:
        install(session, requirement(SHARED, extras(SHARED)), *PARALLEL)
    else:
        install(session, "./shared", requirement(project, ["test"]), *PARALLEL)
    try:
        session.run("pytest", *WORKERS, f"{project}/tests", *session.posargs, env=ONE_THREAD)
    finally:
        # Eleven environments of a gigabyte each are too much for a laptop; `nox -r` keeps them.
        if not getattr(session.virtualenv, "reuse_existing", True):
            shutil.rmtree(session.virtualenv.location, ignore_errors=True)


@nox.session
def unit(session: nox.Session) -> None:
    """Run all tests in parallel in one environment with everything: for daily work, with ``-r``."""
    editable = [argument for item in everything() for argument in ("-e", item)]
    install(session, *editable, *CONTRACT, *PARALLEL)
    # One run for each folder, because equal names of test files and fixtures may mean other things.
    folders = [*(f"{project}/tests" for project in PROJECTS), "tests"]
    commands = [["pytest", *WORKERS, folder, *session.posargs] for folder in folders]
    run_all(session, commands, env=ONE_THREAD)


@nox.session
def contract(session: nox.Session) -> None:
    """Check the rules about the repository itself."""
    install(session, *everything(), *CONTRACT, *PARALLEL)
    session.run("pytest", *WORKERS, "tests", *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Check format, style, spelling, docstrings and CITATION files."""
    install(session, *LINT)
    listed = str(session.run("git", "ls-files", external=True, silent=True, log=False))
    texts = [name for name in listed.splitlines() if not name.endswith((".npz", ".csv", ".json"))]
    citations = [name for name in texts if name.endswith("CITATION.cff")]
    commands = [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["codespell", *texts],
        *(["cffconvert", "--validate", "-i", name] for name in citations),
    ]
    run_all(session, commands)


@nox.session
def types(session: nox.Session) -> None:
    """Check types strictly, package by package."""
    install(session, *everything(), *TYPES)
    targets = [[f"{project}/src"] for project in PROJECTS]
    targets.append(["noxfile.py", "docs/kernel_figures.py", "docs/results_tables.py"])
    run_all(session, [["mypy", *target] for target in targets])


@nox.session
def imports(session: nox.Session) -> None:
    """Check who imports whom, and that what is imported is declared."""
    install(session, *IMPORTS)
    template = (ROOT / "tests" / "import-contracts.ini").read_text(encoding="utf-8")
    packages = "\n    ".join(module(project) for project in PACKAGES)
    contracts = Path(session.create_tmp()) / "import-contracts.ini"
    contracts.write_text(template.replace("{packages}", packages), encoding="utf-8")
    sources = os.pathsep.join(str(ROOT / project / "src") for project in PROJECTS)
    check = ["lint-imports", "--no-cache", "--no-logo", "--config", str(contracts)]
    commands = [check]
    for project in PROJECTS:
        toml = f"{project}/pyproject.toml"
        commands.append(["deptry", f"{project}/src", "--config", toml])
    run_all(session, commands, env={"PYTHONPATH": sources})


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site with warnings as errors and run its examples; ``-- linkcheck`` for links."""
    install(session, *everything(), *DOCS)
    command = ["sphinx-build", "-q", "--fail-on-warning", "--keep-going", "docs"]
    builders = session.posargs or ["html", "doctest"]
    run_all(session, [[*command, "-b", name, f"docs/_build/{name}"] for name in builders])
    session.log("the site begins at docs/_build/html/index.html")


@nox.session
def build(session: nox.Session) -> None:
    """Build all wheels and sdists, check what they hold, install them and run one tiny step."""
    install(session, *BUILD, *CONTRACT)
    shutil.rmtree("dist", ignore_errors=True)
    for project in PROJECTS:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", str(project))
    session.run("pytest", "tests/check_distributions.py")

    fresh = (Path(session.create_tmp()) / "fresh").absolute()
    shutil.rmtree(fresh, ignore_errors=True)
    session.run("python", "-m", "venv", str(fresh))
    python = str(fresh / "bin" / "python")
    wheels = [str(wheel) for wheel in sorted(Path("dist").glob("*.whl"))]
    pip = [python, "-m", "pip", "install", "-q", "--no-compile", "-c", "constraints.txt"]
    session.run(*pip, *wheels, external=True)
    for project in PACKAGES:
        folder = Path(session.create_tmp()) / project.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with session.chdir(folder):
            command = [python, "-m", module(project)]
            session.run(*command, "--help", external=True, silent=True)
            session.run(*command, "train", "--train.steps", "1", external=True, env=ONE_THREAD)
    shutil.rmtree(fresh)


@nox.session
def demo(session: nox.Session) -> None:
    """Train, evaluate and generate on real data, every paper; print one table, write pictures."""
    packages = [requirement(project, ["sample", "plot"]) for project in PACKAGES]
    install(session, "./shared", *packages, silent=False)
    bare = [name for project in PACKAGES for name in without_dependencies(project)]
    if bare:
        install(session, "--no-deps", *bare)
    rows = [demonstrate(session, project) for project in PACKAGES]
    titles = ("paper", "metric", "value", "compared with", "its value", "seconds", "picture")
    print("\n" + aligned([titles, *rows]) + "\n")
    if any("FAILED" in row for row in rows):
        session.error("the messages of the failed commands are above the table")


def demonstrate(session: nox.Session, project: Path) -> tuple[str, ...]:
    """Run a paper's demo in ``demo/<name>``, as ``[tool.separata.demo]`` of its metadata says.

    ``commands`` run in order in that folder; ``value`` and ``baseline_value`` say where the numbers
    stand afterwards, as ``file.json:dotted.key``; ``picture`` is a file that the commands write.
    """
    demo = metadata(project)["tool"]["separata"]["demo"]
    folder = ROOT / "demo" / project.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    try:
        with session.chdir(folder):
            for command in demo["commands"]:
                session.run(*shlex.split(command))
        value, baseline = (number(folder, demo[key]) for key in ("value", "baseline_value"))
        picture = (folder / demo["picture"]).relative_to(ROOT)
        if not picture.exists():
            raise FileNotFoundError(f"{picture} was not written")
    except (CommandFailed, OSError, LookupError, ValueError) as error:
        session.warn(f"{project.name}: {error}")
        value, baseline, picture = "FAILED", "", Path()
    seconds = f"{time.monotonic() - start:.0f}"
    metric, against = demo["metric"], demo["baseline"]
    return project.name, metric, value, against, baseline, seconds, str(picture)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines with columns of equal width; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def number(folder: Path, place: str) -> str:
    """The number at ``file.json:dotted.key``, with two decimals."""
    file, _, key = place.partition(":")
    value = json.loads((folder / file).read_text(encoding="utf-8"))
    for part in key.split("."):
        value = value[part]
    return f"{float(value):.2f}"


@nox.session
def bench(session: nox.Session) -> None:
    """Time the operations, after their parity; ``-- attention --threads 2`` for one."""
    install(session, *everything(), *BENCH)
    name, *options = session.posargs or ["[a-z]*"]  # an underscore begins the names of helpers
    scripts = sorted(
        str(file) for project in PROJECTS for file in project.glob(f"benchmarks/{name}.py")
    )
    run_all(session, [["python", script, *options] for script in scripts])


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Run GPU tests, benchmarks and tiny training from the source tree with what is installed."""
    session.run("python3", "tests/gpu.py", *session.posargs)


@nox.session
def results(session: nox.Session) -> None:
    """Write the tables of the READMEs and of the site from every results.yaml."""
    install(session, "pyyaml")
    session.run("python", "docs/results_tables.py", *session.posargs)


@nox.session
def lock(session: nox.Session) -> None:
    """Rewrite constraints.txt from a clean install of everything that any session installs."""
    tools = {*BENCH, *BUILD, *CONTRACT, *DOCS, *IMPORTS, *LINT, *TYPES, *PARALLEL}
    triton = requirement(SHARED, ["triton"])
    session.install("--no-compile", TORCH, *everything(), triton, *sorted(tools))
    frozen = str(session.run("python", "-m", "pip", "freeze", silent=True)).splitlines()
    # Our own packages come from paths; a local suffix such as +cpu depends on the machine.
    pins = [re.sub(r"\+.*", "", line) for line in frozen if "==" in line and "@" not in line]
    heading = "# The reference environment. `nox -s lock` writes this file.\n"
    (ROOT / "constraints.txt").write_text(heading + "\n".join(pins) + "\n", encoding="utf-8")


@nox.session
def release(session: nox.Session) -> None:
    """Check one package, named after ``--``, and print its tag and identifiers."""
    project = next((item for item in PROJECTS if [item.name] == session.posargs), None)
    if project is None:
        session.error("name one of: " + ", ".join(item.name for item in PROJECTS))
    install(session, *CONTRACT)
    checks = ["tests/test_metadata.py", "tests/test_results.py", "-k", project.name]
    session.run("pytest", "-q", *checks)

    def git(*arguments: str) -> str:
        return str(session.run("git", *arguments, external=True, silent=True, log=False)).strip()

    if git("status", "--porcelain", "--", str(project)):
        session.error(f"{project} holds changes that are not committed")
    tree, commit = git("rev-parse", f"HEAD:{project.as_posix()}"), git("rev-parse", "HEAD")
    tag = f"{project.name}-v{metadata(project)['project']['version']}"
    print(f"tag        {tag}")
    print(f"directory  swh:1:dir:{tree};anchor=swh:1:rev:{commit};path=/{project.as_posix()}")
    session.run("python", "docs/results_tables.py", "--ids", project.name)
    print(f"to release: git tag -a {tag} -m {tag} && git push origin {tag}")

"""Rules about the repository as a whole."""

import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LIGHTEST = 16  # distributions beyond torch's own
TOP_LEVEL = {"packages", "shared", "tests", "docs", ".ci", ".github"}
# Written so that this file does not match itself.
FOREIGN = re.compile(
    r"/(work|farm|root|mnt)/|/home/[a-z]|/Users/[A-Z]|\.\./shared/(specs|goldens|data|design)"
    r"|pypi\.[o]rg|pytorch\.[o]rg/whl|--(extra-)?index[-]url|--find[-]links"
)


def test_no_file_names_a_machine_or_a_registry(tracked, root):
    found = []
    for path in tracked:
        if path.suffix in (".npz", ".png"):
            continue
        for number, line in enumerate((root / path).read_text("utf-8").splitlines(), start=1):
            if FOREIGN.search(line):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    assert not found


def test_the_top_level_is_fixed(tracked):
    assert {path.parts[0] for path in tracked if len(path.parts) > 1} <= TOP_LEVEL


def test_files_are_small(tracked, root):
    assert not [path for path in tracked if (root / path).stat().st_size > 1_000_000]


def test_workflows_of_projects_differ_in_nothing_but_the_name(projects, root):
    workflows = root / ".github" / "workflows"
    shared = (workflows / "shared.yml").read_text(encoding="utf-8")
    for project in projects:
        text = (workflows / f"{project.name}.yml").read_text(encoding="utf-8")
        # A paper is tested anew when shared changes; shared has no such line beside its own.
        lines = [line for line in text.splitlines() if f"packages/{project.name}/**" not in line]
        assert "\n".join(lines).replace(project.name, "shared") == shared.strip("\n")


def test_the_reference_torch_has_no_local_suffix(root):
    pins = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in pins
    assert not [pin for pin in pins if "+" in pin or "@" in pin]


def closure(requirement):
    """Names of all distributions that installing ``requirement`` brings, itself included."""
    waiting, found = [Requirement(requirement)], set()
    while waiting:
        item = waiting.pop()
        name = canonicalize_name(item.name)
        extras = tuple(sorted(item.extras))
        if (name, extras) in found:
            continue
        found.add((name, extras))
        try:
            wanted = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
        for one in wanted:
            if any(not one.marker or one.marker.evaluate({"extra": e}) for e in (extras or ("",))):
                waiting.append(one)
    return {name for name, _ in found}


def test_the_lightest_install_stays_light(package):
    brought = closure(package.distribution) - closure("torch")
    assert len(brought) <= LIGHTEST, sorted(brought)


def test_ci_runs_every_session_that_a_change_must_pass(root):
    script = (root / ".ci" / "run").read_text(encoding="utf-8")
    called = re.findall(r"^check ([\w ]+?)(?: #.*)?$", script, re.MULTILINE)
    assert called == ["lint", "types", "imports", "tests contract", "docs", "build"]


def test_nothing_that_git_ignores_is_held(root):
    listed = subprocess.run(
        ["git", "ls-files", "-ci", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout == ""


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "CITATION.cff", ".pre-commit-config.yaml"]
)
def test_the_root_has_the_files_of_a_published_repository(root, name):
    assert (root / name).is_file()

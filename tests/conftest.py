"""What the contracts look at: the repository, its projects and their configurations."""

import ast
import subprocess
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Project:
    """One distribution of the repository: shared, or a paper's package."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def distribution(self) -> str:
        return f"separata-{self.name}"

    @property
    def module(self) -> str:
        return self.distribution.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.path / "src" / self.module

    @property
    def configs(self) -> list[Path]:
        return sorted(self.source.glob("configs/*.yaml"))

    @cached_property
    def metadata(self) -> dict[str, Any]:
        return tomllib.loads(self.text("pyproject.toml"))

    @cached_property
    def trees(self) -> dict[Path, ast.Module]:
        """The syntax tree of every source file, by its path inside the package."""
        return {
            file.relative_to(self.source): ast.parse(file.read_text(encoding="utf-8"))
            for file in sorted(self.source.rglob("*.py"))
        }

    def text(self, name: str) -> str:
        return (self.path / name).read_text(encoding="utf-8")


SHARED = Project(ROOT / "shared")
PACKAGES = [Project(file.parent) for file in sorted(ROOT.glob("packages/*/pyproject.toml"))]
PROJECTS = [SHARED, *PACKAGES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``project``: shared or a paper; ``package``: a paper; ``config``: a paper and its YAML."""
    if "project" in metafunc.fixturenames:
        metafunc.parametrize("project", PROJECTS, ids=lambda project: project.name)
    if "package" in metafunc.fixturenames:
        metafunc.parametrize("package", PACKAGES, ids=lambda package: package.name)
    if "config" in metafunc.fixturenames:
        pairs = [(package, file) for package in PACKAGES for file in package.configs]
        names = [f"{package.name}-{file.stem}" for package, file in pairs]
        metafunc.parametrize("config", pairs, ids=names)


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def shared() -> Project:
    return SHARED


@pytest.fixture
def packages() -> list[Project]:
    return PACKAGES


@pytest.fixture
def projects() -> list[Project]:
    return PROJECTS


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every file that git holds, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]

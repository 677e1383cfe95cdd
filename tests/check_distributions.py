"""What the wheels and sdists in ``dist/`` hold; ``nox -s build`` makes them and runs this."""

import tarfile
import zipfile
from email.parser import Parser

import pytest


@pytest.fixture
def wheel(project, root):
    version = project.metadata["project"]["version"]
    return zipfile.ZipFile(root / "dist" / f"{project.module}-{version}-py3-none-any.whl")


def test_wheel_holds_the_source_and_nothing_else(project, wheel):
    version = project.metadata["project"]["version"]
    info = f"{project.module}-{version}.dist-info/"
    inside = {name for name in wheel.namelist() if not name.startswith(info)}
    source = {
        str(file.relative_to(project.source.parent))
        for file in project.source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert inside == source
    assert f"{project.module}/py.typed" in inside


def test_wheel_is_pure_and_small(wheel):
    assert sum(item.compress_size for item in wheel.infolist()) < 500_000


def test_wheel_carries_licence_readme_and_version(project, wheel):
    version = project.metadata["project"]["version"]
    info = f"{project.module}-{version}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode("utf-8"))
    assert metadata["Name"] == project.distribution
    assert metadata["Version"] == version
    assert metadata.get_payload().startswith("# ")
    assert wheel.read(f"{info}/licenses/LICENSE").decode("utf-8") == project.text("LICENSE")


def test_sdist_can_be_built_and_tested_alone(project, root):
    name = f"{project.module}-{project.metadata['project']['version']}"
    with tarfile.open(root / "dist" / f"{name}.tar.gz") as archive:
        inside = set(archive.getnames())
    for file in ("pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"):
        assert f"{name}/{file}" in inside
    assert any(path.startswith(f"{name}/tests/") for path in inside)
    assert not [path for path in inside if "/runs/" in path or "__pycache__" in path]

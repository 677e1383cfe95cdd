"""Version, changelog and citation say the same; the dependencies are what they should be."""

import re

import yaml


def test_version_is_the_same_everywhere(project):
    version = project.metadata["project"]["version"]
    entries = re.findall(r"^## (\S+)", project.text("CHANGELOG.md"), re.MULTILINE)
    assert entries[0] == version
    assert str(yaml.safe_load(project.text("CITATION.cff"))["version"]) == version
    numbers = [tuple(map(int, entry.split("."))) for entry in entries]
    assert numbers == sorted(numbers, reverse=True)


def test_changelog_uses_the_four_headings(project):
    headings = set(re.findall(r"^### (.+)$", project.text("CHANGELOG.md"), re.MULTILINE))
    assert headings <= {"Added", "Changed", "Fixed", "Numbers"}


def test_version_is_written_once(project):
    version = project.metadata["project"]["version"]
    literal = re.compile(rf"""__version__ *= *["']{re.escape(version)}["']""")
    assert not [f for f in project.source.rglob("*.py") if literal.search(f.read_text("utf-8"))]


def test_paper_is_cited_with_the_software(package):
    citation = yaml.safe_load(package.text("CITATION.cff"))
    assert citation["title"].startswith(package.distribution)
    assert citation["references"]


def test_range_of_shared_admits_this_shared_and_ends_before_the_next_major(package, shared):
    dependencies = package.metadata["project"]["dependencies"]
    (ours,) = [item for item in dependencies if item.startswith(shared.distribution)]
    version = [int(part) for part in shared.metadata["project"]["version"].split(".")]
    low, high = re.search(r">=(\d+\.\d+),<(\d+)$", ours).groups()
    assert [int(part) for part in low.split(".")] <= version[:2]
    assert int(high) == version[0] + 1


def test_no_paper_depends_on_another(package, packages):
    others = {other.distribution for other in packages} - {package.distribution}
    extras = package.metadata["project"].get("optional-dependencies", {}).values()
    wanted = [*package.metadata["project"]["dependencies"], *(item for e in extras for item in e)]
    names = {re.match(r"[\w.-]+", item)[0].replace("_", "-").lower() for item in wanted}
    assert not names & others


def test_python_and_licence_are_the_same_everywhere(project, root):
    metadata = project.metadata["project"]
    assert metadata["requires-python"] == ">=3.11"
    assert metadata["license"] == "MIT"
    assert project.text("LICENSE") == (root / "LICENSE").read_text(encoding="utf-8")

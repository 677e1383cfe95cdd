"""What the READMEs tell a reader to type works, and the table of papers is right."""

import os
import re
import subprocess
import sys
from pathlib import Path

SECTION = r"^## {}\n(.*?)(?=^## |\Z)"


def blocks(readme: str, section: str, language: str) -> list[str]:
    """The code blocks of a section."""
    (body,) = re.findall(SECTION.format(section), readme, flags=re.DOTALL | re.MULTILINE)
    return re.findall(rf"^```{language}\n(.*?)^```", body, flags=re.DOTALL | re.MULTILINE)


def run(command: list[str], folder: Path) -> None:
    """Run a command in ``folder`` with the commands of this environment first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, input=""
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_first_block_of_commands_runs(package, tmp_path):
    script = blocks(package.text("README.md"), "Commands", "bash")[0]
    for verb in ("train", "evaluate"):
        assert re.search(rf"^{package.distribution} {verb}\b", script, re.MULTILINE)
    run(["bash", "-euo", "pipefail", "-c", script], tmp_path)


def test_the_further_commands_name_configurations_that_exist(package):
    names = {file.stem for file in package.configs}
    readme = package.text("README.md")
    named = {name for name in re.findall(r"--config[ =]([\w./]+)", readme) if "/" not in name}
    assert named <= names


def test_the_python_example_runs(package, tmp_path):
    (example,) = blocks(package.text("README.md"), "Use", "python")
    run([sys.executable, "-c", example], tmp_path)


def test_the_example_of_shared_runs(shared, tmp_path):
    (example,) = re.findall(r"^```python\n(.*?)^```", shared.text("README.md"), re.M | re.S)
    run([sys.executable, "-c", example], tmp_path)


def test_the_table_of_papers_agrees_with_the_folders(root, packages):
    readme = (root / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\|.*`packages/([\w-]+)`.*\| (\w+) \|$", readme, re.MULTILINE))
    assert set(rows.values()) <= {"available", "planned"}
    available = {name for name, status in rows.items() if status == "available"}
    assert available == {package.name for package in packages}


def test_the_two_commands_name_sessions_that_exist(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    noxfile = (root / "noxfile.py").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m venv \.venv .*nox -s ([\w ]+)$", readme, re.MULTILINE)
    assert commands == ["demo", "tests contract"]
    for session in " ".join(commands).split():
        assert re.search(rf"^def {session}\(session", noxfile, re.MULTILINE)


def test_the_site_has_a_page_for_every_paper(root, packages):
    index = (root / "docs" / "papers" / "index.md").read_text(encoding="utf-8")
    for package in packages:
        assert re.search(rf"^{package.name}$", index, re.MULTILINE)
        page = (root / "docs" / "papers" / f"{package.name}.md").read_text(encoding="utf-8")
        assert f"packages/{package.name}/README.md" in page

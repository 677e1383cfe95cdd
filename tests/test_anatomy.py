"""Every paper's folder has the same anatomy."""

import ast
import re

FILES = [
    "README.md", "pyproject.toml", "CHANGELOG.md", "CITATION.cff", "LICENSE", "results.yaml",
    "tests/test_model.py", "tests/test_data.py", "tests/test_train.py", "tests/test_commands.py",
    "tests/test_paper.py",
]  # fmt: skip
SOURCES = [
    "__init__.py", "__main__.py", "py.typed", "config.py", "model.py", "data.py", "train.py",
    "evaluate.py", "configs/tiny.yaml", "configs/sample.yaml",
]  # fmt: skip
HEADINGS = [
    "Paper card", "Install", "Use", "Commands", "Results", "Differences from the paper", "Files",
    "Cite",
]  # fmt: skip
CARD = ["title", "authors", "venue and year", "link", "authors' code", "task", "fidelity"]
FIDELITY = {"exact", "code", "paper", "reconstruction"}
MODEL_LINES = 350


def test_the_files_of_the_anatomy_are_there(package):
    missing = [name for name in FILES if not (package.path / name).is_file()]
    missing += [f"src/…/{name}" for name in SOURCES if not (package.source / name).is_file()]
    assert not missing


def test_goldens_come_with_a_readme_and_a_parity_test(package):
    goldens = package.path / "tests" / "goldens"
    if goldens.exists():
        assert (goldens / "README.md").is_file()
        assert (package.path / "tests" / "test_parity.py").is_file()


def test_no_file_is_kept_empty(project):
    empty = [
        file.relative_to(project.path)
        for file in project.path.rglob("*")
        if file.is_file() and file.stat().st_size == 0 and file.name != "py.typed"
    ]
    assert not [file for file in empty if not re.search(r"__pycache__|\.\w+_cache", str(file))]


def test_readme_has_the_nine_headings_in_order(package):
    readme = re.sub(r"```.*?```", "", package.text("README.md"), flags=re.DOTALL)
    headings = re.findall(r"^(#{1,2}) (.+)$", readme, flags=re.MULTILINE)
    assert headings[0][0] == "#"
    assert [title for _, title in headings[1:]] == HEADINGS
    title, sentence = readme.split("\n## ")[0].split("\n", 1)
    assert len(title) > 2
    assert sentence.strip()


def test_paper_card_is_complete_and_names_its_fidelity(package):
    card = dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", package.text("README.md"), re.MULTILINE))
    assert not [row for row in CARD if not card.get(row)]
    (fidelity,) = re.findall(r"`(\w+)`", card["fidelity"])[:1]
    assert fidelity in FIDELITY


def test_one_rule_gives_all_names(project):
    metadata = project.metadata["project"]
    assert metadata["name"] == project.distribution
    assert (project.path / "src").is_dir()
    assert [folder.name for folder in (project.path / "src").iterdir() if folder.is_dir()] == [
        project.module
    ]
    assert (project.source / "py.typed").is_file()


def test_command_has_the_name_of_the_distribution(package):
    entry = f"{package.module}.__main__:main"
    assert package.metadata["project"]["scripts"] == {package.distribution: entry}


def test_demo_is_described(package):
    demo = package.metadata["tool"]["separata"]["demo"]
    texts = {"metric", "value", "baseline", "baseline_value", "picture"}
    assert set(demo) == texts | {"commands"}
    assert demo["commands"]
    assert all(command.startswith(package.distribution + " ") for command in demo["commands"])


def test_model_can_be_held_in_the_head(package):
    lines = (package.source / "model.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MODEL_LINES


def test_no_class_argument_is_a_boolean(package):
    switches = []
    for klass in ast.walk(package.trees[next(p for p in package.trees if p.name == "model.py")]):
        if not isinstance(klass, ast.ClassDef):
            continue
        for member in klass.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                arguments = [*member.args.posonlyargs, *member.args.args, *member.args.kwonlyargs]
                fields = [(argument.arg, argument.annotation) for argument in arguments]
            elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                fields = [(member.target.id, member.annotation)]
            else:
                continue
            switches += [
                f"{klass.name}({name})"
                for name, annotation in fields
                if annotation is not None and re.search(r"\bbool\b", ast.unparse(annotation))
            ]
    assert not switches

"""Rules about the code of all projects together."""

import ast
import doctest
import importlib
import pkgutil
import warnings
from collections import defaultdict

import pytest

FILE_LINES = 500
KERNEL_LINES = 700
FUNCTION_LINES = 60
ARGUMENTS = 10
SHARED_LINES = 5800  # not blank, without kernels
SMALLEST_DUPLICATE = 40  # nodes of a syntax tree; below that, equal code is a coincidence


def functions(tree):
    """Every function of a module, nested ones and methods too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def without_docstring(function):
    """The body of a function without its docstring."""
    first = function.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.body[1:] if is_text and isinstance(first.value.value, str) else function.body


def shape(function):
    """What a function computes, whatever it is called: its arguments and body without docstring."""
    parts = [function.args, *without_docstring(function)]
    return "\n".join(ast.dump(part) for part in parts)


def mentioned(tree):
    """Names and attributes that stand in a piece of code."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def imported(project, module):
    """Names that a project imports from ``module``, or reads from a part of it that it imports."""
    found = set()
    for tree in project.trees.values():
        nodes = list(ast.walk(tree))
        statements = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        ours = [
            alias for node in statements if node.module.startswith(module) for alias in node.names
        ]
        local = {alias.asname or alias.name for alias in ours}
        found |= {alias.name for alias in ours}
        parts = [node for node in nodes if isinstance(node, ast.Attribute)]
        found |= {node.attr for node in parts if ast.unparse(node.value) in local}
    return found


def is_kernel(path):
    return path.parts[0] == "attention" and path.stem in ("blocked", "native", "triton")


def test_files_are_short(project):
    long = {}
    for path in project.trees:
        lines = len((project.source / path).read_text(encoding="utf-8").splitlines())
        if lines > (KERNEL_LINES if is_kernel(path) else FILE_LINES):
            long[str(path)] = lines
    for test in project.path.glob("tests/**/*.py"):
        lines = len(test.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            long[test.name] = lines
    assert not long


def test_functions_are_short(project):
    long = {}
    for path, tree in project.trees.items():
        for function in functions(tree) if not is_kernel(path) else []:
            body = without_docstring(function)
            lines = function.end_lineno - (body[0].lineno if body else function.lineno) + 1
            if lines > FUNCTION_LINES:
                long[f"{path}:{function.name}"] = lines
    assert not long


def test_constructors_take_few_arguments(project):
    wrong = []
    for path, tree in project.trees.items():
        for function in functions(tree):
            arguments = function.args.args[1:] + function.args.kwonlyargs
            if function.name == "__init__" and len(arguments) > ARGUMENTS:
                wrong.append(f"{path}:{function.lineno}")
    assert not wrong


def test_shared_stays_thin(shared):
    files = [shared.source / path for path in shared.trees if path.parts[0] != "attention"]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len([line for line in lines if line.strip()]) <= SHARED_LINES


def test_no_function_stands_in_two_projects(projects):
    places = defaultdict(set)
    for project in projects:
        for path, tree in project.trees.items():
            for function in functions(tree):
                if sum(1 for _ in ast.walk(function)) >= SMALLEST_DUPLICATE:
                    places[shape(function)].add((project.name, f"{path}:{function.name}"))
    twice = [sorted(found) for found in places.values() if len({name for name, _ in found}) > 1]
    assert not twice


def test_importing_shared_sets_nothing_global(shared):
    setters = {"manual_seed", "set_default_dtype", "set_default_device", "set_num_threads"}
    found = []
    for path, tree in shared.trees.items():
        for node in tree.body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                name = ast.unparse(node.value.func).split(".")[-1]
                if name in setters:
                    found.append(f"{path}: {name}")
    assert not found


def test_examples_in_docstrings_are_right(project):
    root = importlib.import_module(project.module)
    names = [info.name for info in pkgutil.walk_packages(root.__path__, project.module + ".")]
    for name in names:
        if name.split(".")[-1] in ("__main__", "triton", "triton_kernels"):
            continue
        failed, _ = doctest.testmod(importlib.import_module(name))
        assert not failed, name


class TestUsersOfShared:
    """A name stays in shared as long as two papers use it; blocks and kernels are excepted.

    A paper that is still planned may become a user of anything, so a name fails once its users and
    the planned papers together are fewer than two. Until then the names that wait are reported.
    """

    EXEMPT = ("attention", "nn", "testing", "cli.py", "files.py")

    @pytest.fixture
    def users(self, shared, packages):
        """How many papers use each public name, directly or through another name of shared."""
        mentions = defaultdict(set)
        public = {}
        for path, tree in shared.trees.items():
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    mentions[node.name] |= mentioned(node)
                    if not node.name.startswith("_") and path.parts[0] not in self.EXEMPT:
                        public[node.name] = 0
        for package in packages:
            waiting, reached = imported(package, shared.module), set()
            while waiting:
                name = waiting.pop()
                if name not in reached:
                    reached.add(name)
                    waiting |= mentions[name]
            for name in reached & public.keys():
                public[name] += 1
        return public

    def test_every_name_has_two_users_or_can_still_get_them(self, users, root):
        planned = (root / "README.md").read_text(encoding="utf-8").count("| planned |")
        lonely = sorted(name for name in users if users[name] < 2)
        if planned and lonely:
            text = f"{planned} papers are planned; fewer than two use: {', '.join(lonely)}"
            warnings.warn(text, stacklevel=1)
        assert not [name for name in lonely if users[name] + planned < 2]

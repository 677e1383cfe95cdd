"""Functions to commands: a signature is the interface, its docstring the help.

The only place that calls jsonargparse.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_parsing_settings

from separata_shared.files import read_text

Verb = Callable[..., object] | str
"""A function, or ``module:function`` to import it only when it is used.

It may also be a ``functools.partial`` that gives the first arguments, with a line of documentation
below it.
"""


def main(
    verbs: Mapping[str, Verb], *, package: str, arguments: Sequence[str] | None = None
) -> NoReturn:
    """Run the verb that the command line names, and exit.

    Exit status 0 is success, 2 wrong use (one line on stderr says what), 130 Ctrl-C and 143
    SIGTERM.

    Args:
        verbs: Functions by the name of their verb. Their parameters are groups of settings
            (dataclasses) and plain values; none may be called ``config``.
        package: Import name of the package, whose ``configs`` hold the shipped configurations.
        arguments: Command line without the program; that of the process by default.
    """
    program = package.replace("_", "-")
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    try:
        verb = argv[0] if argv else "--help"
        if verb not in verbs:
            _top_level(verbs, program).parse_args(argv or ["--help"])
        _run(verbs, verb, argv[1:], package)
    except KeyboardInterrupt as error:
        _say(f"{program}: {str(error) or 'interrupted'}")
        signum = getattr(error, "signum", None)
        if signum is not None:
            _leave_processes()
        sys.exit(128 + (signum or 2))
    except (ValueError, OSError, ArgumentError) as error:
        _say(f"{program}: error: {_one_line(error)}")
        sys.exit(2)
    sys.exit(0)


def to_yaml(groups: Mapping[str, Any]) -> str:
    """Dataclasses and plain values as YAML that ``--config`` reads back.

    Args:
        groups: Values by the name of their group.
    """
    parser = ArgumentParser()
    for name, value in groups.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return str(parser.dump(parser.get_defaults(), skip_unset=False))


def from_yaml(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """Read groups that ``to_yaml`` wrote, of a run directory for example.

    Args:
        path: The file.
        types: Type of each group wanted, by its name; other groups of the file are left alone.

    Raises:
        ValueError: The file is missing or not such a configuration; the message names it.
    """
    settings = _mapping(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    for name, type_ in types.items():
        if name not in settings:
            raise ValueError(f"{path}: lacks the group {name!r}")
        parser.add_argument(f"--{name}", type=type_)
    values = _parse(parser, {name: settings[name] for name in types}, [], path)
    return {name: values[name] for name in types}


def _run(verbs: Mapping[str, Verb], verb: str, argv: list[str], package: str) -> None:
    function = _load(verbs[verb])
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _parser(function, f"{package.replace('_', '-')} {verb}")
    name, overrides = _split_config(argv)
    path = _find(name, package)
    settings = _places(function, path) | ({} if path is None else _settings(path, function, verbs))
    values = _parse(parser, settings, overrides, path)
    function(**{key: values[key] for key in inspect.signature(function).parameters})
    _leave_processes()


def _load(verb: Verb) -> Callable[..., object]:
    if not isinstance(verb, str):
        return verb
    module, _, name = verb.partition(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    return function


def _top_level(verbs: Mapping[str, Verb], program: str) -> ArgumentParser:
    parser = ArgumentParser(prog=program, exit_on_error=False)
    subcommands = parser.add_subcommands(dest="verb", metavar="VERB", title="verbs")
    for name, verb in verbs.items():
        subcommands.add_subcommand(name, ArgumentParser(), help=_summary(verb))
    return parser


def _summary(verb: Verb) -> str:
    """First line of a verb's docstring, read from the source so that help needs no torch."""
    if not isinstance(verb, str):
        return (inspect.getdoc(verb) or "").partition("\n")[0]
    module, _, name = verb.partition(":")
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)  # of a part it would import the package
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    source = folder.joinpath(*parts).with_suffix(".py")
    body = ast.parse(read_text(source)).body
    for node, after in pairwise([*body, ast.Pass()]):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return str(ast.literal_eval(ast.unparse(after))).partition("\n")[0]
    raise AssertionError(f"{module} has no function {name}")


def _parser(function: Callable[..., object], program: str) -> ArgumentParser:
    whole, given = _whole(function)
    description = (inspect.getdoc(whole) or "").partition("\nArgs:")[0].strip()
    parser = ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument(
        "--config",
        action="config",
        help="Name of a shipped configuration, or path of a YAML file (default: tiny)",
    )
    parser.add_function_arguments(whole, as_group=False, skip={given})
    return parser


def _whole(function: Callable[..., object]) -> tuple[Callable[..., object], int]:
    """The function under a ``partial``, and how many of its first arguments that gives."""
    return (function.func, len(function.args)) if isinstance(function, partial) else (function, 0)


def _split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take ``--config`` out of the command line; the last one counts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(argv)
    return known.config, rest


def _find(name: str | None, package: str) -> Path | None:
    folder = Path(str(resources.files(package))) / "configs"
    shipped = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name is None:
        return shipped.get("tiny")
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise ValueError(
        f"--config: {name!r} is neither a file nor a shipped configuration; "
        f"shipped are {', '.join(shipped) or 'none'}"
    )


def _settings(
    path: Path, function: Callable[..., object], verbs: Mapping[str, Verb]
) -> dict[str, Any]:
    """The groups of a configuration file that ``function`` has parameters for."""
    settings = _mapping(path)
    own = inspect.signature(function).parameters
    foreign = settings.keys() - own.keys()
    for key in foreign:
        if not any(key in inspect.signature(_load(verb)).parameters for verb in verbs.values()):
            raise ValueError(f"{path}: unknown key {key!r}")
    types = get_type_hints(_whole(function)[0])
    for key in (name for name in own if is_dataclass(types.get(name))):
        # What is made for other verbs would leave this one with made data.
        if foreign and key not in settings and own[key].default is inspect.Parameter.empty:
            raise ValueError(f"{path}: lacks the group {key!r}, so it is not for this verb")
        if not isinstance(settings.get(key, {}), dict):
            raise ValueError(f"{path}: {key}: must hold settings, not {settings[key]!r}")
    return {key: value for key, value in settings.items() if key in own}


def _places(function: Callable[..., object], path: Path | None) -> dict[str, str]:
    """Default paths named after ``tiny``, such as ``runs/tiny``, named after the configuration.

    The ``config.yaml`` of a run directory stands for that directory.
    """
    if path is None:
        return {}
    name = path.resolve().parent.name if path.name == "config.yaml" else path.stem
    return {
        key: str(parameter.default).replace("tiny", name)
        for key, parameter in inspect.signature(function).parameters.items()
        if isinstance(parameter.default, Path)
    }


def _mapping(path: Path) -> dict[str, Any]:
    """The top level of a YAML file."""
    try:
        settings = get_loader("yaml")(read_text(path))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not valid YAML ({_one_line(error)})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: not a configuration; it must map groups to their settings")
    return settings


def _parse(
    parser: ArgumentParser, settings: dict[str, Any], overrides: list[str], path: Path | None
) -> dict[str, Any]:
    arguments = [f"--config={json.dumps(settings)}"] if settings else []
    try:
        return dict(parser.instantiate(parser.parse_args([*arguments, *overrides])))
    except (ArgumentError, ValueError, TypeError) as error:
        message = _one_line(error)
    try:
        parser.instantiate(parser.parse_object(settings))
    except (ArgumentError, ValueError, TypeError) as error:
        # The file alone is at fault; what it lacks may still come from the command line.
        if _one_line(error) == message and "required" not in message:
            message = f"{path}: {message}"
    raise ValueError(message)


def _leave_processes() -> None:
    # Model and optimizer lived in the verb, so they are gone by now. Torch is not imported for it.
    if "separata_shared.training.distributed" in sys.modules:
        sys.modules["separata_shared.training.distributed"].stop()


def _say(line: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(line if rank == "0" else f"[process {rank}] {line}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__

"""Every shipped configuration is one that its package accepts, and says where it comes from."""

import importlib
import re
import shlex
import sys

import pytest
import yaml

PLACES = ("dataset", "raw", "prepared", "source_language", "target_language")  # of files
SOURCES = ("paper", "authors' code", "secondary", "ours")


def head(file):
    """The comment at the top of a configuration."""
    return re.match(r"(#.*\n)*", file.read_text(encoding="utf-8"))[0]


def commands(package, file):
    """The commands at the top of a configuration, without the program."""
    lines = re.findall(rf"^# {package.distribution} (.+)$", head(file), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_command_accepts_the_configuration(config, tmp_path, monkeypatch, capsys):
    package, file = config
    verb = next(verb for verb, *_ in commands(package, file) if verb.startswith("train"))
    arguments = [verb, "--config", file.stem, "--print_config"]
    monkeypatch.setattr(sys, "argv", [package.distribution, *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"{package.module}.__main__").main()
    output = capsys.readouterr()
    assert ended.value.code in (None, 0), output.err
    resolved = yaml.safe_load(output.out)
    stated = yaml.safe_load(file.read_text(encoding="utf-8"))
    groups = [group for group in stated if group in resolved]
    assert groups
    for group in groups:
        if isinstance(stated[group], dict):
            assert set(stated[group]) <= set(resolved[group])
    assert not list(tmp_path.iterdir()), "printing a configuration wrote a file"


def test_every_value_says_where_it_comes_from(config):
    _, file = config
    if "are ours" in head(file):
        return  # said once for all values, or for those without a source
    lines = file.read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if re.match(r"\s+[\w-]+:\s+[^#\s]", line)]
    values = [line for line in values if line.split(":")[0].strip() not in PLACES]
    assert values
    silent = [line for line in values if not re.search(rf"# ({'|'.join(SOURCES)})\b", line)]
    assert not silent


def test_the_head_names_the_commands(config):
    package, file = config
    named = [arguments for _, *arguments in commands(package, file) if "--config" in arguments]
    assert commands(package, file)
    assert named or file.stem == "tiny"
    assert all(arguments[arguments.index("--config") + 1] == file.stem for arguments in named)


def test_the_head_names_records_that_exist(config):
    package, file = config
    lines = re.findall(r"^# results\.yaml: (.+)$", head(file), re.MULTILINE)
    ids = {name for line in lines for name in re.findall(r"(?<![\w.-])[a-z]+-[a-z0-9-]+", line)}
    assert ids <= {record["id"] for record in yaml.safe_load(package.text("results.yaml")) or []}

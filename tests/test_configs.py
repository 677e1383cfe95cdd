"""Every shipped configuration is one that its package accepts, and says where it comes from."""

import os
import re
import subprocess
import sys

import yaml

SOURCES = ("paper", "authors' code", "secondary", "ours")


def head(file):
    """The comment at the top of a configuration."""
    return re.match(r"(#.*\n)*", file.read_text(encoding="utf-8"))[0]


def verb(file):
    """The verb that a configuration is for; its first line is the command."""
    return head(file).split()[2]


def test_the_command_accepts_the_configuration(config, tmp_path):
    package, file = config
    command = [verb(file), "--config", file.stem, "--print_config"]
    done = subprocess.run(
        [sys.executable, "-m", package.module, *command],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)
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
    assert values
    silent = [line for line in values if not re.search(rf"# ({'|'.join(SOURCES)})\b", line)]
    assert not silent


def test_the_head_names_the_command(config):
    package, file = config
    first = head(file).splitlines()[0]
    assert first.startswith(f"# {package.distribution} ")
    assert f"--config {file.stem}" in first or file.stem == "tiny"


def test_the_head_names_records_that_exist(config):
    package, file = config
    named = re.findall(r"^# results\.yaml: (.+)$", head(file), re.MULTILINE)
    ids = {name.strip() for line in named for name in line.split(",")}
    assert ids <= {record["id"] for record in yaml.safe_load(package.text("results.yaml")) or []}

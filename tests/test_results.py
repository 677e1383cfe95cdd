"""Every number claimed has a record, and the tables are made from the records."""

import re
import shlex
import subprocess
import sys

import yaml

FIELDS = {
    "id", "metric", "split", "paper", "ours", "status", "config", "command", "version", "commit",
    "hardware", "hours", "weights", "note",
}  # fmt: skip
STATUS = {"reproduced", "partial", "not run", "not reproducible"}
TEXT_METRICS = re.compile(r"bleu|chrf|\bter\b", re.IGNORECASE)


def records(package):
    return yaml.safe_load(package.text("results.yaml")) or []


def test_records_have_the_same_fields(package):
    for record in records(package):
        assert set(record) == FIELDS, record.get("id")
        assert set(record["metric"]) == {"name", "signature"}, record["id"]
        assert record["paper"] is None or set(record["paper"]) == {"value", "table"}, record["id"]
        assert record["status"] in STATUS, record["id"]


def test_identifiers_are_unique(packages):
    ids = [record["id"] for package in packages for record in records(package)]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in ids)


def test_configurations_and_commands_exist(package):
    names = {file.stem for file in package.configs}
    main = (package.source / "__main__.py").read_text(encoding="utf-8")
    for record in records(package):
        assert record["config"] in names, record["id"]
        for command in record["command"].strip().splitlines():
            program, verb, *arguments = shlex.split(command)
            assert program == package.distribution, record["id"]
            assert re.search(rf"""["']{re.escape(verb)}["']""", main), f"{record['id']}: {verb}"
            if "--config" in arguments:
                assert arguments[arguments.index("--config") + 1] in names, record["id"]


def test_text_metrics_have_a_signature(package):
    for record in records(package):
        if TEXT_METRICS.search(record["metric"]["name"]):
            assert record["metric"]["signature"], record["id"]


def test_a_number_comes_with_where_it_was_measured(package):
    for record in records(package):
        if record["ours"] is None:
            assert record["status"] in ("not run", "not reproducible"), record["id"]
            continue
        assert record["status"] != "not run", record["id"]
        assert set(record["ours"]) == {"mean", "std", "seeds"}, record["id"]
        assert len(record["ours"]["seeds"]) >= 1, record["id"]
        assert (record["ours"]["std"] is None) == (len(record["ours"]["seeds"]) == 1), record["id"]
        assert record["version"].keys() == {"package", "shared"}, record["id"]
        for field in ("commit", "hardware", "hours"):
            assert record[field], f"{record['id']}: {field}"


def test_only_exact_and_code_call_themselves_a_reproduction(package):
    card = dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", package.text("README.md"), re.MULTILINE))
    if re.search(r"`(paper|reconstruction)`", card["fidelity"]):
        assert all(record["status"] != "reproduced" for record in records(package))


def test_tables_equal_the_records(root):
    command = [sys.executable, "docs/results_tables.py", "--check"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

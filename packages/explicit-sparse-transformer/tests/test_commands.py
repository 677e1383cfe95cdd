"""The command line as a user meets it; in this process, except where starting up is the point."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from separata_explicit_sparse_transformer.__main__ import PACKAGE, VERBS
from separata_explicit_sparse_transformer.generate import load_run
from separata_explicit_sparse_transformer.model import sparse_attentions
from separata_shared.training import Run

Command = Callable[..., Any]
PROGRAM = PACKAGE.replace("_", "-")
TEXT = (
    "--data.dataset", "text", "--data.raw", "raw", "--data.prepared", "prepared",
    "--data.segmentation", "words", "--data.vocabulary_size", "40",
)  # fmt: skip


def half_written(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if ".tmp" in path.name or ".old" in path.name]


def test_the_whole_way_on_made_data(command: Command, small_yaml: Path, tmp_path: Path) -> None:
    chosen = ("--config", small_yaml)
    run = ("--run", "runs/small")
    assert command("prepare", *chosen).output.startswith("tiny: made when it is loaded")
    assert command("train", *chosen, *run).status == 0
    assert command("average-checkpoints", *run, "--last", 2).status == 0
    average = "runs/small/weights/average.safetensors"
    evaluated = command("evaluate", *run, "--weights", average)
    assert evaluated.status == 0
    scores = json.loads(Path("runs/small/scores.json").read_text())
    assert "bleu_fairseq" in evaluated.output
    assert all(value["signature"] for value in scores["metrics"].values())
    Path("in.txt").write_text("s1 s2 s3\ns4 s5\n")
    assert command("generate", *run, "--input", "in.txt", "--output", "out.txt").status == 0
    piped = command("generate", *run, stdin=Path("in.txt").read_bytes())
    assert piped.output == Path("out.txt").read_text()
    assert piped.output.count("\n") == 2
    assert command("plot-attention", *run, "--output", "pictures", "--head", 0).status == 0
    assert {path.suffix for path in Path("pictures").iterdir()} == {".png", ".json"}
    # The configuration kept with the run repeats it.
    again = command("train", "--config", "runs/small/config.yaml", "--run", "runs/again")
    assert again.status == 0
    weights = [Run(Path(f"runs/{name}")).weight_files()[-1] for name in ("small", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not half_written(tmp_path)


def test_experiments_and_conversion(command: Command, small_yaml: Path, tmp_path: Path) -> None:
    brief = ("--config", small_yaml, "--train.steps", 2)
    swept = command("sweep-k", *brief, "--top_k", "[2, 3]", "--run", "sweep")
    assert swept.status == 0
    records = json.loads(Path("sweep/sweep.json").read_text())
    assert [record["setting"] for record in records] == ["dense", "k = 2", "k = 3"]
    assert Path("sweep/sweep.png").exists()
    assert command("ablate-phase", *brief, "--run", "phases").status == 0
    assert len(json.loads(Path("phases/phases.json").read_text())) == 4
    dense = "sweep/dense-seed1"
    converted = command("convert", "--run", dense, "--output", "sparse", "--top_k", 2)
    assert converted.status == 0
    assert "mass kept" in converted.output
    assert len(sparse_attentions(load_run(Path("sparse")).network)) == 6
    assert command("evaluate", "--run", "sparse").status == 0
    assert not half_written(tmp_path)


def test_language_model(command: Command, small_yaml: Path, tmp_path: Path) -> None:
    run = ("--run", "lm")
    assert command("train-lm", "--config", small_yaml, "--train.steps", 3, *run).status == 0
    scored = command("evaluate-lm", *run)
    assert scored.status == 0
    bits = json.loads(Path("lm/scores.json").read_text())["metrics"]["bits_per_character"]
    assert bits["signature"]
    assert bits["n"] > 0
    assert f"{bits['value']:.4f}" in scored.output
    assert not half_written(tmp_path)


def test_own_text_is_prepared_trained_on_and_translated(
    command: Command, small_yaml: Path, text_files: Callable[..., Path], tmp_path: Path
) -> None:
    text_files()
    assert command("prepare", "--config", small_yaml, *TEXT).status == 0
    trained = command("train", "--config", small_yaml, *TEXT, "--train.steps", 2, "--run", "run")
    assert trained.status == 0
    assert command("generate", "--run", "run", stdin="ein Hund läuft 3\n".encode()).status == 0
    assert command("evaluate", "--run", "run").status == 0
    assert not half_written(tmp_path)


def test_bare_commands_work_on_tiny(command: Command) -> None:
    # Nothing but the number of steps is given; the shipped configuration must fit together.
    assert command("prepare").status == 0
    printed = command("train", "--print_config").output
    assert "tiny_task: reverse" in printed
    assert command("train", "--train.steps", 3, "--train.save_every", 1).status == 0
    assert {path.name for path in Path("runs").iterdir()} == {"tiny"}
    assert command("average-checkpoints", "--last", 2).status == 0
    assert command("generate", stdin=b"s1 s2 s3\n").output.count("\n") == 1


def test_help_of_every_verb_explains_every_option(command: Command) -> None:
    for verb in VERBS:
        outcome = command(verb, "--help")
        assert outcome.status == 0
        assert "--config" in outcome.output
    outcome = command("--help")
    assert outcome.status == 0
    assert all(verb in outcome.output for verb in VERBS)


@pytest.mark.parametrize("module", [True, False])
def test_help_of_the_installed_program_is_quick(module: bool) -> None:
    script = Path(sys.executable).with_name(PROGRAM)
    program = [sys.executable, "-m", PACKAGE] if module else [str(script)]
    if not module and not script.exists():
        pytest.skip("the script is not installed beside the interpreter")
    began = time.process_time() + sum(os.times()[2:4])
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=False)
    used = time.process_time() + sum(os.times()[2:4]) - began
    assert done.returncode == 0, done.stderr
    assert "plot-attention" in done.stdout
    assert used < 3.0  # seconds of processor time, what a free machine would take at most


def test_help_of_the_program_does_not_import_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", PACKAGE, "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


def test_a_failing_program_exits_with_two(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", PACKAGE, "evaluate", "--run", "nowhere"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"{PROGRAM}: error: nowhere: not a run directory; train one first\n"

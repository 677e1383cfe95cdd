"""The commands as a user meets them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from separata_kbrd.__main__ import VERBS

Command = Callable[..., Any]


def test_a_run_goes_from_training_to_scores_and_answers(command: Command) -> None:
    few = ("--train.steps", 3, "--train_dialog.steps", 3, "--data.tiny_dialogs", 32)
    assert command("prepare").status == 0
    assert command("train", *few, "--run", "run").status == 0
    done = command("evaluate", "--run", "run")
    assert done.status == 0, done
    record = json.loads(Path("run/scores.json").read_text())
    assert 0 <= record["recommender"]["kbrd"]["all"]["recall@10"]["value"] <= 100
    assert record["dialog"]["perplexity"]["value"] > 1
    done = command("generate", "--run", "run", "--beam", 2, stdin="hello\n\nany film?\tyes\n")
    assert (done.status, done.output.count("\n")) == (0, 3)
    done = command("generate", "--run", "run", "--search", "official", stdin="hello\n")
    assert (done.status, done.output.count("\n")) == (0, 1)


def test_generate_reads_and_writes_files(command: Command, talking_run: Path) -> None:
    Path("dialogs.txt").write_text("hello\nany horror film?\n", encoding="utf-8")
    done = command("generate", "--run", talking_run, "--input", "dialogs.txt", "--output", "a.txt")
    assert (done.status, done.output) == (0, "a.txt\n")
    printed = command("generate", "--run", talking_run, stdin="hello\nany horror film?\n")
    assert printed.output == Path("a.txt").read_text(encoding="utf-8")


def test_wrong_input_of_generate_ends_in_one_line(command: Command, talking_run: Path) -> None:
    Path("latin1.txt").write_bytes(b"r\xeave\n")
    Path("empty.txt").touch()
    command("generate", "--run", talking_run, "--input", "latin1.txt").refused("latin1.txt")
    command("generate", "--run", talking_run, "--input", "empty.txt").refused("empty.txt")
    command("generate", "--run", talking_run, "--input", "no.txt").refused("no.txt")
    command("generate", "--run", talking_run, stdin="").refused("standard input")
    command("generate", "--run", talking_run, "--beam", 0, stdin="x\n").refused("beam")
    command("generate", "--run", "nowhere", stdin="x\n").refused("nowhere", "train-dialog")


@pytest.mark.parametrize(
    ("override", "word"),
    [
        (("--dialog.width", 0), "dialog.width"),
        (("--dialog.num_heads", 7), "dialog.num_heads"),
        (("--dialog.search", "best"), "search"),
        (("--recommender.aggregate", "max"), "aggregate"),
        (("--data.dataset", "netflix"), "dataset"),
        (("--train.steps", 0), "train.steps"),
        (("--config", "redial99"), "redial"),
    ],
)
def test_bad_settings_end_in_one_line(
    command: Command, override: tuple[object, ...], word: str
) -> None:
    command("train", *override).refused(word)
    assert not list(Path().iterdir())


def test_help_of_every_verb_explains_its_options(command: Command) -> None:
    for verb in VERBS:
        done = command(verb, "--help")
        assert done.status == 0
        assert "--config" in done.output
    assert all(verb in command("--help").output for verb in VERBS)

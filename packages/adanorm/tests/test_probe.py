"""Models that the tools look into: from runs, from functions of the user, fresh."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_adanorm.__main__ import PACKAGE, VERBS
from separata_adanorm.monitor import monitor_outliers
from separata_adanorm.probe import probe_function, probe_run
from separata_shared.cli import main

MINE = """
import torch
from torch import nn


def make():
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8))
    return model, lambda: model(torch.ones(2, 3)).square().sum()


def nothing():
    return 3


def uncalled():
    return make()[0], 3


def number():
    return make()[0], lambda: 3.0


def several():
    model, _ = make()
    return model, lambda: model(torch.ones(2, 3))
"""


def run(*arguments: object) -> int:
    """Run the program in this process."""
    with pytest.raises(SystemExit) as left:
        main(VERBS, package=PACKAGE, arguments=[str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("train", ["--data.tiny_pairs", 100, "--model.width", 16, "--model.hidden_width", 16]),
        ("train-lm", ["--data.tiny_pairs", 100, "--language_model.width", 8]),
        ("train-images", ["--images.tiny_images", 100]),
        ("train-sentences", ["--sentences.tiny_sentences", 100, "--sentences.width", 8]),
        ("train-parser", ["--parser.tiny_sentences", 30]),
    ],
)
def test_every_training_verb_leaves_a_run_that_can_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, options: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(verb, *options, "--train.steps", 1, "--train.evaluate_every", 1, "--run", "r") == 0
    assert run("gradient-stats", "--run", "r", "--output", "statistics") == 0
    assert {path.name for path in (tmp_path / "statistics").iterdir()} == {
        "gradients.csv", "gradients.json", "gradients.png",
    }  # fmt: skip
    model, loss = probe_run(tmp_path / "r")
    assert not model.training
    assert torch.equal(loss(), loss())
    with monitor_outliers(model) as monitor:
        loss()
    assert monitor.report()
    if verb == "train-images":
        assert run("plot-phi", "--run", "r", "--output", "phi.png") == 0
        assert run("plot-curves", "--runs", "['r']", "--output", "curves.png") == 0


def test_the_tiny_model_is_measured_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("gradient-stats", "--data.tiny_pairs", 100) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "AdaNorm" in line]) == 5 * 12
    assert lines[-1] == "runs/tiny-gradients"
    assert run("plot-phi") == 0
    assert (tmp_path / "runs" / "phi.png").exists()


def test_a_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    assert run("gradient-stats", "--function", "mine.py:make", "--output", "a") == 0
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine")
    assert isinstance(probe_function("mine:make").model, torch.nn.Sequential)


def test_the_numbers_of_one_model_do_not_overwrite_those_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    tiny = ["--images.tiny_images", 100, "--train.steps", 1, "--train.evaluate_every", 1]
    for name in ("deep/one", "two"):
        assert run("train-images", *tiny, "--run", name) == 0
        assert run("gradient-stats", "--run", name) == 0
    assert run("gradient-stats", "--function", "mine.py:make") == 0
    monkeypatch.chdir(tmp_path / "deep" / "one")
    (tmp_path / "deep" / "one-gradients" / "gradients.csv").unlink()
    assert run("gradient-stats", "--run", ".") == 0
    found = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("gradients.csv")}
    assert found == {"deep/one-gradients", "two-gradients", "runs/make-gradients"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--function", "mine.py"], "'mine.py' must be module:function or file.py:function"),
        (["--function", "other.py:make"], "other.py: no such file"),
        (["--function", "no_such_module:make"], "no_such_module cannot be imported"),
        (["--function", "mine.py:other"], "mine.py has no function 'other'"),
        (["--function", "mine.py:nothing"], "mine.py:nothing must give a model and a function"),
        (["--function", "mine.py:uncalled"], "mine.py:uncalled must give a model and a function"),
        (["--function", "mine.py:number"], "the loss must be a tensor of one number, not float"),
        (["--function", "mine.py:several"], "the loss must be a tensor of one number, not (2, 8)"),
        (["--function", "json:dumps"], "json:dumps must take no arguments (missing a required"),
        (["--function", "broken.py:make"], "broken.py cannot be imported ("),
        (["--function", "mine.py:make", "--run", "r"], "run and function: give one of the two"),
        (["--run", "nowhere"], "nowhere: not a run directory; train one first"),
        (
            ["--run", "."],
            "config.yaml: has none of the groups images, sentences, parser, language_model, model",
        ),
    ],
)
def test_wrong_use_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("def make() return\n")
    (tmp_path / "config.yaml").write_text("train: {}\n")
    assert run("gradient-stats", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

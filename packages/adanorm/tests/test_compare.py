"""Experiments with several norms, and their commands as a user meets them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from separata_adanorm import compare as module
from separata_adanorm.compare import compare
from separata_adanorm.images import ImageConfig
from separata_shared.cli import to_yaml
from separata_shared.training import TrainConfig

IMAGES = ImageConfig(channels=(2, 2), hidden_width=8, tiny_images=100)
TRAIN = TrainConfig(steps=2, monitor="accuracy", monitor_mode="max", device="cpu")


def test_the_table_holds_mean_and_deviation_of_every_norm(tmp_path: Path) -> None:
    table = compare(
        train=TRAIN, images=IMAGES, norms=["no_norm", "ada_norm"], seeds=[1, 5], run=tmp_path
    )
    assert json.loads((tmp_path / "scores.json").read_text()) == table
    assert list(table) == ["images"]
    assert list(table["images"]) == ["no_norm", "ada_norm"]
    for kind, row in table["images"].items():
        scores = [
            json.loads((tmp_path / f"images-{kind}-seed{seed}" / "scores.json").read_text())
            for seed in (1, 5)
        ]
        values = [score["metrics"]["accuracy"]["value"] for score in scores]
        assert row["values"] == values
        assert row["mean"] == pytest.approx(mean(values))
        assert row["std"] == pytest.approx(stdev(values))
        assert row["seeds"] == [1, 5]
    config = (tmp_path / "images-ada_norm-seed5" / "config.yaml").read_text()
    assert "norm: ada_norm" in config
    assert "seed: 5" in config


def test_a_run_that_is_done_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def train(**settings: Any) -> object:
        made.append((settings["images"].norm, settings["train"].seed))
        return original(**settings)

    original = module.train_images
    monkeypatch.setattr(module, "train_images", train)
    settings: dict[str, Any] = {"images": IMAGES, "norms": ["ada_norm"], "run": tmp_path}
    first = compare(train=TRAIN, seeds=[1], **settings)
    again = compare(train=TRAIN, seeds=[1, 2], **settings)
    assert made == [("ada_norm", 1), ("ada_norm", 2)]
    assert first["images"]["ada_norm"]["std"] is None
    assert again["images"]["ada_norm"]["values"][:1] == first["images"]["ada_norm"]["values"]
    # Other settings are another experiment.
    compare(train=replace(TRAIN, steps=3), seeds=[1], **settings)
    assert made[2:] == [("ada_norm", 1)]


@pytest.mark.parametrize("content", ["{}", "3", '{"metric": 1, "seed": 1, "value": "x"}'])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    settings: dict[str, Any] = {"images": IMAGES, "norms": ["ada_norm"], "seeds": [1]}
    run = tmp_path / "images-ada_norm-seed1"
    run.mkdir()
    (run / "record.json").write_text(content)
    groups = {"images": replace(IMAGES, norm="ada_norm"), "train": replace(TRAIN, seed=1)}
    (run / "config.yaml").write_text(to_yaml(groups))
    with pytest.raises(ValueError, match=r"record\.json: not a record of this command; delete it"):
        compare(train=TRAIN, run=tmp_path, **settings)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of images, sentences and parser"):
        compare(train=TRAIN)


def test_bare_commands_work_on_made_data(command: Callable[..., Any]) -> None:
    brief = ("--train.steps", 3, "--train.evaluate_every", 3)
    for task, metric in (("images", "accuracy"), ("sentences", "accuracy"), ("parser", "uas")):
        assert command(f"train-{task}", *brief).status == 0
        scored = command(f"evaluate-{task}")
        assert scored.status == 0
        scores = json.loads(Path(f"runs/tiny-{task}/scores.json").read_text())
        assert f"{metric}: {scores['metrics'][metric]['value']:.2f} percent" in scored.output
    parsed = command("parse", stdin=b"det0 noun1 verb2\n")
    assert parsed.status == 0
    assert parsed.output.count("\t") == 3 * 9
    compared = command("compare", *brief, "--norms", "[no_norm]", "--seeds", "[1]")
    assert compared.status == 0
    table = json.loads(Path("runs/tiny-compare/scores.json").read_text())
    assert list(table) == ["images", "sentences", "parser"]


@pytest.mark.parametrize(
    ("verb", "group", "width"),
    [
        ("train", "model", "width"),
        ("train-lm", "language_model", "width"),
        ("train-images", "images", "hidden_width"),
        ("train-sentences", "sentences", "width"),
        ("train-parser", "parser", "hidden_width"),
    ],
)
def test_what_cannot_be_normalised_is_named(
    command: Callable[..., Any], verb: str, group: str, width: str
) -> None:
    for C in ("-1", "0", ".nan"):
        command(verb, f"--{group}.C", C).refused(f"{group}.C: must be a positive number, got")
    heads = () if width == "hidden_width" else (f"--{group}.num_heads", 1)
    command(verb, f"--{group}.{width}", 1, *heads).refused(f"{group}.{width}: must be at least 2")
    assert not list(Path().iterdir())


def test_wrong_use_is_one_line(command: Callable[..., Any]) -> None:
    command("train-images", "--images.norm", "batch_norm").refused("images.norm")
    command("train-sentences", "--config", "rt").refused("rt-polarity.neg", "no such file")
    command("train-parser", "--config", "ud_ewt").refused("needs one file *train.conllu")
    command("train-images", "--config", "mnist").refused("train-images-idx3-ubyte")
    command("evaluate-parser").refused("not a run directory")
    command("compare", "--config", "iwslt14_de_en").refused("none of images")

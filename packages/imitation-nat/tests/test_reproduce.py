"""The whole pipeline as one command, and the ablation."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import separata_imitation_nat.distill as distill_module
from separata_imitation_nat import ablate as ablate_module
from separata_imitation_nat.ablate import ablate
from separata_imitation_nat.config import StagesConfig
from separata_imitation_nat.evaluate import evaluate
from separata_imitation_nat.generate import open_run
from separata_imitation_nat.reproduce import evaluate_once, prepare_once, reproduce
from separata_shared.files import sha256
from separata_shared.translation import DataConfig

STAGES = {"teacher", "distilled", "demonstrator", "learner"}


def contents(folder: Path) -> dict[str, bytes]:
    """Files that a repeated command must leave as they are; a run notes when it was looked at."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in found
        if path.name != "environment.json"
    }


@pytest.fixture(scope="module")
def brief(small: dict[str, Any]) -> dict[str, Any]:
    """A pipeline of few steps."""
    return small | {
        "train": replace(small["train"], steps=4, save_every=50, evaluate_every=0),
        "stages": StagesConfig(teacher_steps=6, demonstrator_steps=3),
    }


@pytest.fixture(scope="module")
def reproduced(brief: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a pipeline that ran once; tests may read it but write elsewhere."""
    run = tmp_path_factory.mktemp("reproduced") / "run"
    reproduce(**brief, run=run)
    return run


def test_every_stage_is_made_with_its_own_number_of_steps(reproduced: Path) -> None:
    assert {path.name for path in reproduced.iterdir()} == STAGES
    for stage, steps in (("teacher", 6), ("demonstrator", 3), ("learner", 4)):
        newest = max((reproduced / stage / "checkpoints").iterdir())
        assert newest.name == f"step_{steps:07d}"
    assert json.loads((reproduced / "learner/scores.json").read_text())["kind"] == "learner"


def test_what_is_done_stays_as_it_is(
    reproduced: Path,
    brief: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(reproduced)
    monkeypatch.setattr(distill_module, "translate_shard", None)  # calling it would fail
    again = reproduce(**brief, run=reproduced)
    assert contents(reproduced) == before
    assert again == json.loads((reproduced / "learner/scores.json").read_text())
    said = capsys.readouterr().err.splitlines()
    places = [said.index(f"{reproduced / name}: {name}") for name in ("teacher", "demonstrator")]
    assert places == sorted(places)  # each stage is named before what it prints
    assert said.index(f"{reproduced / 'learner'}: learner") > places[1]


def test_a_stage_that_was_lost_is_made_again_with_the_same_result(
    reproduced: Path, brief: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(reproduced, tmp_path / "run"))
    for lost in ("distilled", "learner"):
        shutil.rmtree(run / lost)
        # The run records the places of its inputs, so it is made where the first one was.
    reproduce(**brief, run=run)
    assert contents(run / "distilled") == contents(reproduced / "distilled")
    weights = [sorted((folder / "learner/weights").iterdir())[-1] for folder in (run, reproduced)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_stage_of_other_settings_is_named_and_left_alone(
    reproduced: Path, brief: dict[str, Any]
) -> None:
    before = contents(reproduced)
    other = brief | {"model": replace(brief["model"], width=32)}
    with pytest.raises(ValueError, match=r"teacher/config\.yaml: model is not what"):
        reproduce(**other, run=reproduced)
    assert contents(reproduced) == before


def test_a_learner_of_another_teacher_is_named(
    reproduced: Path, brief: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(reproduced, tmp_path / "run"))
    for lost in ("teacher", "distilled", "demonstrator"):
        shutil.rmtree(run / lost)
    for file in (run / "learner/config.yaml",):
        file.write_text(file.read_text().replace(str(reproduced), str(run)))
    other = brief | {"stages": replace(brief["stages"], teacher_steps=5)}
    with pytest.raises(ValueError, match=r"inputs\.json: \w+ is not what this run was begun with"):
        reproduce(**other, run=run)


def test_scores_of_other_weights_are_made_again(reproduced: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(reproduced, tmp_path / "run"))
    path = run / "learner/scores.json"
    right = path.read_text()
    path.write_text(json.dumps({"split": "test", "weights": "other"}))
    evaluate_once(run / "learner", scorer=run / "teacher")
    assert path.read_text() == right


def test_scores_of_another_scorer_are_made_again(reproduced: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(reproduced, tmp_path / "run"))
    right = json.loads((run / "learner/scores.json").read_text())
    assert right["scorer"] == sha256(open_run(run / "teacher").trained.weights)
    other = evaluate(run=run / "learner", scorer=run / "demonstrator")
    assert other["scorer"] == sha256(open_run(run / "demonstrator").trained.weights)
    assert evaluate_once(run / "learner", scorer=run / "teacher") == right


def test_data_that_was_prepared_is_checked_and_kept(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for part in ("train", "valid", "test"):
        for language in ("de", "en"):
            (raw / f"{part}.{language}").write_text("ein Hund\neine Katze\n")
    data = DataConfig(
        dataset="text", raw=str(raw), prepared=str(tmp_path / "prepared"), segmentation="words"
    )
    prepare_once(data)
    before = contents(tmp_path / "prepared")
    shutil.rmtree(raw)
    prepare_once(data)
    assert contents(tmp_path / "prepared") == before
    tokens = tmp_path / "prepared/train.source.tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match=r"train\.source\.tokens\.npy: damaged; prepare"):
        prepare_once(data)


def test_the_ablation_pairs_its_rows_by_seed_and_can_be_stopped(
    reproduced: Path,
    brief: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(reproduced, tmp_path / "run"))
    settings = {**brief, "weights": [1.0], "seeds": [1, 2], "samples": 50, "run": run}
    stopping = monkeypatch.context()
    with stopping as patch:
        patch.setattr(ablate_module, "train_learner", _stop_after(3, ablate_module.train_learner))
        with pytest.raises(KeyboardInterrupt):
            ablate(**settings)
    done = {path.name for path in run.glob("*-seed*")}
    assert done == {f"vanilla-distilled-seed{n}" for n in (1, 2)} | {"soft-copy-distilled-seed1"}
    before = {name: contents(run / name) for name in done}
    table = ablate(**settings)
    assert {name: contents(run / name) for name in done} == before
    assert json.loads((run / "ablation.json").read_text()) == table
    lines = table["distilled"]
    rows = ["vanilla", "soft-copy", "imitation-1"]
    modes = ["one_length", "rescored"]
    assert set(lines) == {f"{row}-distilled, {mode}" for row in rows for mode in modes}
    for name, line in lines.items():
        assert line["seeds"] == [1, 2]
        assert line["compared_with"] == "soft-copy-distilled"
        low, high = line["bootstrap"]["interval"]
        assert low <= high
        if name.startswith("soft-copy"):
            assert line["bootstrap"]["difference_interval"] == [0.0, 0.0]
    printed = capsys.readouterr().out
    assert all(name in printed for name in lines)
    assert "nrefs:1" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "^samples: must be at least 1, got 0"),
        ({"seeds": [1, 2, 1]}, r"^seeds: needs different values, at least one, got \[1, 2, 1\]"),
        ({"rows": []}, r"^rows: needs different values, at least one, got \[\]"),
        ({"weights": [0.1, -1.0]}, r"^objective\.imitation: must not be negative, got -1\.0"),
    ],
)
def test_options_of_the_ablation_are_checked_before_anything_is_trained(
    brief: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        ablate(**brief, **changes, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _stop_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    left = iter(range(calls))

    def stopped(**settings: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(**settings)

    return stopped


def test_models_that_no_row_needs_are_not_trained(brief: dict[str, Any], tmp_path: Path) -> None:
    table = ablate(**brief, rows=["autoregressive"], targets=["raw"], samples=5, run=tmp_path / "a")
    assert list(table) == ["raw"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "autoregressive-raw-seed1",
        "ablation.json",
    }


@pytest.mark.slow
def test_every_baseline_is_trained_by_the_same_command(
    reproduced: Path, brief: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(reproduced, tmp_path / "run"))
    rows = ["autoregressive", "deep-encoder", "imitation", "mask-predict"]
    table = ablate(**brief, rows=rows, targets=["raw"], samples=20, run=run)
    found = {name.split(", ")[0] for name in table["raw"]}
    wanted = [row if row != "imitation" else "imitation-0.1" for row in rows]
    assert found == {f"{row}-raw" for row in wanted}
    config = (run / "deep-encoder-raw-seed1/config.yaml").read_text()
    assert "encoder_layers: 4" in config
    assert "decoder_layers: 1" in config
    assert "distilled" not in config

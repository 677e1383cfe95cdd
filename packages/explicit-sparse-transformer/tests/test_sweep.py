import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from separata_explicit_sparse_transformer import sweep
from separata_explicit_sparse_transformer.config import ModelConfig
from separata_explicit_sparse_transformer.evaluate import evaluate
from separata_explicit_sparse_transformer.generate import load_run
from separata_explicit_sparse_transformer.sweep import METRIC, ablate_phase, sweep_k
from separata_shared.files import write_json


@pytest.fixture
def brief(small: dict[str, Any]) -> dict[str, Any]:
    return small | {"train": replace(small["train"], steps=2, save_every=2, evaluate_every=2)}


def model_of(run: Path) -> ModelConfig:
    return load_run(run).model


def test_every_k_is_trained_and_scored_beside_dense(brief: dict[str, Any], tmp_path: Path) -> None:
    records = sweep_k(**brief, top_k=[4, 2], seeds=[1, 2], run=tmp_path)
    assert [record["setting"] for record in records] == ["dense", "k = 2", "k = 4"]
    assert all(record["seeds"] == [1, 2] for record in records)
    assert json.loads((tmp_path / "sweep.json").read_text()) == records
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {f"{kind}-seed{seed}" for kind in ("dense", "k2", "k4") for seed in (1, 2)}
    assert model_of(tmp_path / "k4-seed2").attention.top_k == 4
    assert model_of(tmp_path / "dense-seed1").attention.sites == []
    for record, name in zip(records, ("dense", "k2", "k4"), strict=True):
        for seed, value in zip(record["seeds"], record["test"], strict=True):
            scores = json.loads((tmp_path / f"{name}-seed{seed}" / "scores.json").read_text())
            assert scores["split"] == "test"
            assert scores["metrics"][METRIC]["value"] == value


def test_phases_differ_in_nothing_else(brief: dict[str, Any], tmp_path: Path) -> None:
    records = ablate_phase(**brief, run=tmp_path)
    assert [r["setting"] for r in records] == ["dense", "train only", "predict only", "both"]
    assert all(record["seeds"] == [1] for record in records)
    assert json.loads((tmp_path / "phases.json").read_text()) == records
    assert (tmp_path / "phases.png").read_bytes()[:4] == b"\x89PNG"
    plain = model_of(tmp_path / "both-seed1")
    for name, phase in (("train-only", "train"), ("predict-only", "predict")):
        model = model_of(tmp_path / f"{name}-seed1")
        assert model.attention.phase == phase
        assert replace(model, attention=plain.attention) == plain
    # Training does not know how the model will predict.
    weights = [
        (tmp_path / f"{name}-seed1" / "weights" / "step_0000002.safetensors").read_bytes()
        for name in ("dense", "predict-only", "train-only", "both")
    ]
    assert weights[0] == weights[1]
    assert weights[2] == weights[3]
    assert weights[0] != weights[2]


def test_finished_runs_are_not_made_again(
    brief: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep_k(**brief, top_k=[2], run=tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    evaluated: list[Path] = []

    def counted(*, run: Path) -> Any:
        evaluated.append(run)
        return evaluate(run=run)

    monkeypatch.setattr(sweep, "evaluate", counted)
    assert sweep_k(**brief, top_k=[2], run=tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == made
    assert not evaluated
    # Scores of another part or of other weights do not count.
    scores = json.loads((tmp_path / "k2-seed1" / "scores.json").read_text())
    for change in ({"split": "valid"}, {"weights": "step_0000001.safetensors"}):
        write_json(tmp_path / "k2-seed1" / "scores.json", scores | change)
        assert sweep_k(**brief, top_k=[2], run=tmp_path) == first
    assert evaluated == [tmp_path / "k2-seed1"] * 2


@pytest.mark.parametrize("verb", [sweep_k, ablate_phase])
def test_missing_matplotlib_is_noticed_before_the_training(
    verb: Any, brief: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install"):
        verb(**brief, run=tmp_path)
    assert not list(tmp_path.iterdir())


def test_impossible_k_is_noticed_before_the_training(brief: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k"):
        sweep_k(**brief, top_k=[2, 0], run=tmp_path)
    assert not list(tmp_path.iterdir())

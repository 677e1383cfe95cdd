import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_explicit_sparse_transformer.build import build_model
from separata_explicit_sparse_transformer.config import AttentionConfig, DecodeConfig, ModelConfig
from separata_explicit_sparse_transformer.data import DataConfig, load
from separata_explicit_sparse_transformer.generate import load_run, translate_lines
from separata_explicit_sparse_transformer.model import TopKAttention
from separata_explicit_sparse_transformer.train import top_k_schedule, train
from separata_shared.training import Run, TrainConfig, read_weights
from separata_shared.translation import train as train_module
from torch import Tensor

Settings = dict[str, Any]


def weights_of(run: Path) -> dict[str, Tensor]:
    return read_weights(Run(run).weight_files()[-1])


def losses_of(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in Run(run).records()]


def short(small: Settings, steps: int, **changes: Any) -> Settings:
    """``small`` with a few steps and other settings of the training."""
    return small | {"train": replace(small["train"], steps=steps, **changes)}


def temporary_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.slow
def test_copying_with_four_keys_is_learned_as_well_as_with_all(tmp_path: Path) -> None:
    data = DataConfig(
        tiny_task="copy", tiny_pairs=1500, tiny_symbols=8, tiny_length=8, max_length=32,
        max_tokens=512,
    )  # fmt: skip
    correct = {}
    for kind in ("dense", "topk"):
        train(
            model=ModelConfig(
                width=32, num_heads=2, hidden_width=64, encoder_layers=1, decoder_layers=1,
                dropout=0.0, max_length=32, attention=AttentionConfig(kind=kind, top_k=4),
            ),
            data=data,
            train=TrainConfig(
                steps=500, lr=5e-3, schedule="inverse_sqrt", warmup=50, clip_norm=1.0,
                betas=(0.9, 0.98), device="cpu",
            ),
            decode=DecodeConfig(beam=1, max_length_constant=3),
            label_smoothing=0.0,
            run=tmp_path / kind,
        )  # fmt: skip
        test = load(data).test
        output = translate_lines(load_run(tmp_path / kind), test.source_lines)
        correct[kind] = sum(map(str.__eq__, output, test.target_lines))
    # Of 150 sentences that training did not see.
    assert correct["dense"] >= 140
    assert correct["topk"] >= correct["dense"] - 3


def test_the_same_seed_gives_the_same_run(small: Settings, tmp_path: Path) -> None:
    settings = short(small, 6, deterministic=True, log_every=1)
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        changed = replace(settings["train"], seed=seed)
        train(**settings | {"train": changed}, run=tmp_path / name)
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    assert losses_of(first) == losses_of(second)
    assert losses_of(first) != losses_of(other)
    for name, weight in weights_of(first).items():
        assert torch.equal(weight, weights_of(second)[name])


def test_a_run_that_goes_on_is_the_run_that_never_stopped(small: Settings, tmp_path: Path) -> None:
    train(**short(small, 8), run=tmp_path / "stopped")
    result = train(**short(small, 16), run=tmp_path / "stopped")
    train(**short(small, 16), run=tmp_path / "straight")
    assert result.step == 16
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    straight = weights_of(tmp_path / "straight")
    assert all(torch.equal(w, straight[n]) for n, w in weights_of(tmp_path / "stopped").items())


def test_a_finished_run_is_left_as_it_is(trained_run: Path, small: Settings) -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained_run / "weights").iterdir()}
    assert train(**small, run=trained_run).step == 24
    assert {path: path.stat().st_mtime_ns for path in (trained_run / "weights").iterdir()} == before


def test_a_run_directory_holds_what_using_the_model_needs(trained_run: Path) -> None:
    names = {path.name for path in trained_run.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "metrics.jsonl", "best.json", "checkpoints", "weights",
        "source.vocabulary", "target.vocabulary",
    }  # fmt: skip
    kinds = {record["kind"] for record in Run(trained_run).records()}
    assert "evaluate" in kinds
    assert json.loads((trained_run / "best.json").read_text())["loss"] < math.log(10)
    assert not temporary_files(trained_run)


def test_training_lowers_the_loss(trained_run: Path) -> None:
    steps, losses = zip(*losses_of(trained_run), strict=True)
    assert steps[-1] == 24
    assert losses[-1] < losses[0]


def test_k_moves_from_step_to_step_as_configured(
    small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[set[int]] = []
    step = train_module.translation_step

    def recording(label_smoothing: float) -> Any:
        inner = step(label_smoothing)

        def recorded(model: Any, batch: Any) -> Any:
            if model.training:
                modules = (m for m in model.modules() if isinstance(m, TopKAttention))
                kept.append({int(module.top_k) for module in modules})
            return inner(model, batch)

        return recorded

    monkeypatch.setattr(train_module, "translation_step", recording)
    attention = AttentionConfig(top_k=2, start_top_k=8, schedule_steps=3)
    settings = short(small, 6) | {"model": replace(small["model"], attention=attention)}
    train(**settings, run=tmp_path / "run")
    # 8 + (2 - 8) * s / 3 before update s, then 2.
    assert kept == [{8}, {6}, {4}, {2}, {2}, {2}]
    trained = load_run(tmp_path / "run").network
    assert {m.top_k for m in trained.modules() if isinstance(m, TopKAttention)} == {2}


def test_without_a_schedule_nothing_is_done_before_a_step() -> None:
    model = build_model(
        ModelConfig(
            width=8, num_heads=2, hidden_width=8, source_vocabulary_size=9, target_vocabulary_size=9
        )
    )
    assert top_k_schedule(model, AttentionConfig()) is None


def refused(settings: Settings, run: Path, message: str) -> None:
    """The run cannot start, and leaves nothing that a later command would take for a model."""
    with pytest.raises(ValueError, match=message):
        train(**settings, run=run)
    assert not temporary_files(run.parent)
    assert not list(run.glob("weights/*"))
    assert not list(run.glob("checkpoints/*"))


def test_a_sentence_longer_than_the_positions_is_refused(small: Settings, tmp_path: Path) -> None:
    settings = small | {"model": replace(small["model"], max_length=8)}
    refused(
        settings, tmp_path / "run", r"^model\.max_length: is 8, but the train part .* 10 tokens"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_outside_its_range_is_refused(
    small: Settings, tmp_path: Path, smoothing: float
) -> None:
    settings = small | {"label_smoothing": smoothing}
    refused(settings, tmp_path / "run", "^label_smoothing: ")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_ends_the_run(small: Settings, tmp_path: Path) -> None:
    refused(
        short(small, 8, lr=1e30), tmp_path / "run", r"(?i)loss.*(nan|finite)|(nan|finite).*loss"
    )


def test_the_run_directory_of_another_model_is_refused(trained_run: Path, small: Settings) -> None:
    before = {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}
    for group, changes in (
        ("model", {"width": 32}),
        ("model", {"attention": AttentionConfig(top_k=4)}),
        ("data", {"max_tokens": 161}),
    ):
        other = small | {group: replace(small[group], **changes)}
        with pytest.raises(ValueError, match=rf"config\.yaml: {group} is not what"):
            train(**other, run=trained_run)
    with pytest.raises(ValueError, match="trained: was made with another vocabulary"):
        train(**small | {"data": replace(small["data"], tiny_symbols=7)}, run=trained_run)
    after = {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}
    assert after == before

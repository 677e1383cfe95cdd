"""Learning checks: the paper's norms train a small translation model, and the run is repeatable."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_adanorm.config import DataConfig, DecodeConfig, ModelConfig
from separata_adanorm.evaluate import evaluate
from separata_adanorm.generate import load_run
from separata_adanorm.train import train
from separata_shared.training import Run, TrainConfig, read_weights

Settings = dict[str, Any]


def toy(norm: Any, steps: int, **changes: Any) -> Settings:
    """A 2+2 layer model that copies made sentences."""
    return {
        "model": ModelConfig(
            width=32, num_heads=2, hidden_width=64, encoder_layers=2, decoder_layers=2,
            dropout=0.0, max_length=32, norm=norm, **changes,
        ),
        "data": DataConfig(
            tiny_task="copy", tiny_pairs=1200, tiny_symbols=8, tiny_length=7, max_length=32,
            max_tokens=512,
        ),
        "train": TrainConfig(
            steps=steps, lr=4e-3, schedule="inverse_sqrt", warmup=60, clip_norm=1.0,
            betas=(0.9, 0.98), device="cpu",
        ),
        "decode": DecodeConfig(beam=1, max_length_constant=3),
        "label_smoothing": 0.0,
    }  # fmt: skip


# A model that knows nothing has a loss of log 12 = 2.48. DetachNorm, whose gradients are neither
# centred nor scaled, learns too, but far more slowly: the paper's ordering.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "lr", "loss"),
    [
        ("ada_norm", 4e-3, 0.3),
        ("layer_norm_simple", 4e-3, 0.3),
        ("no_norm", 4e-3, 0.3),
        ("detach_norm", 8e-3, 1.24),
    ],
)
def test_a_toy_translation_is_learned(norm: str, lr: float, loss: float, tmp_path: Path) -> None:
    settings = toy(norm, 300)
    training = replace(settings["train"], lr=lr)
    result = train(**settings | {"train": training}, run=tmp_path / "run")
    assert result.metrics["evaluate/loss"] < loss


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(Run(run).weight_files()[-1])


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    for name, steps in (("stopped", 3), ("stopped", 6), ("straight", 6)):
        assert train(**toy("ada_norm", steps), run=tmp_path / name).step == steps
    straight = weights_of(tmp_path / "straight")
    for name, weight in weights_of(tmp_path / "stopped").items():
        assert torch.equal(weight, straight[name])


def test_a_run_with_another_norm_is_not_continued(tmp_path: Path) -> None:
    train(**toy("ada_norm", 2), run=tmp_path)
    for other in (toy("detach_norm", 2), toy("ada_norm", 2, C=2.0)):
        with pytest.raises(ValueError, match=r"config\.yaml: model is not what"):
            train(**other, run=tmp_path)


def test_scores_of_a_run_name_its_norm_by_its_configuration(tmp_path: Path) -> None:
    settings = toy("layer_norm_simple", 2)
    small = replace(settings["data"], tiny_pairs=100)
    train(**settings | {"data": small}, run=tmp_path)
    assert load_run(tmp_path).model.norm == "layer_norm_simple"
    scores = evaluate(run=tmp_path)
    assert scores["sentences"] == 10

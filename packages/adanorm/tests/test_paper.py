"""Numbers that the paper and the published recipe state, without training anything.

"Authors' code" is GitHub lancopku/AdaNorm, commit 546faea.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_adanorm import ada_norm, layer_norm_simple
from separata_adanorm.config import DataConfig, DecodeConfig, ModelConfig
from separata_adanorm.language_model import LanguageModelConfig
from separata_adanorm.model import build_model
from separata_shared.cli import from_yaml
from separata_shared.training import TrainConfig
from separata_shared.training.optim import make_schedule
from torch import nn

GROUPS = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "decode": DecodeConfig,
    "label_smoothing": float,
}


def shipped(name: str, groups: dict[str, Any] = GROUPS) -> dict[str, Any]:
    folder = Path(str(resources.files("separata_adanorm"))) / "configs"
    return from_yaml(folder / f"{name}.yaml", groups)


# The training command of the authors' README and the defaults it falls back to.
DE_EN = {
    "model.encoder_layers": 6,
    "model.decoder_layers": 6,
    "model.width": 512,
    "model.hidden_width": 1024,
    "model.num_heads": 4,
    "model.normalisation": "pre",
    "model.embeddings": "joint",
    "model.dropout": 0.3,
    "model.attention_dropout": 0.1,
    "model.activation_dropout": 0.1,
    "model.initialisation": "km",
    "model.C": 1.0,
    "data.max_tokens": 4096,
    "train.accumulate": 2,
    "train.optimizer": "adamw",
    "train.betas": (0.9, 0.98),
    "train.eps": 1e-8,
    "train.weight_decay": 1e-4,
    "train.clip_norm": 0.0,
    "train.lr_min": 1e-9,
    "train.steps": 90_000,
    "decode.beam": 5,
    "decode.length_penalty": "power",
    "decode.alpha": 1.0,
}


@pytest.mark.parametrize("key", DE_EN)
def test_german_english_has_the_value_of_the_authors_command(key: str) -> None:
    group, _, field = key.partition(".")
    assert getattr(shipped("iwslt14_de_en")[group], field) == DE_EN[key]


def test_german_english_warms_up_to_its_peak_in_8000_updates() -> None:
    config = shipped("iwslt14_de_en")["train"]
    rate = make_schedule(config)
    assert rate(8000) == pytest.approx(1.5e-3)
    assert rate(32_000) == pytest.approx(1.5e-3 / 2)
    assert rate(0) == pytest.approx(1e-7, abs=2e-7)


def test_the_poster_counts_twelve_layers() -> None:
    for name in ("iwslt14_de_en", "iwslt15_en_vi", "wmt14_en_de"):
        model = shipped(name)["model"]
        assert model.encoder_layers + model.decoder_layers == 12
    groups = {"language_model": LanguageModelConfig}
    assert shipped("enwik8", groups)["language_model"].num_layers == 12


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_german_english_without_gains_and_biases_has_32768_parameters_less() -> None:
    sizes = {"source_vocabulary_size": 100, "target_vocabulary_size": 100}
    counts = {}
    for norm in ("layer_norm", "ada_norm"):
        config = ModelConfig(hidden_width=1024, num_heads=4, norm=norm, **sizes)  # type: ignore[arg-type]
        with torch.device("meta"):
            counts[norm] = parameters(build_model(config))
    assert counts["layer_norm"] - counts["ada_norm"] == 32 * 2 * 512


def test_chebyshev_keeps_99_percent_of_the_features_below_the_flip() -> None:
    # P(|y| < 1 / k) >= 1 - k^2, whatever the distribution; k = 1/10.
    torch.manual_seed(0)
    heavy = torch.randn(64, 512) / torch.rand(64, 512)  # no variance at all
    y = layer_norm_simple(heavy, convention="torch", eps=0.0)
    assert (y.abs() < 10).double().mean() >= 0.99


def test_the_scaling_has_the_mean_c_and_the_output_the_mean_minus_c_k() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 512, dtype=torch.float64)
    z = ada_norm(x, C=2.0, eps=0.0, convention="torch")
    y = layer_norm_simple(x, eps=0.0, convention="torch")
    torch.testing.assert_close((z / y).mean(dim=1), torch.full((8,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(z.mean(dim=1), torch.full((8,), -0.2, dtype=torch.float64))

"""A small model of made sentences, trained for a few steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_shared.nn import Transformer
from separata_shared.training import TrainConfig
from separata_shared.translation import (
    DataConfig,
    DecodeConfig,
    TransformerConfig,
    build_transformer,
    fit_translation,
    load_for,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread, and the order of additions is then fixed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """Settings of a small model of made sentences; seconds suffice."""
    return {
        "model": TransformerConfig(
            width=16,
            num_heads=2,
            hidden_width=24,
            encoder_layers=2,
            decoder_layers=2,
            dropout=0.1,
            max_length=16,
        ),
        "data": DataConfig(
            tiny_pairs=150, tiny_symbols=6, tiny_length=9, max_length=16, max_tokens=160
        ),
        "train": TrainConfig(
            steps=24, lr=5e-3, save_every=8, evaluate_every=8, log_every=8, device="cpu"
        ),
        "decode": DecodeConfig(beam=3, max_length_constant=4),
        "label_smoothing": 0.1,
    }


@pytest.fixture(scope="session")
def trained_run(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a small model; tests may read it but write elsewhere."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    corpus, model = load_for(small["model"], small["data"])
    torch.manual_seed(small["train"].seed)
    network = build_transformer(model, Transformer)
    fit_translation(network, corpus, settings={**small, "model": model}, run=run)
    return run

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_explicit_sparse_transformer.config import AttentionConfig, DecodeConfig, ModelConfig
from separata_explicit_sparse_transformer.data import DataConfig
from separata_explicit_sparse_transformer.train import train
from separata_shared.testing.parity import goldens_option, pytest_generate_tests
from separata_shared.training import TrainConfig

__all__ = ["pytest_addoption", "pytest_generate_tests"]

pytest_addoption = goldens_option(Path(__file__).parent / "goldens")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread, and the order of additions is then fixed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """Settings of ``train`` for a small sparse model of made sentences; seconds suffice."""
    return {
        "model": ModelConfig(
            width=16,
            num_heads=2,
            hidden_width=24,
            encoder_layers=2,
            decoder_layers=2,
            dropout=0.1,
            max_length=16,
            attention=AttentionConfig(top_k=3),
        ),
        "data": DataConfig(
            tiny_pairs=150, tiny_symbols=6, tiny_length=9, max_length=16, max_tokens=160
        ),
        "train": TrainConfig(
            steps=24, lr=5e-3, save_every=8, evaluate_every=8, log_every=8, device="cpu"
        ),
        "decode": DecodeConfig(beam=3, max_length_constant=4),
    }


@pytest.fixture(scope="session")
def trained_run(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a small sparse model; tests may read it but write elsewhere."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    train(**small, run=run)
    return run

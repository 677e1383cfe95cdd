import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from separata_imitation_nat.__main__ import PACKAGE, VERBS
from separata_imitation_nat.config import (
    DataConfig,
    DecodeConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelDecodeConfig,
    StagesConfig,
)
from separata_imitation_nat.distill import distill
from separata_imitation_nat.train import train, train_demonstrator, train_teacher
from separata_shared.cli import main
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
    """Settings of the whole pipeline for small models of made sentences; seconds suffice."""
    return {
        "model": ModelConfig(
            width=16,
            num_heads=2,
            hidden_width=24,
            encoder_layers=2,
            decoder_layers=2,
            dropout=0.1,
            max_length=32,
            num_actions=8,
        ),
        "data": DataConfig(
            tiny_task="map", tiny_pairs=150, tiny_symbols=6, tiny_length=9, max_length=16,
            max_tokens=160,
        ),
        "train": TrainConfig(
            steps=24, lr=5e-3, save_every=8, evaluate_every=8, log_every=8, device="cpu"
        ),
        "decode": DecodeConfig(beam=3, max_length_constant=4),
        "parallel": ParallelDecodeConfig(radius=1),
        "objective": ObjectiveConfig(imitation=0.1),
        "stages": StagesConfig(),
        "label_smoothing": 0.1,
    }  # fmt: skip


def settings_of(small: dict[str, Any], *without: str) -> dict[str, Any]:
    """The groups that a verb takes."""
    return {name: value for name, value in small.items() if name not in without}


@pytest.fixture(scope="session")
def teacher(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a small teacher; tests may read it but write elsewhere."""
    run = tmp_path_factory.mktemp("pipeline") / "teacher"
    train_teacher(**settings_of(small, "parallel", "objective"), run=run)
    return run


@pytest.fixture(scope="session")
def distilled(teacher: Path) -> Path:
    """The training part in the teacher's words, in shards of 40 lines."""
    output = teacher.parent / "distilled"
    distill(teacher=teacher, output=output, beam=2, shard_lines=40)
    return output


@pytest.fixture(scope="session")
def demonstrator(small: dict[str, Any], distilled: Path) -> Path:
    """Run directory of a small demonstrator."""
    run = distilled.parent / "demonstrator"
    train_demonstrator(**settings_of(small, "parallel"), distilled=distilled, run=run)
    return run


@pytest.fixture(scope="session")
def learner(small: dict[str, Any], distilled: Path, demonstrator: Path) -> Path:
    """Run directory of a small learner that imitates."""
    run = distilled.parent / "learner"
    train(**from_stages(small, distilled.parent), run=run)
    return run


def from_stages(small: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``small`` with earlier stages that stand in ``folder``, which are not made again."""
    stages = {name: folder / name for name in ("teacher", "distilled", "demonstrator")}
    return small | stages

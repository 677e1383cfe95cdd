"""What the small experiments share: reading a finished run and writing down its scores."""

from pathlib import Path
from typing import Any

import torch
from separata_shared.cli import from_yaml
from separata_shared.files import need_file as need_file
from separata_shared.files import write_json
from separata_shared.metrics import Score
from separata_shared.training import Run
from separata_shared.training.weights import load_weights
from torch import nn


def run_config(run: Path, group: str, kind: type) -> Any:
    """One group of the configuration of a run.

    Raises:
        ValueError: ``run`` is no run directory, or one of something else.
    """
    directory = Run(run)
    if not directory.config.exists():
        raise ValueError(f"{run}: not a run directory; train one first")
    return from_yaml(directory.config, {group: kind})[group]


def load_best(model: nn.Module, run: Path, weights: Path | None) -> Path:
    """Give ``model`` the weights named, or the best of the run, and make it ready to predict."""
    path = weights or Run(run).best_weights()
    load_weights(model, path)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return path


def write_scores(run: Path, split: str, weights: Path, scores: dict[str, Score]) -> dict[str, Any]:
    """Write the scores of a part into the run directory, show them and give them back."""
    record = {
        "split": split,
        "weights": weights.name,
        "metrics": {name: score.as_dict() for name, score in scores.items()},
    }
    path = Run(run).scores if split == "test" else run / f"scores.{split}.json"
    write_json(path, record)
    for name, score in scores.items():
        print(f"{name}: {score.value:.2f} {score.unit} (n = {score.n})")
    print(path)
    return record

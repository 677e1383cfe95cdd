"""Run directories of this package, and trained recommenders read from them.

```
recommender/       run of train-rec; ``vectors/`` keeps what the graph layer computes
autorec/           run of train-autorec, the baseline
dialog/            run of train-dialog
scores.json        written by evaluate
```
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from separata_shared.cli import from_yaml
from separata_shared.training import Run, load_weights, read_weights, save_weights

from .build import build_recommender
from .config import DataConfig, RecommenderConfig
from .data import Corpus, load
from .model import FrozenRecommender

RECOMMENDER, AUTOREC, DIALOG = "recommender", "autorec", "dialog"


@dataclass(frozen=True, kw_only=True)
class TrainedRecommender:
    """A recommender read from a run directory, with the data it was trained on."""

    data: DataConfig
    config: RecommenderConfig
    corpus: Corpus
    model: FrozenRecommender
    weights: Path


def part_config(run: Path, part: str, groups: dict[str, type]) -> tuple[Run, dict[str, Any]]:
    """A part of a run directory, and groups of its configuration.

    Raises:
        ValueError: The part is missing; the message names the directory and the verb to run.
    """
    directory = Run(run / part)
    if not directory.config.is_file():
        verb = {RECOMMENDER: "train-rec", AUTOREC: "train-autorec", DIALOG: "train-dialog"}[part]
        raise ValueError(f"{directory.path}: nothing trained there; run the verb {verb} first")
    return directory, from_yaml(directory.config, groups)


def load_recommender(run: Path, *, weights: Path | None = None) -> TrainedRecommender:
    """Read a trained recommender.

    The vectors of all nodes are computed the first time and, for weights of the run itself, kept
    beside them, so that neither the graph layer nor its parameters are needed again.

    Args:
        run: Run directory.
        weights: Weights file; default: the best of the run.

    Raises:
        ValueError: The run or its data cannot be read, or do not fit each other.
    """
    groups = {"data": DataConfig, "recommender": RecommenderConfig}
    directory, values = part_config(run, RECOMMENDER, groups)
    data, config = values["data"], values["recommender"]
    corpus = load(data)
    path = weights or directory.best_weights()
    vectors = directory.path / "vectors" / path.name
    own = path.parent.resolve() == directory.weights.resolve()  # others may have the same name
    if own and _is_newer(vectors, path):
        frozen = read_frozen(vectors)
        if frozen.H.shape != (corpus.graph.num_nodes, config.width):
            raise ValueError(f"{vectors}: vectors {tuple(frozen.H.shape)} are of another graph")
    else:
        model = build_recommender(config, corpus.graph)
        load_weights(model, path)
        frozen = model.frozen()
        if own:
            save_weights(vectors, frozen.state_dict())
    return TrainedRecommender(
        data=data, config=config, corpus=corpus, model=frozen.eval(), weights=path
    )


def read_frozen(path: Path) -> FrozenRecommender:
    """Read the tensors of a ``FrozenRecommender``.

    Raises:
        ValueError: The file is missing, damaged or something else.
    """
    state = read_weights(path)
    names = {"H", "user.a", "user.b", "output_bias"}
    if state.keys() != names:
        raise ValueError(f"{path}: not the vectors of a recommender; they are {sorted(names)}")
    d = state["H"].shape[-1]
    wanted = {"user.a": (d, d), "user.b": (d, 1), "output_bias": (len(state["H"]),)}
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(state[name].shape)}, not {shape}")
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        raise ValueError(f"{path}: holds NaN or infinite numbers")
    return FrozenRecommender(
        state["H"], a=state["user.a"], b=state["user.b"], output_bias=state["output_bias"]
    )


def _is_newer(file: Path, source: Path) -> bool:
    if not file.is_file() or not source.is_file():
        return False
    return file.stat().st_mtime_ns >= source.stat().st_mtime_ns

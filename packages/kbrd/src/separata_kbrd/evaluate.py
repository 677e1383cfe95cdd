"""Scores of a trained system: the verbs ``evaluate`` and ``summarise``."""

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from separata_shared.files import read_json, write_json
from separata_shared.training import Run, load_weights

from .build import build_autorec
from .config import DataConfig, RecommenderConfig
from .data import Corpus
from .recommendation import (
    Scorer,
    autorec_scorer,
    popularity,
    rank_instances,
    repetition,
    report,
)
from .runs import AUTOREC, DIALOG, TrainedRecommender, load_recommender, part_config

BATCH_PAIRS = 256


def evaluate(
    *,
    run: Path = Path("runs/tiny"),
    split: Literal["valid", "test"] = "test",
    weights: Path | None = None,
) -> dict[str, Any]:
    """Score the recommender beside its baselines, and the dialog model if it is trained.

    Recall is counted over (turn, target) instances; items of the context are candidates like all
    others. ``new`` counts only targets that were not mentioned before.

    Args:
        run: Run directory.
        split: Part of the dialogs.
        weights: Weights file of the recommender; default: the best of the run.

    Returns:
        What was written: ``scores.json`` in the run directory for the test part,
        ``scores.valid.json`` for the other.

    Raises:
        ValueError: The run or its data cannot be read, or the part recommends nothing.
    """
    trained = load_recommender(run, weights=weights)
    record: dict[str, Any] = {"split": split, "weights": trained.weights.name}
    record["recommender"] = recommender_scores(trained, run, split)
    if (run / DIALOG / "config.yaml").is_file():
        from .evaluate_dialog import dialog_scores

        record["dialog"] = dialog_scores(run, split)
    path = Run(run).scores if split == "test" else run / f"scores.{split}.json"
    write_json(path, record)
    print(path)
    return record


def recommender_scores(
    trained: TrainedRecommender, run: Path, split: Literal["valid", "test"]
) -> dict[str, Any]:
    """Recall of the recommender and of what it is compared with, also printed as a table."""
    graph, config = trained.corpus.graph, trained.config
    items = torch.tensor(graph.items)
    batches = getattr(trained.corpus, split).recommender_in_order(
        BATCH_PAIRS, mentions=config.mentions
    )
    model = trained.model
    scorers: dict[str, Scorer] = {
        "kbrd": lambda batch: model(batch.nodes, batch.mask),
        **baselines(trained.corpus, config, run),
    }
    result: dict[str, Any] = {
        "candidates": len(items),
        "ties": "an item of equal score stands before the target",
    }
    for name, scorer in scorers.items():
        ranked, loss = rank_instances(scorer, batches, items)
        result[name] = report(ranked)
        if name in ("kbrd", "autorec"):
            result[name]["loss"] = loss
        for part in ("all", "new"):
            if part in result[name]:
                values = [f"{score['value']:.2f}" for score in result[name][part].values()]
                count = result[name][part]["recall@1"]["n"]
                print(f"{name:<12}{part:<5}recall@1/10/50 {' / '.join(values)} % (n = {count})")
    return result


def baselines(corpus: Corpus, config: RecommenderConfig, run: Path) -> dict[str, Scorer]:
    """Popularity, repetition and, where it is trained, the autoencoder."""
    N = corpus.graph.num_nodes
    training = corpus.train.recommender_in_order(BATCH_PAIRS, mentions=config.mentions)
    found = {
        "popularity": popularity((batch.target for batch in training), N),
        "repetition": repetition(N),
    }
    if (run / AUTOREC / "config.yaml").is_file():
        groups = {"data": DataConfig, "recommender": RecommenderConfig}
        directory, values = part_config(run, AUTOREC, groups)
        model = build_autorec(values["recommender"], corpus.graph)
        load_weights(model, directory.best_weights())
        found["autorec"] = autorec_scorer(model.eval())
    return found


def summarise(
    *,
    runs: list[Path],
    output: Path = Path("summary.json"),
    split: Literal["valid", "test"] = "test",
) -> dict[str, Any]:
    """Mean and standard deviation over runs that differ in their seed.

    Args:
        runs: Run directories that were evaluated.
        output: JSON file to write.
        split: Part of the dialogs.

    Returns:
        What was written: for each number its mean, its standard deviation over the runs (of a
        sample; null for one run) and the number of each run.

    Raises:
        ValueError: A run is not evaluated, or the runs were scored on different things.
    """
    if not runs:
        raise ValueError("runs: name at least one run directory")
    name = "scores.json" if split == "test" else f"scores.{split}.json"
    records = [dict(numbers(read_json(run / name))) for run in runs]
    for run, record in zip(runs, records, strict=True):
        if record.keys() != records[0].keys():
            other = sorted(record.keys() ^ records[0].keys())[0]
            raise ValueError(f"{run / name}: differs from {runs[0] / name} in {other}")
    scores = {key: _spread([record[key] for record in records]) for key in records[0]}
    summary = {"runs": [str(run) for run in runs], "split": split, "scores": scores}
    write_json(output, summary)
    for key, value in scores.items():
        if ".all." in key or ".new." in key or key.startswith("dialog."):
            std = "" if value["std"] is None else f" ± {value['std']:.2f}"
            print(f"{key:<40}{value['mean']:.2f}{std}")
    print(output)
    return summary


def numbers(record: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every score of a record as its dotted place and its value."""
    if not isinstance(record, dict):
        return
    if isinstance(record.get("value"), int | float) and "signature" in record:
        yield place, float(record["value"])
        return
    for key, value in record.items():
        yield from numbers(value, f"{place}.{key}" if place else key)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    mean = math.fsum(values) / len(values)
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": mean, "std": std, "values": list(values)}

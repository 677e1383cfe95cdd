"""One experiment with several norms and seeds: the verb ``compare``."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from separata_shared.cli import to_yaml
from separata_shared.files import read_json, read_text, write_json
from separata_shared.training import Run, TrainConfig

from .build import NormKind
from .classify import evaluate_images, evaluate_sentences, train_images, train_sentences
from .images import ImageConfig
from .parsing import ParserConfig, evaluate_parser, train_parser
from .sentences import SentenceConfig

PAPER_NORMS: tuple[NormKind, ...] = (
    "no_norm",
    "layer_norm",
    "layer_norm_simple",
    "detach_norm",
    "ada_norm",
)


@dataclass(frozen=True)
class Experiment:
    """One of the small experiments, and what trains and scores it."""

    group: str
    """Name of its group of settings."""
    config: Any
    train: Callable[..., object]
    evaluate: Callable[..., dict[str, Any]]
    metric: str
    """The number that is compared."""


def compare(
    *,
    train: TrainConfig,
    images: ImageConfig | None = None,
    sentences: SentenceConfig | None = None,
    parser: ParserConfig | None = None,
    norms: list[NormKind] | None = None,
    seeds: list[int] | None = None,
    run: Path = Path("runs/tiny-compare"),
) -> dict[str, Any]:
    """Train and score an experiment with several norms and seeds; runs that are done stay.

    The experiment is the one that the configuration describes; if it describes several, each is
    done with the same training settings.

    Args:
        train: Training; its seed is replaced.
        images: Settings of the image classifier; its norm is replaced.
        sentences: Settings of the sentence classifier; its norm is replaced.
        parser: Settings of the parser; its norm is replaced.
        norms: Kinds of norms; default: the five of the paper's table.
        seeds: Seeds; default: 1, 2 and 3.
        run: Directory for the runs and the table, ``scores.json``.

    Returns:
        What was written to the table.

    Raises:
        ValueError: There is no experiment, or one cannot be run.
    """
    experiments = [
        Experiment("images", images, train_images, evaluate_images, "accuracy"),
        Experiment("sentences", sentences, train_sentences, evaluate_sentences, "accuracy"),
        Experiment("parser", parser, train_parser, evaluate_parser, "uas"),
    ]
    wanted = [experiment for experiment in experiments if experiment.config is not None]
    if not wanted:
        raise ValueError("compare: the configuration has none of images, sentences and parser")
    table = {
        experiment.group: {
            kind: summary(
                [
                    run_once(experiment, kind, replace(train, seed=seed), run)
                    for seed in seeds or (1, 2, 3)
                ]
            )
            for kind in norms or PAPER_NORMS
        }
        for experiment in wanted
    }
    write_json(run / "scores.json", table)
    for group, rows in table.items():
        for kind, row in rows.items():
            spread = "" if row["std"] is None else f" +- {row['std']:.2f}"
            print(f"{group}  {kind:<18}{row['mean']:6.2f}{spread}  ({len(row['seeds'])} seeds)")
    print(run / "scores.json")
    return table


def run_once(experiment: Experiment, kind: NormKind, train: TrainConfig, folder: Path) -> Any:
    """Train and score one model, unless the same was done before.

    Returns:
        Its record: seed, score, seconds of training and best step.
    """
    path = folder / f"{experiment.group}-{kind}-seed{train.seed}"
    record, run = path / "record.json", Run(path)
    groups = {experiment.group: replace(experiment.config, norm=kind), "train": train}
    if record.exists() and read_text(run.config) == to_yaml(groups):
        return _checked(read_json(record), record)
    began = time.perf_counter(), time.process_time()
    experiment.train(**groups, run=path)
    ended = time.perf_counter(), time.process_time()
    score = experiment.evaluate(run=path)["metrics"][experiment.metric]
    done = {
        "seed": train.seed,
        "metric": experiment.metric,
        "value": score["value"],
        "n": score["n"],
        "weights": run.best_weights().name,
        "seconds": round(ended[0] - began[0], 1),
        "cpu_seconds": round(ended[1] - began[1], 1),
    }
    write_json(record, done)
    return done


def _checked(content: Any, path: Path) -> Any:
    kinds = {"seed": int, "metric": str, "value": float | int, "seconds": float | int}
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"{path}: not a record of this command; delete it to train again")
    return content


def summary(records: list[Any]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, with the numbers they come from."""
    values = [record["value"] for record in records]
    return {
        "metric": records[0]["metric"],
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "seeds": [record["seed"] for record in records],
        "values": values,
        "seconds": sum(record["seconds"] for record in records),
    }

"""One setting varied, everything else equal: the verbs ``sweep-k`` and ``ablate-phase``."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from separata_shared.files import read_json, write_json
from separata_shared.training import Run, TrainConfig

from .config import AttentionConfig, DecodeConfig, ModelConfig
from .data import DataConfig
from .evaluate import evaluate
from .plot import pyplot, save_figure
from .train import train as train_one

METRIC = "bleu_detokenised"


@dataclass(frozen=True)
class Series:
    """Scores of one setting on the test part, over its seeds."""

    label: str
    """The setting."""
    seeds: list[int] = field(default_factory=list)
    """Seed of each run."""
    test: list[float] = field(default_factory=list)
    """BLEU of each run on the test part, percent."""

    def __str__(self) -> str:
        spread = f" +- {stdev(self.test):.2f}" if len(self.test) > 1 else ""
        return f"{self.label:>14}  {mean(self.test):6.2f}{spread}  ({len(self.test)} seeds)"


def sweep_k(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    label_smoothing: float = 0.1,
    top_k: list[int] | None = None,
    seeds: list[int] | None = None,
    run: Path = Path("runs/tiny-sweep-k"),
) -> list[dict[str, Any]]:
    """Train and score the model for several k, and densely; draw BLEU over k.

    Runs that are finished are not made again.

    Args:
        model: Sizes and wiring; its k is replaced.
        data: Corpus.
        train: Training; its seed is replaced.
        decode: Beam search.
        label_smoothing: Share of the target probability spread over the vocabulary.
        top_k: Numbers of keys; default: 2, 4, 8 and 16.
        seeds: Seeds of each setting; default: the one of ``train``.
        run: Directory for the runs, ``sweep.json`` and ``sweep.png``.

    Returns:
        One record per setting.
    """
    pyplot()  # missing, it should be missed before the training
    numbers = top_k or [2, 4, 8, 16]
    settings = {"dense": replace(model.attention, sites=[])}
    settings |= {
        f"k = {k}": replace(model.attention, kind="topk", top_k=k) for k in sorted(set(numbers))
    }
    series = _runs(settings, model, data, train, decode, label_smoothing, seeds, run)
    _draw(series, "keys kept per query", run / "sweep.png")
    return _report(series, run / "sweep.json")


def ablate_phase(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    label_smoothing: float = 0.1,
    seeds: list[int] | None = None,
    run: Path = Path("runs/tiny-ablate-phase"),
) -> list[dict[str, Any]]:
    """Train and score the model with selection never, in one phase only, and in both.

    Runs that are finished are not made again.

    Args:
        model: Sizes, wiring and the selection.
        data: Corpus.
        train: Training; its seed is replaced.
        decode: Beam search.
        label_smoothing: Share of the target probability spread over the vocabulary.
        seeds: Seeds of each setting; default: the one of ``train``.
        run: Directory for the runs, ``phases.json`` and ``phases.png``.

    Returns:
        One record per setting.
    """
    pyplot()  # missing, it should be missed before the training
    attention = model.attention
    settings = {
        "dense": replace(attention, sites=[]),
        "train only": replace(attention, phase="train"),
        "predict only": replace(attention, phase="predict"),
        "both": replace(attention, phase="both"),
    }
    series = _runs(settings, model, data, train, decode, label_smoothing, seeds, run)
    _draw(series, "phase in which attention is sparse", run / "phases.png")
    return _report(series, run / "phases.json")


def _runs(
    settings: Mapping[str, AttentionConfig],
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    label_smoothing: float,
    seeds: list[int] | None,
    run: Path,
) -> list[Series]:
    """Train and score every setting with every seed."""
    all_series = []
    for label, attention in settings.items():
        series = Series(label)
        for seed in seeds or [train.seed]:
            directory = run / f"{label.replace(' = ', '').replace(' ', '-')}-seed{seed}"
            train_one(
                model=replace(model, attention=attention),
                data=data,
                train=replace(train, seed=seed),
                decode=decode,
                label_smoothing=label_smoothing,
                run=directory,
            )
            series.seeds.append(seed)
            series.test.append(_scores(directory)["metrics"][METRIC]["value"])
        all_series.append(series)
    return all_series


def _scores(directory: Path) -> dict[str, Any]:
    """Scores of a run on the test part, made unless those of its best weights are there."""
    run = Run(directory)
    scores = read_json(run.scores) if run.scores.exists() else {}
    wanted = {"split": "test", "weights": run.best_weights().name}
    if isinstance(scores, dict) and scores.items() >= wanted.items():
        return scores
    return evaluate(run=directory)


def _report(all_series: list[Series], path: Path) -> list[dict[str, Any]]:
    for series in all_series:
        print(series)
    records = [
        {"setting": s.label, "metric": METRIC, "seeds": s.seeds, "test": s.test} for s in all_series
    ]
    write_json(path, records)
    print(path)
    return records


def _draw(all_series: list[Series], title: str, path: Path) -> None:
    figure, axis = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for place, series in enumerate(all_series):
        axis.plot([place] * len(series.test), series.test, "o", color="tab:blue", alpha=0.5)
    axis.plot([mean(s.test) for s in all_series], "_", color="black", markersize=24)
    axis.axhline(mean(all_series[0].test), color="tab:gray", linestyle=":", label="dense, mean")
    axis.set_xticks(range(len(all_series)), [series.label for series in all_series])
    axis.set_xlabel(title)
    axis.set_ylabel("BLEU on the test part (percent)")
    axis.legend()
    save_figure(figure, path)

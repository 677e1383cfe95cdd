"""The method and its baselines with paired seeds: the verb ``ablate``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from separata_shared.files import read_lines, write_json
from separata_shared.training import TrainConfig
from separata_shared.translation import load

from .config import (
    DataConfig,
    DecodeConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelDecodeConfig,
    StagesConfig,
)
from .evaluate import text_of
from .quality import paired_bootstrap
from .reproduce import evaluate_once, prepare_once
from .train import announce, earlier_stages, train_mask_predict, train_teacher
from .train import train as train_learner

Row = Literal["autoregressive", "deep-encoder", "vanilla", "soft-copy", "imitation", "mask-predict"]
Targets = Literal["distilled", "raw"]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One row of the ablation on one kind of targets."""

    name: str
    train: Callable[[TrainConfig, Path], object]
    """Trains it with the given settings in the given run directory."""


def ablate(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    parallel: ParallelDecodeConfig,
    objective: ObjectiveConfig,
    stages: StagesConfig,
    label_smoothing: float = 0.1,
    rows: list[Row] | None = None,
    weights: list[float] | None = None,
    targets: list[Targets] | None = None,
    seeds: list[int] | None = None,
    samples: int = 1000,
    run: Path = Path("runs/tiny"),
) -> dict[str, Any]:
    """Train and score baselines and method with paired seeds, and print the ablation.

    The earlier stages are made once and shared by all rows. Rows and seeds that are finished are
    not made again. All learners start from the same parameters, so that the rows differ in what
    they are named after: ``vanilla`` copies the source uniformly, ``soft-copy`` softly, and
    ``imitation`` adds the imitation loss to the soft copy. ``autoregressive`` is a Transformer of
    the same sizes, ``deep-encoder`` one with a decoder of one layer and as many layers in the
    encoder as both stacks had (12-1 for 6-6).

    Args:
        model: Sizes, wiring, actions and copy; the copy is that of ``soft-copy`` and ``imitation``.
        data: Corpus.
        train: Training; its seed is that of the earlier stages, and replaced for the rows.
        decode: Beam search.
        parallel: How learners choose among lengths.
        objective: Weights of the losses; that of the imitation is replaced.
        stages: Steps of the earlier stages.
        label_smoothing: Share of the target probability spread over the vocabulary.
        rows: What to train; default: vanilla, soft-copy and imitation.
        weights: Weights of the imitation loss; default: the one of ``objective``.
        targets: Training targets; default: those of ``stages``.
        seeds: Seeds of each row; default: the one of ``train``.
        samples: Resamples of the bootstrap.
        run: Directory for all runs and the table, ``ablation.json``.

    Returns:
        What was written to the table.

    Raises:
        ValueError: An option does not fit, or a row cannot be trained or scored.
    """
    if samples < 1:
        raise ValueError(f"samples: must be at least 1, got {samples}")
    given = {"rows": rows, "weights": weights, "targets": targets, "seeds": seeds}
    for name, values in given.items():
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{name}: needs different values, at least one, got {values}")
    for weight in weights or ():
        replace(objective, imitation=weight)  # refuses a weight before anything is trained
    prepare_once(data)
    settings: Settings = {"model": model, "data": data, "train": train, "decode": decode}
    settings |= {"parallel": parallel, "objective": objective, "label_smoothing": label_smoothing}
    table: dict[str, Any] = {}
    for kind in targets or [stages.targets]:
        chosen = settings | {"stages": replace(stages, targets=kind)}
        variants = variants_of(chosen, rows, weights, run)
        found = {
            variant.name: [
                _run_once(
                    variant, replace(train, seed=seed), run / f"{variant.name}-seed{seed}", run
                )
                for seed in seeds or [train.seed]
            ]
            for variant in variants
        }
        table[kind] = compare(found, load(data).test.target_lines, samples)
    write_json(run / "ablation.json", table)
    print(as_text(table))
    print(run / "ablation.json")
    return table


def variants_of(
    settings: Settings, rows: Sequence[Row] | None, weights: Sequence[float] | None, run: Path
) -> list[Variant]:
    """The rows wanted on one kind of targets; the earlier stages that they need are made."""
    model, objective, kind = settings["model"], settings["objective"], settings["stages"].targets
    places: dict[str, Any] = {"teacher": run / "teacher", "distilled": run / "distilled"}
    places["demonstrator"] = run / ("demonstrator" if kind == "distilled" else "demonstrator-raw")
    rows = rows or ("vanilla", "soft-copy", "imitation")
    learners = {"vanilla", "soft-copy", "imitation"} & set(rows)
    earlier_stages(settings, **places | ({} if learners else {"demonstrator": None}))
    names = ("model", "data", "decode", "stages", "label_smoothing")
    groups = {name: settings[name] for name in names}

    def learner(copy: str, imitation: float) -> Callable[[TrainConfig, Path], object]:
        changed = settings | {
            "model": replace(model, copy=copy),
            "objective": replace(objective, imitation=imitation),
        }
        return lambda train, path: train_learner(**changed | {"train": train}, **places, run=path)

    def translator(**layers: int) -> Callable[[TrainConfig, Path], object]:
        changed = groups | {"model": replace(model, **layers)}
        changed["stages"] = replace(settings["stages"], teacher_steps=0)
        text = places["distilled"] if kind == "distilled" else None
        return lambda train, path: train_teacher(**changed, train=train, distilled=text, run=path)

    def iterative(train: TrainConfig, path: Path) -> object:
        return train_mask_predict(
            **groups, objective=objective, train=train, distilled=places["distilled"], run=path
        )

    deep = model.encoder_layers + model.decoder_layers
    makers = {
        "autoregressive": translator(),
        "deep-encoder": translator(encoder_layers=deep, decoder_layers=1),
        "vanilla": learner("uniform", 0.0),
        "soft-copy": learner(model.copy, 0.0),
        "mask-predict": iterative,
    }
    wanted: dict[str, Callable[[TrainConfig, Path], object]] = {}
    for row in rows:
        if row == "imitation":
            for weight in weights or [objective.imitation]:
                wanted[f"imitation-{weight:g}"] = learner(model.copy, weight)
        else:
            wanted[row] = makers[row]
    return [Variant(f"{name}-{kind}", make) for name, make in wanted.items()]


def _run_once(variant: Variant, train: TrainConfig, path: Path, folder: Path) -> dict[str, Any]:
    """Train and score one row with one seed, unless that was done."""
    announce(path, f"{variant.name}, seed {train.seed}")
    variant.train(train, path)
    scores = evaluate_once(path, scorer=folder / "teacher")
    return {"run": path, "seed": train.seed, "scores": scores}


def compare(
    found: Mapping[str, Sequence[Mapping[str, Any]]], references: Sequence[str], samples: int
) -> dict[str, Any]:
    """Means over the seeds, and paired-bootstrap intervals of these means over the sentences.

    Every way to decode a row is a line of its own. Differences are taken to ``soft-copy`` decoded
    in the same way where there is one, else to the first line decoded in that way.

    Args:
        found: Runs of each row, one for each seed, the seeds in the same order everywhere.
        references: Reference translations of the test part.
        samples: Resamples.
    """
    lines: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, list[list[str]]]] = {}
    for name, runs in found.items():
        for mode in runs[0]["scores"]["translations"]:
            scores = [run["scores"]["translations"][mode] for run in runs]
            lines[f"{name}, {mode}"] = _line(scores, [run["seed"] for run in runs])
            found_lines = [read_lines(text_of(run["run"], mode)) for run in runs]
            texts.setdefault(mode, {})[name] = found_lines
    for mode, systems in texts.items():
        baseline = next((name for name in systems if name.startswith("soft-copy")), None)
        baseline = baseline or next(iter(systems))
        intervals = paired_bootstrap(systems, references, baseline=baseline, samples=samples)
        for name, values in intervals.items():
            lines[f"{name}, {mode}"] |= {"bootstrap": values, "compared_with": baseline}
    return lines


def _line(scores: Sequence[Mapping[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """Mean and standard deviation of every number over the seeds."""
    line: dict[str, Any] = {"seeds": seeds}
    for name in ("bleu_detokenised", "bleu_tokenised", "repeated_tokens"):
        values = [score["raw"][name]["value"] for score in scores]
        spread = stdev(values) if len(values) > 1 else None
        signature = scores[0]["raw"][name]["signature"]
        line[name] = {"mean": mean(values), "std": spread, "values": values, "signature": signature}
    return line


def as_text(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for a reader: BLEU with its interval, and the difference to the baseline."""
    rows = []
    for lines in table.values():
        for name, line in lines.items():
            bootstrap = line["bootstrap"]
            low, high = bootstrap["interval"]
            least, most = bootstrap["difference_interval"]
            rows.append(
                f"{name:<40} {line['bleu_detokenised']['mean']:6.2f} [{low:.2f}, {high:.2f}]  "
                f"difference {bootstrap['difference']:+.2f} [{least:+.2f}, {most:+.2f}]  "
                f"repeated {line['repeated_tokens']['mean']:.1f} %  seeds {len(line['seeds'])}"
            )
    signature = next(
        line["bleu_detokenised"]["signature"] for lines in table.values() for line in lines.values()
    )
    return "\n".join([*rows, f"{signature}; intervals: 95 %, paired bootstrap over sentences"])

"""The whole pipeline as one command: the verb ``reproduce``."""

from pathlib import Path
from typing import Any

from separata_shared.data.prepared import MANIFEST, open_prepared
from separata_shared.files import read_json, sha256
from separata_shared.training import Run, TrainConfig
from separata_shared.translation import prepare
from separata_shared.translation.data import settings as data_settings

from .config import (
    DataConfig,
    DecodeConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelDecodeConfig,
    StagesConfig,
)
from .evaluate import evaluate
from .generate import open_run
from .train import announce, earlier_stages
from .train import train as train_learner


def reproduce(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    parallel: ParallelDecodeConfig,
    objective: ObjectiveConfig,
    stages: StagesConfig,
    label_smoothing: float = 0.1,
    run: Path = Path("runs/tiny"),
) -> dict[str, Any]:
    """Prepare, train the teacher, distill, train demonstrator and learner, and evaluate.

    Every stage that is there and valid stays as it is; one that was stopped goes on. A stage that
    was made with other settings, or from other files, is an error that names it.

    Args:
        model: Sizes, wiring, actions and copy.
        data: Which corpus, and how it is cut into batches.
        train: Optimizer, schedule, length of training, checkpoints.
        decode: Beam search of teacher and demonstrator.
        parallel: How the learner chooses among lengths.
        objective: Weights of the losses.
        stages: Steps of the earlier stages, and what they hand on.
        label_smoothing: Share of the target probability spread over the vocabulary.
        run: Directory of the run directories ``teacher``, ``distilled``, ``demonstrator`` and
            ``learner``.

    Returns:
        Scores of the learner on the test part.

    Raises:
        ValueError: A stage failed, or what is there was made with other settings.
    """
    places: dict[str, Any] = {name: run / name for name in ("teacher", "distilled", "demonstrator")}
    settings: dict[str, Any] = {"model": model, "data": data, "train": train, "decode": decode}
    settings |= {"parallel": parallel, "objective": objective, "stages": stages}
    settings["label_smoothing"] = label_smoothing
    prepare_once(data)
    earlier_stages(settings, **places)
    announce(run / "learner", "learner")
    train_learner(**settings, **places, run=run / "learner")
    return evaluate_once(run / "learner", scorer=run / "teacher")


def prepare_once(data: DataConfig) -> None:
    """Prepare the data unless that was done.

    Raises:
        ValueError: It was prepared with other settings, is damaged, or cannot be prepared.
    """
    directory = Path(data.prepared)
    if data.dataset == "tiny" or not (directory / MANIFEST).is_file():
        prepare(data=data)
        return
    for name, entry in open_prepared(directory, data_settings(data))["files"].items():
        if sha256(directory / name) != entry["sha256"]:
            raise ValueError(f"{directory / name}: damaged; prepare the data again")
    print(f"{directory}: prepared")


def evaluate_once(run: Path, *, scorer: Path) -> dict[str, Any]:
    """Scores of a run on the test part, made unless those of its best weights and scorer exist."""
    directory = Run(run)
    scores = read_json(directory.scores) if directory.scores.exists() else {}
    judge = open_run(run, scorer=scorer).scorer
    wanted = {
        "split": "test",
        "weights": sha256(directory.best_weights()),
        "scorer": judge and sha256(judge),
    }
    if isinstance(scores, dict) and scores.items() >= wanted.items():
        print(f"{directory.scores}: evaluated")
        return scores
    return evaluate(run=run, scorer=scorer)

"""Training, stage by stage: the verbs ``train-teacher``, ``train-demonstrator`` and ``train``.

```
prepare -> train-teacher -> distill -> train-demonstrator -> train
```
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from separata_shared.files import read_json, sha256, write_json
from separata_shared.training import Run, TrainConfig, TrainResult
from separata_shared.translation import fit_translation, load_for

from .build import (
    build_demonstrator,
    build_learner,
    build_mask_predictor,
    build_teacher,
    initialise,
)
from .config import (
    DataConfig,
    DecodeConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelDecodeConfig,
    StagesConfig,
)
from .data import Corpus, with_distilled
from .distill import distill
from .generate import check_actions, check_vocabularies, load_demonstrator, load_teacher
from .objective import demonstrator_step, learner_step, mask_predict_step, validation


def train_teacher(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    stages: StagesConfig,
    label_smoothing: float = 0.1,
    distilled: Path | None = None,
    run: Path = Path("runs/tiny/teacher"),
) -> TrainResult:
    """Train the autoregressive teacher, a plain Transformer; a run that exists is continued.

    The same verb trains the autoregressive baselines: ``--model.encoder_layers 12
    --model.decoder_layers 1``, on the corpus or with ``--distilled`` on an earlier teacher's
    translations.

    Args:
        model: Sizes and wiring.
        data: Which corpus, and how it is cut into batches.
        train: Optimizer, schedule, length of training, checkpoints.
        decode: Beam search, for ``distill``, ``translate`` and ``evaluate``.
        stages: Gives the number of steps.
        label_smoothing: Share of the target probability spread over the vocabulary.
        distilled: Directory of distilled text to train on; default: the corpus as it is.
        run: Run directory to write.

    Returns:
        Steps done and the last losses.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or the loss is not
            finite.
    """
    train = with_steps(train, stages.teacher_steps)
    corpus, model = load_for(model, data)
    settings: dict[str, Any] = {"model": model, "data": data, "train": train, "decode": decode}
    if distilled is not None:
        corpus = with_distilled(corpus, distilled, max_length=data.max_length)
        settings["distilled"] = str(distilled)
    settings["label_smoothing"] = label_smoothing
    if distilled is not None:
        keep_inputs(run, {"distilled": distilled / "target.txt"}, settings)
    torch.manual_seed(train.seed)
    return fit_translation(build_teacher(model), corpus, settings=settings, run=run)


def train_demonstrator(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    objective: ObjectiveConfig,
    stages: StagesConfig,
    label_smoothing: float = 0.1,
    distilled: Path = Path("runs/tiny/distilled"),
    run: Path = Path("runs/tiny/demonstrator"),
) -> TrainResult:
    """Train the demonstrator, a Transformer that shows its actions; a run is continued.

    Args:
        model: Sizes, wiring and actions.
        data: Which corpus, and how it is cut into batches.
        train: Optimizer, schedule, length of training, checkpoints.
        decode: Beam search, for ``translate`` and ``evaluate``.
        objective: Weight of the balance of the actions.
        stages: Gives the number of steps, and says which targets to train on.
        label_smoothing: Share of the target probability spread over the vocabulary.
        distilled: What ``distill`` wrote; not read with ``stages.targets`` raw.
        run: Run directory to write.

    Returns:
        Steps done and the last losses.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or the loss is not
            finite.
    """
    check_parallel(train, model)
    train = with_steps(train, stages.demonstrator_steps)
    corpus, model = load_for(model, data)
    settings: dict[str, Any] = {"model": model, "data": data, "train": train, "decode": decode}
    settings |= {"objective": objective, "label_smoothing": label_smoothing}
    settings["stages"] = StagesConfig(targets=stages.targets)
    corpus, inputs = training_part(corpus, data, stages, distilled)
    keep_inputs(run, inputs, settings)
    torch.manual_seed(train.seed)
    network = build_demonstrator(model)
    step = demonstrator_step(network, objective, label_smoothing)
    return fit_translation(
        network,
        corpus,
        settings=settings,
        run=run,
        step=step,
        evaluate=validation(step, corpus.valid, data.max_tokens),
    )


def train(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    parallel: ParallelDecodeConfig,
    objective: ObjectiveConfig,
    stages: StagesConfig,
    label_smoothing: float = 0.1,
    teacher: Path = Path("runs/tiny/teacher"),
    distilled: Path = Path("runs/tiny/distilled"),
    demonstrator: Path = Path("runs/tiny/demonstrator"),
    run: Path = Path("runs/tiny/learner"),
) -> TrainResult:
    """Train the non-autoregressive learner; a run that exists is continued.

    The baselines are the same verb: ``--objective.imitation 0`` learns from words alone, with
    ``--model.copy uniform`` as well it is the vanilla model. With made data the earlier stages are
    run first where they are missing.

    Args:
        model: Sizes, wiring, actions and copy.
        data: Which corpus, and how it is cut into batches.
        train: Optimizer, schedule, length of training, checkpoints.
        decode: Kept with the run.
        parallel: How lengths are chosen, for ``translate`` and ``evaluate``.
        objective: Weights of imitation and length.
        stages: Which targets to train on, and whose parameters to start from.
        label_smoothing: Share of the target probability spread over the vocabulary.
        teacher: Run directory of ``train-teacher``; read with ``stages.initialise`` teacher.
        distilled: What ``distill`` wrote; not read with ``stages.targets`` raw.
        demonstrator: Run directory of ``train-demonstrator``; not read where neither imitation nor
            the start of the parameters needs it.
        run: Run directory to write.

    Returns:
        Steps done and the last losses.

    Raises:
        ValueError: An earlier stage or the data is missing or does not fit the configuration, or
            the loss is not finite.
    """
    settings: dict[str, Any] = {"model": model, "data": data, "train": train, "decode": decode}
    settings |= {"objective": objective, "label_smoothing": label_smoothing}
    settings["parallel"] = parallel
    check_parallel(train, model)
    imitates = objective.imitation > 0
    needed = [demonstrator] if imitates or stages.initialise == "demonstrator" else []
    needed += [distilled] if stages.targets == "distilled" else []
    if data.dataset == "tiny" and not all(place.exists() for place in needed):
        places: dict[str, Any] = {"teacher": teacher, "distilled": distilled}
        earlier_stages({**settings, "stages": stages}, **places, demonstrator=demonstrator)
        announce(run, "learner")
    corpus, settings["model"] = load_for(model, data)
    settings["stages"] = replace(stages, teacher_steps=0, demonstrator_steps=0)
    corpus, inputs = training_part(corpus, data, stages, distilled)
    torch.manual_seed(train.seed)
    network = build_learner(settings["model"])
    shown = None
    if demonstrator in needed:
        expert = load_demonstrator(demonstrator)
        check_vocabularies(expert, corpus)
        inputs["demonstrator"] = expert.weights
        if imitates:
            check_actions(expert, settings["model"])
            shown = expert.network
    if stages.initialise == "demonstrator":
        initialise(network, expert.network)
    elif stages.initialise == "teacher":
        trained = load_teacher(teacher)
        check_vocabularies(trained, corpus)
        inputs["teacher"] = trained.weights
        initialise(network, trained.network)
    keep_inputs(run, inputs, settings)
    step = learner_step(network, objective, label_smoothing, demonstrator=shown)
    return fit_translation(
        network,
        corpus,
        settings=settings,
        run=run,
        step=step,
        evaluate=validation(step, corpus.valid, data.max_tokens),
    )


def train_mask_predict(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    objective: ObjectiveConfig,
    stages: StagesConfig,
    label_smoothing: float = 0.1,
    iterations: int = 4,
    distilled: Path = Path("runs/tiny/distilled"),
    run: Path = Path("runs/tiny/mask-predict"),
) -> TrainResult:
    """Train mask-predict, the iterative model to compare with; a run is continued.

    Args:
        model: Sizes and wiring.
        data: Which corpus, and how it is cut into batches.
        train: Optimizer, schedule, length of training, checkpoints.
        decode: Kept with the run.
        objective: Weight of the length loss.
        stages: Which targets to train on.
        label_smoothing: Share of the target probability spread over the vocabulary.
        iterations: Passes of ``translate`` and ``evaluate``, kept with the run.
        distilled: What ``distill`` wrote; not read with ``stages.targets`` raw.
        run: Run directory to write.

    Returns:
        Steps done and the last losses.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or the loss is not
            finite.
    """
    if iterations < 1:
        raise ValueError(f"iterations: must be at least 1, got {iterations}")
    corpus, model = load_for(model, data)
    settings: dict[str, Any] = {"model": model, "data": data, "train": train, "decode": decode}
    settings |= {"objective": objective, "label_smoothing": label_smoothing}
    settings |= {"stages": StagesConfig(targets=stages.targets), "iterations": iterations}
    corpus, inputs = training_part(corpus, data, stages, distilled)
    keep_inputs(run, inputs, settings)
    torch.manual_seed(train.seed)
    network = build_mask_predictor(model)
    step = mask_predict_step(network, objective, label_smoothing)
    return fit_translation(
        network,
        corpus,
        settings=settings,
        run=run,
        step=step,
        evaluate=validation(step, corpus.valid, data.max_tokens),
    )


def earlier_stages(
    settings: Mapping[str, Any], *, teacher: Path, distilled: Path, demonstrator: Path | None
) -> None:
    """Train the teacher, distill, and train the demonstrator, where that is not done yet.

    The teacher is left out where nobody asks it: neither for targets, nor for parameters, nor to
    choose among lengths.

    Args:
        settings: The groups of a configuration, ``stages`` and ``parallel`` among them.
        teacher: Run directory of the teacher.
        distilled: Directory of the distilled text.
        demonstrator: Run directory of the demonstrator; None where no learner follows.

    Raises:
        ValueError: What is there was made with other settings, or a stage failed.
    """
    stages: StagesConfig = settings["stages"]
    groups: dict[str, Any] = {n: settings[n] for n in ("model", "data", "train", "decode")}
    groups |= {"stages": stages, "label_smoothing": settings["label_smoothing"]}
    learning = "teacher" in (stages.initialise, settings["parallel"].scorer)
    if stages.targets == "distilled" or (demonstrator is not None and learning):
        announce(teacher, "teacher")
        train_teacher(**groups, run=teacher)
    if stages.targets == "distilled":
        announce(distilled, "the teacher's translations")
        distill(teacher=teacher, output=distilled)
    if demonstrator is not None:
        announce(demonstrator, "demonstrator")
        train_demonstrator(
            **groups, objective=settings["objective"], distilled=distilled, run=demonstrator
        )


def announce(place: Path, stage: str) -> None:
    """Say which of several stages the following lines are about."""
    print(f"{place}: {stage}", file=sys.stderr)


def with_steps(train: TrainConfig, steps: int) -> TrainConfig:
    """The same training with another number of steps; 0 changes nothing."""
    return replace(train, steps=steps) if steps else train


def check_parallel(train: TrainConfig, model: ModelConfig) -> None:
    """Raise a ``ValueError`` where FSDP2 would meet one parameter in several of its shards."""
    if train.parallel == "fsdp" and model.share_codebook:
        raise ValueError(
            "train.parallel: fsdp shards layer by layer, and model.share_codebook gives all layers "
            "one codebook; use ddp"
        )


def training_part(
    corpus: Corpus, data: DataConfig, stages: StagesConfig, distilled: Path
) -> tuple[Corpus, dict[str, Path]]:
    """The corpus to train on, and the files beside it on which the run depends."""
    if stages.targets == "raw":
        return corpus, {}
    corpus = with_distilled(corpus, distilled, max_length=data.max_length)
    return corpus, {"distilled": distilled / "target.txt"}


def keep_inputs(run: Path, inputs: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Write down the checksums of what earlier stages made, or compare them.

    A run knows what it was made from by content, so that it may be moved with its inputs.

    Raises:
        ValueError: The run was begun with other files, or with other settings.
    """
    Run(run, settings).begin(write=False)  # another run's directory stays as it is
    path = run / "inputs.json"
    found = {name: sha256(file) for name, file in inputs.items()}
    if not Run(run).checkpoints.exists() or not path.exists():
        write_json(path, found)
        return
    recorded = read_json(path)
    if not isinstance(recorded, dict):
        raise ValueError(f"{path}: not a record of inputs")
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            raise ValueError(
                f"{path}: {name} is not what this run was begun with; "
                "choose another run directory or delete this one"
            )

"""Training: the recommender, its baseline, and then the dialog model."""

from collections.abc import Callable
from pathlib import Path

import torch
from separata_shared.training import Run, TrainConfig, TrainResult, fit
from torch import nn

from .build import build_autorec, build_recommender
from .config import DataConfig, DialogConfig, RecommenderConfig
from .data import Corpus, load
from .model import AutoRec, Recommender
from .recommendation import (
    Scorer,
    autorec_scorer,
    autorec_step,
    rank_instances,
    recalls,
    recommendation_step,
)
from .runs import AUTOREC, RECOMMENDER

EVALUATION_PAIRS = 256


def train(
    *,
    data: DataConfig,
    recommender: RecommenderConfig,
    dialog: DialogConfig,
    train: TrainConfig,
    train_dialog: TrainConfig,
    run: Path = Path("runs/tiny"),
) -> TrainResult:
    """Train the recommender, then with it the dialog model; a run that exists is continued.

    Args:
        data: Which dialogs and which graph.
        recommender: Sizes and choices of the recommender.
        dialog: Sizes and choices of the dialog model.
        train: How the recommender is trained.
        train_dialog: How the dialog model is trained.
        run: Run directory to write.

    Returns:
        How the training of the dialog model ended.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or a loss is not finite.
    """
    from .train_dialog import train_dialog as train_dialog_model

    train_rec(data=data, recommender=recommender, train=train, run=run)
    return train_dialog_model(data=data, dialog=dialog, train_dialog=train_dialog, run=run)


def train_rec(
    *,
    data: DataConfig,
    recommender: RecommenderConfig,
    train: TrainConfig,
    run: Path = Path("runs/tiny"),
) -> TrainResult:
    """Train the recommender; a run that exists is continued.

    Args:
        data: Which dialogs and which graph.
        recommender: Sizes and choices.
        train: Optimizer, length of training, evaluations.
        run: Run directory to write; the recommender is in its folder ``recommender``.

    Returns:
        Steps done and the last numbers.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or the loss is not
            finite.
    """
    corpus = load(data)
    torch.manual_seed(train.seed)
    return fit(
        build_recommender(recommender, corpus.graph),
        corpus.train.recommender_batches(
            recommender.batch_pairs, seed=train.seed, mentions=recommender.mentions
        ),
        recommendation_step,
        config=train,
        run=Run(run / RECOMMENDER, {"data": data, "recommender": recommender, "train": train}),
        evaluate=validation(corpus, recommender, frozen_scorer),
    )


def train_autorec(
    *,
    data: DataConfig,
    recommender: RecommenderConfig,
    train: TrainConfig,
    run: Path = Path("runs/tiny"),
) -> TrainResult:
    """Train the baseline, ReDial's autoencoder over the films of the context.

    Args:
        data: Which dialogs and which graph.
        recommender: Its width and its batch are used.
        train: Optimizer, length of training, evaluations.
        run: Run directory to write; the baseline is in its folder ``autorec``.

    Returns:
        Steps done and the last numbers.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or the loss is not
            finite.
    """
    corpus = load(data)
    torch.manual_seed(train.seed)
    return fit(
        build_autorec(recommender, corpus.graph),
        corpus.train.recommender_batches(
            recommender.batch_pairs, seed=train.seed, mentions=recommender.mentions
        ),
        autorec_step,
        config=train,
        run=Run(run / AUTOREC, {"data": data, "recommender": recommender, "train": train}),
        evaluate=validation(corpus, recommender, autorec_of),
    )


def frozen_scorer(model: nn.Module) -> Scorer:
    """A recommender in training as it is now, its node vectors computed once."""
    assert isinstance(model, Recommender)
    frozen = model.frozen()
    return lambda batch: frozen(batch.nodes.to(frozen.H.device), batch.mask.to(frozen.H.device))


def autorec_of(model: nn.Module) -> Scorer:
    """The autoencoder in training as it is now."""
    assert isinstance(model, AutoRec)
    return autorec_scorer(model)


def validation(
    corpus: Corpus, config: RecommenderConfig, scorer: Callable[[nn.Module], Scorer]
) -> Callable[[nn.Module], dict[str, float]]:
    """What judges a recommender: loss over all nodes and recall on the validation part."""
    items = torch.tensor(corpus.graph.items)
    batches = corpus.valid.recommender_in_order(EVALUATION_PAIRS, mentions=config.mentions)

    def evaluate(model: nn.Module) -> dict[str, float]:
        ranked, loss = rank_instances(scorer(model), batches, items)
        found = recalls(ranked.rank, {})["all"]
        return {"loss": loss, **{name: score["value"] for name, score in found.items()}}

    return evaluate

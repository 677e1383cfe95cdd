"""Training of the dialog model on top of a trained recommender, which stays as it is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from separata_shared.files import write_json
from separata_shared.metrics import perplexity
from separata_shared.nn import DecoderLayer, EncoderLayer
from separata_shared.training import Loss, Run, TrainConfig, TrainResult, fit
from torch import nn

from .config import DataConfig, DialogConfig
from .data import Corpus
from .dialog import DialogModel
from .model import FrozenRecommender
from .pairs import DialogBatch
from .replies import batch_loss
from .runs import DIALOG, TrainedRecommender, load_recommender
from .system import RECOMMENDER_RECORD, VOCABULARY, check_recommender, recommender_record
from .words import Vocabulary


def train_dialog(
    *,
    data: DataConfig,
    dialog: DialogConfig,
    train_dialog: TrainConfig,
    run: Path = Path("runs/tiny"),
) -> TrainResult:
    """Train the dialog model; the run needs a trained recommender.

    Args:
        data: Which dialogs and which graph: those of the recommender.
        dialog: Sizes and choices.
        train_dialog: Optimizer, length of training, evaluations.
        run: Run directory; the dialog model is in its folder ``dialog``.

    Returns:
        Steps done and the last numbers.

    Raises:
        ValueError: There is no recommender, it was trained on other data, the dialog model was
            begun with another one, or the loss is not finite.
    """
    trained = load_recommender(run)
    if trained.data != replace(data, raw=trained.data.raw, prepared=trained.data.prepared):
        raise ValueError(f"{run}: its recommender was trained on other data; use the same group")
    corpus, frozen = trained.corpus, trained.model
    _keep_vocabulary(corpus.vocabulary, run / DIALOG / VOCABULARY)
    _keep_recommender(trained, run / DIALOG / RECOMMENDER_RECORD)
    torch.manual_seed(train_dialog.seed)
    network = DialogModel(dialog, num_tokens=len(corpus.vocabulary), user_width=frozen.H.shape[1])
    directory = Run(run / DIALOG, {"data": data, "dialog": dialog, "train_dialog": train_dialog})
    return fit(
        network,
        corpus.train.dialog_batches(
            dialog.batch_pairs,
            seed=train_dialog.seed,
            mentions=dialog.mentions,
            max_length=dialog.max_length,
        ),
        dialog_step(frozen, slot=corpus.vocabulary.slot),
        config=train_dialog,
        run=directory,
        evaluate=validation(corpus, dialog, frozen),
        blocks=(EncoderLayer, DecoderLayer),
    )


def dialog_step(
    frozen: FrozenRecommender, *, slot: int
) -> Callable[[nn.Module, DialogBatch], Loss]:
    """Cross-entropy over the tokens of the answers; the recommender gives the users.

    Args:
        frozen: The recommender.
        slot: The token that stands for an item.
    """

    def step(model: nn.Module, batch: DialogBatch) -> Loss:
        found = batch_loss(model, frozen.to(batch.xs.device), batch, slot=slot)
        return Loss(total=found.total, count=found.count, log={"slot_nll": found.slot_total})

    return step


def validation(
    corpus: Corpus, config: DialogConfig, frozen: FrozenRecommender
) -> Callable[[nn.Module], dict[str, float]]:
    """What judges a dialog model: loss in nats per token and perplexity of the validation part."""
    batches = corpus.valid.dialog_in_order(
        config.batch_pairs, mentions=config.mentions, max_length=config.max_length
    )

    def evaluate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        sums = []
        for batch in batches:
            moved = DialogBatch(*(tensor.to(device) for tensor in batch))
            found = batch_loss(model, frozen.to(device), moved, slot=corpus.vocabulary.slot)
            sums.append((found.total.item(), int(found.count)))
        nll = sum(total for total, _ in sums) / sum(count for _, count in sums)
        return {"loss": nll, "perplexity": perplexity(sums).value}

    return evaluate


def _keep_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    if not path.exists():
        vocabulary.save(path)
    elif Vocabulary.load(path).fingerprint != vocabulary.fingerprint:
        raise ValueError(f"{path}: another vocabulary than that of the data; use a new run")


def _keep_recommender(trained: TrainedRecommender, path: Path) -> None:
    """Note the recommender before the first step: an interrupted dialog model can be used too."""
    if path.exists():
        check_recommender(path, trained)
    else:
        write_json(path, recommender_record(trained.weights))

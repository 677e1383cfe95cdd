"""Training and scoring of the image and sentence classifiers.

The verbs ``train-images``, ``evaluate-images``, ``train-sentences`` and ``evaluate-sentences``. The
weights with the highest accuracy on the validation part are the ones that are scored.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from separata_shared.data import Batches, MappedSequence, to_device
from separata_shared.data.vocabulary import Vocabulary
from separata_shared.metrics import Score
from separata_shared.nn import EncoderLayer
from separata_shared.training import Loss, Run, TrainConfig, TrainResult, fit
from torch import Tensor, nn
from torch.nn import functional as F

from .images import ImageConfig, build_image_classifier, load_images
from .runs import load_best, run_config, write_scores
from .sentences import (
    Labelled,
    SentenceConfig,
    SentencePart,
    build_sentence_classifier,
    load_sentences,
    make_vocabulary,
)

_VOCABULARY = "vocabulary.txt"

Batch = tuple[Tensor, Tensor]
"""What a model reads (B,...), and the classes (B,)."""


def train_images(
    *, images: ImageConfig, train: TrainConfig, run: Path = Path("runs/tiny-images")
) -> TrainResult:
    """Train the image classifier; a run directory that exists is continued.

    Args:
        images: Which images, and the network.
        train: Optimizer, length of training, evaluations.
        run: Run directory to write.

    Returns:
        Steps done and the last numbers.

    Raises:
        ValueError: The data is missing or damaged, or the loss is not finite.
    """
    parts = load_images(images)
    valid = batches_in_order(parts.valid)
    torch.manual_seed(train.seed)
    return fit(
        build_image_classifier(images),
        shuffled_batches(parts.train, images.batch_size, seed=train.seed),
        classification_step,
        config=train,
        run=Run(run, {"images": images, "train": train}),
        evaluate=lambda model: accuracy(model, valid),
    )


def evaluate_images(
    *,
    run: Path = Path("runs/tiny-images"),
    split: Literal["valid", "test"] = "test",
    weights: Path | None = None,
) -> dict[str, Any]:
    """Score a trained image classifier.

    Args:
        run: Run directory of ``train-images``.
        split: Part of the data set.
        weights: Weights file; default: the best of the run.

    Returns:
        What was written: ``scores.json`` in the run directory for the test part,
        ``scores.valid.json`` for the other.

    Raises:
        ValueError: The run or its data cannot be read.
    """
    config: ImageConfig = run_config(run, "images", ImageConfig)
    part = getattr(load_images(config), split)
    return _evaluate(run, build_image_classifier(config), batches_in_order(part), split, weights)


def train_sentences(
    *, sentences: SentenceConfig, train: TrainConfig, run: Path = Path("runs/tiny-sentences")
) -> TrainResult:
    """Train the sentence classifier; a run directory that exists is continued.

    Args:
        sentences: Which sentences, and the encoder.
        train: Optimizer, length of training, evaluations.
        run: Run directory to write.

    Returns:
        Steps done and the last numbers.

    Raises:
        ValueError: The data is missing or damaged, or the loss is not finite.
    """
    parts = load_sentences(sentences)
    vocabulary = make_vocabulary(sentences, parts.train)
    keep_vocabulary(vocabulary, run)
    valid = SentencePart(parts.valid, vocabulary).in_order(sentences.max_tokens)
    torch.manual_seed(train.seed)
    return fit(
        build_sentence_classifier(sentences, len(vocabulary)),
        SentencePart(parts.train, vocabulary).batches(sentences.max_tokens, seed=train.seed),
        classification_step,
        config=train,
        run=Run(run, {"sentences": sentences, "train": train}),
        evaluate=lambda model: accuracy(model, valid),
        blocks=(EncoderLayer,),
    )


def evaluate_sentences(
    *,
    run: Path = Path("runs/tiny-sentences"),
    split: Literal["valid", "test"] = "test",
    weights: Path | None = None,
) -> dict[str, Any]:
    """Score a trained sentence classifier.

    Args:
        run: Run directory of ``train-sentences``.
        split: Part of the data set.
        weights: Weights file; default: the best of the run.

    Returns:
        What was written: ``scores.json`` in the run directory for the test part,
        ``scores.valid.json`` for the other.

    Raises:
        ValueError: The run or its data cannot be read.
    """
    config: SentenceConfig = run_config(run, "sentences", SentenceConfig)
    parts = load_sentences(config)
    vocabulary = run_vocabulary(run, config, parts.train)
    part = SentencePart(getattr(parts, split), vocabulary)
    model = build_sentence_classifier(config, len(vocabulary))
    return _evaluate(run, model, part.in_order(config.max_tokens), split, weights)


def keep_vocabulary(vocabulary: Vocabulary, run: Path) -> None:
    """Store the vocabulary with its run, or check that it is the one of the run.

    Raises:
        ValueError: The run has another one.
    """
    path = run / _VOCABULARY
    if path.exists():
        vocabulary.check(Vocabulary.load(path).fingerprint, path)
    else:
        vocabulary.save(path)


def run_vocabulary(run: Path, config: SentenceConfig, sentences: Sequence[Labelled]) -> Vocabulary:
    """The vocabulary of a run, which is that of its training sentences.

    Args:
        run: Run directory.
        config: Its configuration.
        sentences: The training sentences of that.

    Raises:
        ValueError: It cannot be read, or file and sentences do not belong together: words of other
            numbers would be scored in silence.
    """
    path = run / _VOCABULARY
    vocabulary = Vocabulary.load(path)
    make_vocabulary(config, sentences).check(vocabulary.fingerprint, path)
    return vocabulary


def shuffled_batches(items: Batch, size: int, *, seed: int) -> Batches[Batch]:
    """Shuffled batches of each epoch; the last one of an epoch can be smaller.

    Args:
        items: What a model reads (N,...), and the classes (N,).
        size: Items of a batch.
        seed: Seed of the order.
    """
    inputs, labels = items

    def batch(chosen: NDArray[np.int64]) -> Batch:
        places = torch.from_numpy(chosen)
        return inputs[places], labels[places]

    def epoch_batches(epoch: int) -> MappedSequence[Batch]:
        order = np.random.default_rng((seed, epoch)).permutation(len(labels))
        return MappedSequence(batch, [order[n : n + size] for n in range(0, len(order), size)])

    return epoch_batches


def batches_in_order(items: Batch, size: int = 500) -> list[Batch]:
    """Batches for evaluation."""
    inputs, labels = (torch.split(tensor, size) for tensor in items)
    return list(zip(inputs, labels, strict=True))


def classification_step(model: nn.Module, batch: Batch) -> Loss:
    """Cross-entropy summed over the items of a batch, and how many are right."""
    items, labels = batch
    scores: Tensor = model(items).float()
    return Loss(
        total=F.cross_entropy(scores, labels, reduction="sum"),
        count=torch.tensor(len(labels), device=labels.device),
        log={"accuracy": (scores.argmax(dim=-1) == labels).sum()},
    )


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cross-entropy and share of right answers in percent."""
    device = next(model.parameters()).device
    losses = [classification_step(model, to_device(batch, device)) for batch in batches]
    count = sum(int(loss.count) for loss in losses)
    return {
        "loss": sum(loss.total.item() for loss in losses) / count,
        "accuracy": 100 * sum(loss.log["accuracy"].item() for loss in losses) / count,
    }


def _evaluate(
    run: Path, model: nn.Module, batches: list[Any], split: str, weights: Path | None
) -> dict[str, Any]:
    path = load_best(model, run, weights)
    count = sum(len(labels) for _, labels in batches)
    score = Score(accuracy(model, batches)["accuracy"], "percent", "items classified right", count)
    return write_scores(run, split, path, {"accuracy": score})

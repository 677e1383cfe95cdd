"""Training on parallel text: the loss, the validation loss, and the run around them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from separata_shared.data.vocabulary import PAD, Vocabulary
from separata_shared.nn import DecoderLayer, EncoderLayer
from separata_shared.training import Loss, Run, TrainConfig, TrainResult, fit
from separata_shared.translation.config import DataConfig, TransformerConfig
from separata_shared.translation.data import Corpus, ParallelBatch, Split, load

ConfigT = TypeVar("ConfigT", bound=TransformerConfig)


def load_for(model: ConfigT, data: DataConfig) -> tuple[Corpus, ConfigT]:
    """The corpus, and ``model`` with the vocabulary sizes of the corpus.

    Raises:
        ValueError: The data was not prepared as ``data`` says, or does not fit ``model``.
    """
    corpus = load(data)
    model = with_vocabulary(model, corpus)
    for name in ("train", "valid", "test"):
        longest = int(getattr(corpus, name).lengths.max())
        if longest > model.max_length:
            raise ValueError(
                f"model.max_length: is {model.max_length}, but the {name} part has a sentence of "
                f"{longest} tokens; raise it or lower data.max_length"
            )
    return corpus, model


def with_vocabulary(model: ConfigT, corpus: Corpus) -> ConfigT:
    """Set the vocabulary sizes of ``model`` to those of the data.

    Raises:
        ValueError: ``model`` names other sizes.
    """
    source, target = len(corpus.source_vocabulary), len(corpus.target_vocabulary)
    for name, size in (("source", source), ("target", target)):
        wanted = getattr(model, f"{name}_vocabulary_size")
        if wanted not in (0, size):
            raise ValueError(
                f"model.{name}_vocabulary_size: is {wanted}, but the data has {size} types"
            )
    return replace(model, source_vocabulary_size=source, target_vocabulary_size=target)


def fit_translation(
    network: nn.Module,
    corpus: Corpus,
    *,
    settings: Mapping[str, Any],
    run: Path,
    before_step: Callable[[int], None] | None = None,
    step: Callable[[nn.Module, ParallelBatch], Loss] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> TrainResult:
    """Train ``network``, or go on with the newest checkpoint of ``run``.

    Args:
        network: What ``step`` trains; by default called as ``network(source, decoder_input)``, with
            logits (B,T,V) as its result.
        corpus: Sentence pairs.
        settings: The run's configuration: the groups ``model``, ``data``, ``train`` and ``decode``,
            and the number ``label_smoothing``.
        run: Run directory to write.
        before_step: Called with the number of steps done before each step.
        step: Computes the loss of a batch; default: ``translation_step``.
        evaluate: Numbers that judge the network; default: ``validation_loss``.

    Returns:
        Steps done and the last losses.

    Raises:
        ValueError: ``run`` holds a run with other settings, or the loss is not finite.
    """
    data: DataConfig = settings["data"]
    config: TrainConfig = settings["train"]
    step = step or translation_step(settings["label_smoothing"])
    # A run can be used where its prepared data is not: it carries its vocabularies.
    for side in ("source", "target"):
        _keep_vocabulary(getattr(corpus, f"{side}_vocabulary"), run / f"{side}.vocabulary")
    return fit(
        network,
        corpus.train.batches(data.max_tokens, seed=config.seed),
        step,
        config=config,
        run=Run(run, settings),
        evaluate=evaluate
        or (lambda network: validation_loss(network, corpus.valid, data.max_tokens)),
        before_step=before_step,
        blocks=(EncoderLayer, DecoderLayer),
    )


def _keep_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    if path.exists():
        vocabulary.check(Vocabulary.load(path).fingerprint, path.parent)
    else:
        vocabulary.save(path)


def translation_step(label_smoothing: float) -> Callable[[nn.Module, ParallelBatch], Loss]:
    """Label-smoothed cross-entropy, summed over the target tokens of a batch.

    The smoothed share s is spread over the whole vocabulary, as in fairseq:
    (1 - s) * NLL + s / V * sum_v -log p_v.

    Raises:
        ValueError: The share is not in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: must be in [0, 1), got {label_smoothing}")

    def step(model: nn.Module, batch: ParallelBatch) -> Loss:
        logits: Tensor = model(batch.source, batch.decoder_input)
        log_probs, target = F.log_softmax(logits.float(), dim=-1), batch.target
        real = target.ne(PAD)
        nll = -log_probs.gather(-1, target[..., None]).squeeze(-1).mul(real).sum()
        smooth = -log_probs.mean(dim=-1).mul(real).sum()
        total = (1 - label_smoothing) * nll + label_smoothing * smooth
        return Loss(total=total, count=real.sum(), log={"nll": nll.detach()})

    return step


@torch.no_grad()
def validation_loss(model: nn.Module, split: Split, max_tokens: int) -> dict[str, float]:
    """Negative log-likelihood in nats per token, and perplexity, of a split."""
    step = translation_step(0.0)
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in split.in_order(max_tokens):
        loss = step(model, batch.to(device))
        sums += torch.stack([loss.total.double(), loss.count.double()])
    nll = (sums[0] / sums[1]).item()
    return {"loss": nll, "perplexity": math.exp(min(nll, 700.0))}

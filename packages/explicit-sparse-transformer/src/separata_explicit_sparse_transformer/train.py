"""Training on parallel text."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from separata_shared.data.vocabulary import PAD, Vocabulary
from separata_shared.nn import DecoderLayer, EncoderLayer
from separata_shared.training import Loss, Run, TrainConfig, TrainResult, fit
from torch import Tensor, nn
from torch.nn import functional as F

from .build import build_model
from .config import AttentionConfig, DecodeConfig, ModelConfig
from .data import Corpus, DataConfig, ParallelBatch, Split, load
from .model import set_top_k
from .selection import linear_top_k


def train(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    decode: DecodeConfig,
    label_smoothing: float = 0.1,
    run: Path = Path("runs/tiny"),
) -> TrainResult:
    """Train a translation model; a run directory that exists is continued.

    Args:
        model: Sizes, wiring and attention.
        data: Which corpus, and how it is cut into batches.
        train: Optimizer, schedule, length of training, checkpoints.
        decode: Kept with the run, for ``generate`` and ``evaluate``.
        label_smoothing: Share of the target probability spread over the vocabulary.
        run: Run directory to write.

    Returns:
        Steps done and the last losses.

    Raises:
        ValueError: The data is missing or does not fit the configuration, or the loss is not
            finite.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: must be in [0, 1), got {label_smoothing}")
    corpus = load(data)
    model = with_vocabulary(model, corpus)
    _check_lengths(model, corpus)
    # A run can be used where its prepared data is not: it carries its vocabularies.
    for side, vocabulary in (
        ("source", corpus.source_vocabulary),
        ("target", corpus.target_vocabulary),
    ):
        _keep_vocabulary(vocabulary, run / f"{side}.vocabulary")
    settings = {"model": model, "data": data, "train": train, "decode": decode}
    torch.manual_seed(train.seed)
    transformer = build_model(model)
    return fit(
        transformer,
        corpus.train.batches(data.max_tokens, seed=train.seed),
        translation_step(label_smoothing),
        config=train,
        run=Run(run, {**settings, "label_smoothing": label_smoothing}),
        evaluate=lambda network: validation_loss(network, corpus.valid, data.max_tokens),
        before_step=top_k_schedule(transformer, model.attention),
        blocks=(EncoderLayer, DecoderLayer),
    )


def _keep_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    if path.exists():
        vocabulary.check(Vocabulary.load(path).fingerprint, path.parent)
    else:
        vocabulary.save(path)


def with_vocabulary(model: ModelConfig, corpus: Corpus) -> ModelConfig:
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


def _check_lengths(model: ModelConfig, corpus: Corpus) -> None:
    for name in ("train", "valid", "test"):
        longest = int(getattr(corpus, name).lengths.max())
        if longest > model.max_length:
            raise ValueError(
                f"model.max_length: is {model.max_length}, but the {name} part has a sentence of "
                f"{longest} tokens; raise it or lower data.max_length"
            )


def translation_step(label_smoothing: float) -> Callable[[nn.Module, ParallelBatch], Loss]:
    """Label-smoothed cross-entropy, summed over the target tokens of a batch.

    The smoothed share s is spread over the whole vocabulary, as in fairseq:
    (1 - s) * NLL + s / V * sum_v -log p_v.
    """

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


def top_k_schedule(model: nn.Module, attention: AttentionConfig) -> Callable[[int], None] | None:
    """What to do before each update so that k follows its schedule; None without one."""
    if attention.start_top_k is None or not isinstance(attention.top_k, int):
        return None
    top_k = linear_top_k(attention.start_top_k, attention.top_k, attention.schedule_steps)
    return lambda step: set_top_k(model, top_k(step))

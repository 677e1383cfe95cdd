"""What each stage minimises: the losses of the paper put together for a batch.

```
Eq. 11   demonstrator   L_AT*  = L_CE + lambda_1 L_pi
Eq. 12   learner        L_NAT* = L_CE + lambda_2 L_IL + weight L_length
```

Every term is a mean, over valid target positions or over sentences, times the number of positions:
the loop divides by that number again.
"""

from collections.abc import Callable

import torch
from separata_shared.data.vocabulary import PAD
from separata_shared.training import Loss
from separata_shared.translation import ParallelBatch, Split
from torch import Tensor, nn

from .actions import ActionTrace
from .cmlm import mask_words
from .config import ObjectiveConfig
from .length import LengthHead, length_loss
from .losses import imitation_loss, masked_mean, word_loss
from .model import Demonstrator, Learner, LearnerOutput, MaskPredictor

Step = Callable[[nn.Module, ParallelBatch], Loss]


def demonstrator_step(
    network: Demonstrator, objective: ObjectiveConfig, label_smoothing: float
) -> Step:
    """Cross-entropy and balance of the actions; the running means move in training only.

    Args:
        network: The demonstrator, without the wrapper that the loop may put around it.
        objective: Weights of the terms.
        label_smoothing: Share of the target probability spread over the vocabulary.
    """
    check_smoothing(label_smoothing)

    def step(model: nn.Module, batch: ParallelBatch) -> Loss:
        real = batch.target.ne(PAD)
        trace = ActionTrace(real)
        logits = model(batch.source, batch.decoder_input, trace)
        words, nll = word_loss(logits, batch.target, label_smoothing)
        balance = network.balance(trace.log_pi, real)
        total = words + objective.balance * balance  # Eq. 11
        if trace.commitment is not None:
            total = total + objective.commitment * masked_mean(trace.commitment, real)
        return _loss(total, real, nll=nll, balance=balance)

    return step


def learner_step(
    network: Learner,
    objective: ObjectiveConfig,
    label_smoothing: float,
    *,
    demonstrator: Demonstrator | None,
) -> Step:
    """Cross-entropy, length, and imitation of a frozen demonstrator's actions.

    Args:
        network: The learner, without the wrapper that the loop may put around it.
        objective: Weights of the terms.
        label_smoothing: Share of the target probability spread over the vocabulary.
        demonstrator: Expert in evaluation mode, which gets no gradient; None for no imitation.
    """
    check_smoothing(label_smoothing)
    if demonstrator is not None:
        demonstrator.requires_grad_(False).eval()

    def step(model: nn.Module, batch: ParallelBatch) -> Loss:
        real = batch.target.ne(PAD)
        output: LearnerOutput = model(batch.source, real)
        words, nll = word_loss(output.logits, batch.target, label_smoothing)
        length = length_term(network.length, output.length_logits, batch)
        total, logged = words + objective.length * length, {"nll": nll, "length": length}
        if demonstrator is not None:
            with torch.no_grad():
                log_pi = demonstrator.actions(batch.source, batch.decoder_input)
            imitation = imitation_loss(log_pi, output.log_pi, real)
            total = total + objective.imitation * imitation  # Eq. 12
            logged["imitation"] = imitation
        if output.commitment is not None:
            total = total + objective.commitment * masked_mean(output.commitment, real)
        return _loss(total, real, **logged)

    return step


def mask_predict_step(
    network: MaskPredictor, objective: ObjectiveConfig, label_smoothing: float
) -> Step:
    """Cross-entropy of the words that were masked, a random share of each sentence, and length.

    Args:
        network: The model, without the wrapper that the loop may put around it.
        objective: Weight of the length loss.
        label_smoothing: Share of the target probability spread over the vocabulary.
    """
    check_smoothing(label_smoothing)

    def step(model: nn.Module, batch: ParallelBatch) -> Loss:
        real = batch.target.ne(PAD)
        tokens, hidden = mask_words(batch.target, real)
        logits, length_logits = model(batch.source, tokens)
        words, nll = word_loss(logits, batch.target.masked_fill(~hidden, PAD), label_smoothing)
        length = length_term(network.length, length_logits, batch)
        return _loss(words + objective.length * length, hidden, nll=nll, length=length)

    return step


def length_term(head: LengthHead, logits: Tensor, batch: ParallelBatch) -> Tensor:
    """Negative log-likelihood of the true target lengths, mean over the sentences."""
    lengths = [tokens.ne(PAD).sum(dim=1) for tokens in (batch.source, batch.target)]
    return length_loss(logits, head.classes(*lengths))


def validation(
    step: Step, split: Split, max_tokens: int
) -> Callable[[nn.Module], dict[str, float]]:
    """What judges a model in training: the terms of ``step`` on a split.

    ``loss`` is the negative log-likelihood of the words alone, so that models trained with
    different weights are chosen by the same number. What ``step`` draws at random, such as the
    words that mask-predict hides, is the same in every evaluation.
    """

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        sums: dict[str, float] = {}
        count = 0.0
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            for batch in split.in_order(max_tokens):
                loss = step(model, batch.to(device))
                count += loss.count.item()
                for name, value in loss.log.items():
                    sums[name] = sums.get(name, 0.0) + value.item()
        means = {name: value / count for name, value in sums.items()}
        return {"loss": means.pop("nll"), **means}

    return evaluate


def check_smoothing(label_smoothing: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: It is outside of [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: must be in [0, 1), got {label_smoothing}")


def _loss(total: Tensor, real: Tensor, **means: Tensor) -> Loss:
    count = real.sum()
    return Loss(total * count, count, {name: mean.detach() * count for name, mean in means.items()})

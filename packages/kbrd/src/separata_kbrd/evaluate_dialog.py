"""Scores of the dialog model: perplexity, variety and items of what it writes."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from separata_shared.files import write_text
from separata_shared.metrics import Score, distinct_n, perplexity
from tqdm import tqdm

from .diversity import distinct_per_response
from .pairs import Part
from .replies import ReplyLoss, batch_loss
from .system import System, load_system

NS = (2, 3, 4)


def dialog_scores(run: Path, split: str) -> dict[str, Any]:
    """Score the dialog model of a run; also writes its answers, ``replies.SPLIT.jsonl``.

    Args:
        run: Run directory.
        split: Part of the dialogs.

    Returns:
        Scores as ``scores.json`` stores them.

    Raises:
        ValueError: The run or its data cannot be read.
    """
    system = load_system(run)
    part: Part = getattr(system.recommender.corpus, split)
    losses, answers = read_and_write(system, part)
    record = {name: score.as_dict() for name, score in perplexities(losses).items()}
    slot = system.vocabulary.pieces[system.vocabulary.slot]
    record |= {name: score.as_dict() for name, score in variety(answers, slot=slot).items()}
    lines = (
        json.dumps({"pair": pair, "label": part.texts[pair][1], "reply": " ".join(answer)})
        for pair, answer in enumerate(answers)
    )
    write_text(run / f"replies.{split}.jsonl", "".join(f"{line}\n" for line in lines))
    print(
        f"dialog      perplexity {record['perplexity']['value']:.2f}, without slots "
        f"{record['perplexity_without_slots']['value']:.2f} (n = {record['perplexity']['n']})"
    )
    return record


@torch.inference_mode()
def read_and_write(system: System, part: Part) -> tuple[list[ReplyLoss], list[list[str]]]:
    """Losses of all batches of a part, and the words of the system's answer to each pair."""
    config, frozen = system.config, system.recommender.model
    batches = part.dialog_in_order(
        config.batch_pairs, mentions=config.mentions, max_length=config.max_length
    )
    losses = []
    answers: list[list[str]] = [[] for _ in range(len(part))]
    for batch in tqdm(batches, desc="answering", unit="batch", disable=None):
        losses.append(batch_loss(system.network, frozen, batch, slot=system.vocabulary.slot))
        user, _ = frozen.users(batch.nodes, batch.mask)
        written = system.search(system.network, batch.xs, user)
        for pair, tokens in zip(batch.pair.tolist(), written, strict=True):
            answers[pair] = system.vocabulary.decode(tokens)
    return losses, answers


def perplexities(losses: Iterable[ReplyLoss]) -> dict[str, Score]:
    """Perplexity over all tokens, and over those that are no item slots.

    With the slots counted, perplexities are lower than those of systems that predict which item it
    is: all items are one token.
    """
    rows = [
        (
            (found.total.item(), int(found.count)),
            ((found.total - found.slot_total).item(), int(found.count - found.slot_count)),
        )
        for found in losses
    ]
    every, others = zip(*rows, strict=True)
    without = perplexity(others)
    return {
        "perplexity": perplexity(every),
        "perplexity_without_slots": Score(
            without.value, without.unit, f"{without.signature}|without item slots", without.n
        ),
    }


def variety(answers: Sequence[Sequence[str]], *, slot: str) -> dict[str, Score]:
    """How varied answers are and how often they name items.

    Args:
        answers: Words of each answer, items as slots.
        slot: The word that stands for an item.
    """
    n = len(answers)
    slots = [list(answer).count(slot) for answer in answers]
    length = sum(map(len, answers)) / n
    scores = {
        "item_ratio": Score(
            sum(count > 0 for count in slots) / n, "fraction", "answers with an item slot", n
        ),
        "items_per_response": Score(sum(slots) / n, "items", "item slots per answer", n),
        "words_per_response": Score(length, "words", "words per answer", n),
    }
    for size in NS:
        scores[f"distinct_{size}_per_response"] = distinct_per_response(answers, size)
        if any(len(answer) >= size for answer in answers):
            scores[f"distinct_{size}"] = distinct_n(answers, size)
    return scores

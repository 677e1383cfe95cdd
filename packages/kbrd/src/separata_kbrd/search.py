"""Writing answers: beam search with the user's bias, by our rules and by those of the authors.

Shapes: B dialogs, N rows being decoded, t tokens so far, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from separata_shared.decoding import (
    Constrain,
    Hypothesis,
    any_token,
    beam_search,
    gnmt_penalty,
    greedy_search,
)
from torch import Tensor

from .config import DialogConfig
from .dialog import DialogModel, DialogState
from .words import END, NULL, START, UNK, Vocabulary

IMPOSSIBLE = -1e20
"""Log-probability of what may not be chosen, in the authors' code."""
ALPHA = 0.65
"""Exponent of the length penalty, authors' code."""
MIN_N_BEST = 3
"""Finished hypotheses that the authors' search waits for."""

Search = Callable[[DialogModel, Tensor, Tensor], list[list[int]]]
"""Tokens of the answers, ends included, to contexts (B, S) of users (B, d)."""


def make_search(config: DialogConfig, vocabulary: Vocabulary) -> Search:
    """The search that ``config`` describes."""
    if config.search == "official":
        return official_search(config)
    unwanted = {NULL, START} | ({UNK} - {vocabulary.slot})
    return batched_search(config, unwanted=unwanted)


def batched_search(config: DialogConfig, *, unwanted: Collection[int]) -> Search:
    """Our search: no unwanted token, no n-gram twice, the answer always ends.

    Args:
        config: Beam, lengths and n.
        unwanted: Tokens that are never written.
    """
    banned = torch.tensor(sorted(unwanted), dtype=torch.int64)

    def search(model: DialogModel, context: Tensor, user: Tensor) -> list[list[int]]:
        def step(tokens: Tensor, state: DialogState) -> Tensor:
            return model.step(tokens, state).index_fill(1, banned.to(tokens.device), -torch.inf)

        found = beam_search(
            step,
            model.start(context, user),
            context.new_full((len(context),), START),
            beam_size=config.beam,
            max_lengths=[config.max_reply] * len(context),
            eos_index=END,
            padding_index=None,
            min_length=config.min_length,
            length_penalty=gnmt_penalty(ALPHA),
            constrain=no_repeats(config.block_ngram) if config.block_ngram else None,
        )
        return [_best(hypotheses).tokens.tolist() for hypotheses in found]

    return search


def official_search(config: DialogConfig) -> Search:
    """The authors' search: greedy with one beam, else ``official_beam``."""

    def search(model: DialogModel, context: Tensor, user: Tensor) -> list[list[int]]:
        if config.beam == 1:
            return official_greedy(model, context, user, limit=config.max_reply)
        found = official_beam(
            model,
            context,
            user,
            beam_size=config.beam,
            limit=config.max_reply,
            min_length=config.min_length,
            block_ngram=config.block_ngram,
        )
        return [hypothesis.tokens.tolist() for hypothesis in found]

    return search


def official_greedy(
    model: DialogModel, context: Tensor, user: Tensor, *, limit: int
) -> list[list[int]]:
    """The most probable token at every step, any token; ``limit`` tokens if no end comes.

    The authors take the limit from the longest answer that their process has seen; here it is a
    setting.
    """
    found = greedy_search(
        model.step,
        model.start(context, user),
        context.new_full((len(context),), START),
        max_lengths=[limit] * len(context),
        eos_index=END,
        padding_index=None,
        min_length=0,
    )
    return [tokens[:limit].tolist() for tokens in found]


def official_beam(
    model: DialogModel,
    context: Tensor,
    user: Tensor,
    *,
    beam_size: int,
    limit: int,
    min_length: int = 1,
    min_n_best: int = MIN_N_BEST,
    block_ngram: int = 0,
) -> list[Hypothesis]:
    """The best hypothesis of each dialog by the rules of the authors' beam.

    An ended hypothesis keeps its place for one step and has no continuation. The search of a dialog
    is done when the best continuation of some step was an end and ``min_n_best`` hypotheses have
    ended, or after ``limit`` steps; if nothing has ended by then, the last token of the best
    hypothesis is overwritten. Scores are sums divided by ((1 + l) / 6)^0.65, with l = 1 + number of
    tokens, the end counted.

    Args:
        model: Writes the answers.
        context: Tokens read (B, S).
        user: User vectors (B, d).
        beam_size: Places of a dialog.
        limit: Most tokens, the end counted.
        min_length: Steps in which no end is allowed.
        min_n_best: Hypotheses to wait for.
        block_ngram: See ``late_block``.
    """
    late = late_block(block_ngram)

    def constrain(log_probs: Tensor, tokens: Tensor) -> Tensor:
        log_probs = late(log_probs, tokens)
        if tokens.size(1) < min_length:
            log_probs[:, END] = IMPOSSIBLE
        return log_probs

    found = beam_search(
        model.step,
        model.start(context, user),
        context.new_full((len(context),), START),
        beam_size=beam_size,
        max_lengths=[limit - 1] * len(context),
        eos_index=END,
        padding_index=None,
        min_length=0,
        length_penalty=lambda length: ((2 + length) / 6) ** ALPHA,
        constrain=constrain,
        candidates_per_beam=1,
        limit=any_token,
        enough=lambda finished, best_ended: best_ended and finished >= min_n_best,
    )
    return [_best(hypotheses) for hypotheses in found]


def _best(hypotheses: Sequence[Hypothesis]) -> Hypothesis:
    if not hypotheses:
        raise ValueError("no answer is possible: every token is forbidden or not a number")
    return hypotheses[0]


def no_repeats(n: int) -> Constrain:
    """No hypothesis gets a token that would complete an n-gram it already has.

    Raises:
        ValueError: ``n`` is not positive.
    """
    if n < 1:
        raise ValueError(f"block_ngram: must be at least 1, got {n}")

    def constrain(log_probs: Tensor, tokens: Tensor) -> Tensor:
        if tokens.size(1) < n:
            return log_probs
        grams = tokens.unfold(1, n, 1)  # (N, t - n + 1, n)
        latest = tokens[:, tokens.size(1) - n + 1 :]
        same = (grams[..., :-1] == latest[:, None]).all(dim=-1)
        completes = grams[..., -1].where(same, NULL)  # which is never written
        return log_probs.scatter(1, completes, -torch.inf)

    return constrain


def late_block(n: int) -> Constrain:
    """The authors' ``block_ngram``: ends hypotheses that have a k-gram twice for a k in 1..n-1.

    A longer repetition holds one of a single word, so any n above 1 forbids every repeated word,
    and n = 1 nothing. What is repeated shows at the next step only, so an end that comes right
    after the repetition counts.
    """

    def constrain(log_probs: Tensor, tokens: Tensor) -> Tensor:
        if n < 2 or tokens.size(1) < 2:
            return log_probs
        repeats = (tokens.sort(dim=1).values.diff(dim=1) == 0).any(dim=1)
        return log_probs.masked_fill(repeats[:, None], IMPOSSIBLE)

    return constrain


def fill_slots(
    words: Sequence[str],
    *,
    slot: str,
    ranked: Iterable[int],
    mentioned: Collection[int],
) -> tuple[list[str | int], list[int]]:
    """Put items into the slots of an answer, from left to right, the best first.

    An item that was mentioned in the dialog, or stands further left, is passed over. A slot for
    which no item is left stays as it is.

    Args:
        words: Words of the answer.
        slot: The word that stands for an item.
        ranked: Items by falling score.
        mentioned: Items of the dialog so far.

    Returns:
        The answer with items among its words, and the items in their order.
    """
    seen = set(mentioned)
    fresh = (item for item in ranked if item not in seen and not seen.add(item))  # type: ignore[func-returns-value]
    filled: list[str | int] = []
    for word in words:
        item = next(fresh, None) if word == slot else None
        filled.append(word if item is None else item)
    return filled, [part for part in filled if isinstance(part, int)]

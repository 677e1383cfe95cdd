"""Greedy search and sampling: one sequence per sentence."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from separata_shared.decoding.step import StateT, Step, check_lengths

_AFTER_THE_END = -1  # no token


def greedy_search(
    step: Step[StateT],
    state: StateT,
    first_tokens: Tensor,
    *,
    max_lengths: Sequence[int],
    eos_index: int,
    padding_index: int | None,
    min_length: int = 1,
) -> list[Tensor]:
    """Take the most probable token at every step; equals beam search with one beam.

    Args:
        step: Called with one row per sentence that has not ended.
        state: Handed to ``step``.
        first_tokens: ``(B,)`` what the decoder reads first, such as EOS; not part of the results.
        max_lengths: Most tokens per sentence, EOS not counted.
        eos_index: Token that ends a sequence.
        padding_index: Token that is never generated; None for no such token.
        min_length: Fewest tokens, EOS not counted.

    Returns:
        For each sentence its tokens ``(L,)`` on the CPU, ending in EOS.

    Raises:
        ValueError: ``max_lengths`` does not fit.
    """
    return _generate(
        step,
        state,
        first_tokens,
        choose=lambda logits: logits.argmax(dim=-1),
        max_lengths=max_lengths,
        eos_index=eos_index,
        padding_index=padding_index,
        min_length=min_length,
    )


def sample(
    step: Step[StateT],
    state: StateT,
    first_tokens: Tensor,
    *,
    max_lengths: Sequence[int],
    eos_index: int,
    padding_index: int | None,
    min_length: int = 1,
    top_k: int | None = None,
    top_p: float = 1.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Draw every token from the model's distribution, or from the best part of it.

    Args:
        step: Called with one row per sentence that has not ended.
        state: Handed to ``step``.
        first_tokens: ``(B,)`` what the decoder reads first, such as EOS; not part of the results.
        max_lengths: Most tokens per sentence, EOS not counted.
        eos_index: Token that ends a sequence.
        padding_index: Token that is never generated; None for no such token.
        min_length: Fewest tokens, EOS not counted.
        top_k: Draw from the k most probable tokens only; None for all.
        top_p: Draw from the fewest tokens whose probabilities reach this sum (Holtzman et al.
            2020, Eq. 2), after ``top_k``.
        temperature: Divides the logits.
        generator: Source of randomness, on the device of ``first_tokens``; None for torch's own.

    Returns:
        For each sentence its tokens ``(L,)`` on the CPU, ending in EOS.

    Raises:
        ValueError: ``top_k``, ``top_p``, ``temperature`` or ``max_lengths`` does not fit.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, not {temperature}")

    def draw(logits: Tensor) -> Tensor:
        num_tokens = logits.size(1) if top_k is None else min(top_k, logits.size(1))
        best, tokens = (logits.float() / temperature).topk(num_tokens)
        probabilities = best.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return tokens.gather(1, drawn).squeeze(1)

    return _generate(
        step,
        state,
        first_tokens,
        choose=draw,
        max_lengths=max_lengths,
        eos_index=eos_index,
        padding_index=padding_index,
        min_length=min_length,
    )


@torch.no_grad()
def _generate(
    step: Step[StateT],
    state: StateT,
    first_tokens: Tensor,
    *,
    choose: Callable[[Tensor], Tensor],
    max_lengths: Sequence[int],
    eos_index: int,
    padding_index: int | None,
    min_length: int,
) -> list[Tensor]:
    """Extend every sentence by ``choose(logits (B, V))`` until it ends."""
    check_lengths(first_tokens, max_lengths, min_length)
    device = first_tokens.device
    sentences = torch.arange(len(max_lengths), device=device)  # those that have not ended
    limits = torch.tensor(max_lengths, device=device)
    never = torch.tensor([] if padding_index is None else [padding_index], device=device).long()
    not_yet = torch.cat((never, never.new_tensor([eos_index])))
    columns = []
    tokens = first_tokens
    for t in range(max(max_lengths, default=-1) + 1):
        banned = not_yet if t < min_length else never
        tokens = choose(step(tokens, state).index_fill(1, banned, -torch.inf))
        if t >= min(max_lengths):
            tokens = tokens.where(limits > t, eos_index)
        column = first_tokens.new_full((len(max_lengths),), _AFTER_THE_END)
        columns.append(column.index_copy(0, sentences, tokens))
        going = (tokens != eos_index).cpu().nonzero().squeeze(1)  # the one synchronisation
        if not len(going):
            break
        if len(going) < len(tokens):
            going = going.to(device)
            sentences, limits, tokens = sentences[going], limits[going], tokens[going]
            state.reorder(going, going)
    if not columns:
        return []
    return [row[row != _AFTER_THE_END] for row in torch.stack(columns, dim=1).cpu()]

"""The k-th largest number of each of many rows, by networks of comparisons.

A selection inside each row costs 10 ns a number on a CPU, because it branches. A sorting network
compares the same places in every row, so each step is one vector instruction for many rows, however
short they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Limits beyond which a network costs more than ``topk``, measured on a CPU: ``topk`` is fast where
# k is a small part of the row, a network needs many rows for each of its steps.
NETWORK_K = 128
NETWORK_NUMBERS_PER_K = 64
NETWORK_ROWS = 512
# Numbers that pass through the network at a time: a few MiB stay in cache; and the least rows.
CHUNK_NUMBERS, CHUNK_ROWS = 2**20, 1024


def kth_largest(numbers: Tensor, k: int | Tensor) -> Tensor:
    """The k-th largest number of each row, the smallest where a row is shorter than k.

    Args:
        numbers: ``(..., S)``.
        k: At least 1; for all rows, or an integer tensor broadcastable to ``(..., 1)``.

    Returns:
        The number of each row ``(..., 1)``.
    """
    source = numbers.shape[-1]
    if isinstance(k, int):
        return _descending(numbers, min(k, source))[-1].unsqueeze(-1)
    k = k.clamp(max=source).expand(*numbers.shape[:-1], 1)
    # A compiled graph cannot depend on the largest k.
    most = source if torch.compiler.is_compiling() else int(k.amax()) if k.numel() else 1
    return torch.stack(_descending(numbers, most), dim=-1).gather(-1, k - 1)


def _descending(numbers: Tensor, count: int) -> list[Tensor]:
    """The largest ``count`` numbers of each row, in descending order, as ``count`` tensors.

    A row is dealt into lists as long as the next power of two, the lists are sorted, and of two
    lists the best are kept until one is left.
    """
    source = numbers.shape[-1]
    few = numbers[..., 0].numel() < NETWORK_ROWS
    if few or count > NETWORK_K or source > NETWORK_NUMBERS_PER_K * count:
        return list(numbers.topk(count, dim=-1).values.unbind(-1))
    length = 1 << (count - 1).bit_length()
    num_lists = 1 << (-(-source // length) - 1).bit_length()
    chunk = max(CHUNK_NUMBERS // source, CHUNK_ROWS)
    parts = []
    for rows in torch.split(numbers.reshape(-1, source), chunk):
        columns = numbers.new_empty(length * num_lists, len(rows))
        columns[:source] = rows.t()
        columns[source:] = -torch.inf
        places = list(columns.view(length, num_lists, -1).unbind())
        _exchange(places, _sorting_network(length))
        lists = num_lists
        while lists > 1:
            lists //= 2
            # The best of two descending lists, which are then bitonic and need a merge.
            places = [
                torch.maximum(first[:lists], last[lists:])
                for first, last in zip(places, reversed(places), strict=True)
            ]
            _exchange(places, _bitonic_merge(length))
        parts.append(torch.cat(places[:count]))
    return list(torch.cat(parts, dim=1).view(count, *numbers.shape[:-1]))


def _exchange(places: list[Tensor], pairs: Iterator[tuple[int, int]]) -> None:
    """Put the larger one of each pair of places first, in the memory of the places."""
    spare = torch.empty_like(places[0])
    for i, j in pairs:
        first, second = places[i], places[j]
        torch.maximum(first, second, out=spare)
        torch.minimum(first, second, out=second)
        places[i], spare = spare, first


def _sorting_network(length: int) -> Iterator[tuple[int, int]]:
    """Comparisons that sort ``length`` places, a power of two (Batcher's odd-even merge sort)."""
    run = 1
    while run < length:
        step = run
        while step >= 1:
            for start in range(step % run, length - step, 2 * step):
                for i in range(start, start + min(step, length - step - start)):
                    if i // (2 * run) == (i + step) // (2 * run):
                        yield i, i + step
            step //= 2
        run *= 2


def _bitonic_merge(length: int) -> Iterator[tuple[int, int]]:
    """Comparisons that sort a bitonic list of ``length`` places."""
    step = length // 2
    while step:
        yield from ((i, i + step) for i in range(length) if not i & step)
        step //= 2

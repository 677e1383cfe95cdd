"""Language models of characters that read a text in parallel streams, block by block.

Each stream's past is kept in caches from one block to the next.

Shapes: B streams, T positions of a block, L positions of a cache, M model width.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from separata_shared.data.batching import Batches
from separata_shared.metrics import bits_per_character
from separata_shared.training import Loss
from separata_shared.translation import DataConfig

Symbols = NDArray[np.integer[Any]]


class Reader(Protocol):
    """A language model, as a module."""

    def __call__(self, tokens: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Read a block ``(B, T)``; give logits ``(B, T, V)`` and the caches for the next one."""
        ...

    def start(self, batch_size: int) -> list[Tensor]:
        """Empty caches, one per layer: nothing has been read."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, as of any module."""
        ...


class Block(NamedTuple):
    """One block of some of the streams."""

    tokens: Tensor
    """Symbols (B,T)."""
    targets: Tensor
    """The symbol after each of them (B,T)."""
    part: int
    """Which of the micro-batches the streams belong to."""
    is_first: bool
    """Whether the streams begin with this block."""


class Blocks(Sequence[Block]):
    """The blocks of a text, all streams advancing together.

    Args:
        symbols: The text (N,).
        streams: Number of streams the text is cut into.
        block: Characters of a block.
        parts: Micro-batches that the streams of one step are dealt to, in order.
        offset: Characters left out at the beginning.

    Raises:
        ValueError: The text is too short for one block.
    """

    def __init__(
        self, symbols: Symbols, *, streams: int, block: int, parts: int = 1, offset: int = 0
    ) -> None:
        length = (len(symbols) - offset) // streams
        self._block, self._parts = block, parts
        self._steps = (length - 1) // block
        if self._steps < 1:
            raise ValueError(
                f"a text of {len(symbols)} characters is too short for {streams} streams of blocks "
                f"of {block}"
            )
        self._rows = symbols[offset : offset + streams * length].reshape(streams, length)

    def __len__(self) -> int:
        return self._steps * self._parts

    def __getitem__(self, index: Any) -> Any:
        step, part = divmod(index, self._parts)
        size = len(self._rows) // self._parts
        columns = slice(step * self._block, (step + 1) * self._block + 1)
        chosen = self._rows[part * size : (part + 1) * size, columns].astype(np.int64)
        block = torch.from_numpy(chosen)
        return Block(block[:, :-1], block[:, 1:], part, step == 0)


class Memory(nn.Module):
    """What a language model remembers of the streams it is being trained on.

    As a submodule of the model it is saved in checkpoints, so a run of one process goes on exactly
    where it was. With several, those that did not save begin with an empty past. Weight files,
    which hold parameters and buffers alone, do not contain it.

    Args:
        shape: Layers, streams, most positions and width of the caches of one part: ``(layers, B, L,
            M)``.
        parts: Micro-batches that the streams of a step are dealt to.
    """

    def __init__(self, shape: tuple[int, int, int, int], *, parts: int = 1) -> None:
        super().__init__()
        self._shape = shape
        self._caches: list[list[Tensor] | None] = [None] * parts

    def recall(self, part: int) -> list[Tensor] | None:
        """Caches of the layers after the last block of ``part``; None before the first."""
        return self._caches[part]

    def keep(self, part: int, caches: list[Tensor]) -> None:
        """Replace the caches of ``part``."""
        self._caches[part] = caches

    def get_extra_state(self) -> Tensor:
        """All caches, filled up with zeros to their longest: ``(parts, layers, B, L, M)``."""
        state = torch.zeros(len(self._caches), *self._shape)
        for part, caches in enumerate(self._caches):
            for layer, cache in enumerate(caches or []):
                state[part, layer, :, self._shape[2] - cache.shape[1] :] = cache
        return state

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what ``get_extra_state`` gave."""
        self._caches = []
        for part in state:
            filled = part.abs().amax(dim=(0, 1, 3)).nonzero()  # the zeros before were filled in
            first = int(filled[0]) if len(filled) else part.shape[2]
            self._caches.append(list(part[:, :, first:].unbind()))


def as_characters(data: DataConfig) -> DataConfig:
    """The made text in the place of the made sentence pairs of the default configuration."""
    return replace(data, dataset="tiny_characters") if data.dataset == "tiny" else data


def training_blocks(
    symbols: Symbols, *, streams: int, block: int, parts: int = 1, seed: int
) -> Batches[Block]:
    """Blocks of each epoch; every epoch cuts the text at other places, drawn from the seed."""

    def epoch_blocks(epoch: int) -> Blocks:
        offset = int(np.random.default_rng((seed, epoch)).integers(block)) if epoch else 0
        return Blocks(symbols, streams=streams, block=block, parts=parts, offset=offset)

    return epoch_blocks


def next_symbol_loss(network: nn.Module, model: Reader, memory: Memory, batch: Block) -> Loss:
    """Cross-entropy summed over the symbols of a block.

    Args:
        network: Called as ``network(tokens, caches)``; may be a wrapper of ``model``.
        model: The model, for its empty caches.
        memory: Takes the caches from block to block.
        batch: The block.
    """
    caches = None if batch.is_first else memory.recall(batch.part)
    caches = model.start(len(batch.tokens)) if caches is None else caches
    logits, kept = network(batch.tokens, [cache.to(batch.tokens.device) for cache in caches])
    memory.keep(batch.part, kept)
    nll = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="sum")
    count = torch.tensor(batch.targets.numel(), device=logits.device)
    return Loss(total=nll, count=count, log={"nll": nll.detach()})


def reading_blocks(symbols: Symbols, streams: int, block: int) -> Iterator[Block]:
    """Blocks for scoring: streams as even as can be, and no character after the first left out.

    Raises:
        ValueError: There is no character to predict.
    """
    if len(symbols) < 2:
        raise ValueError(f"a text of {len(symbols)} characters has none to predict")
    length = math.ceil((len(symbols) - 1) / streams)
    starts = range(0, len(symbols) - 1, length)
    rows = [symbols[start : start + length + 1].astype(np.int64) for start in starts]
    for begin in range(0, length, block):
        parts = [torch.from_numpy(row[begin : begin + block + 1]) for row in rows]
        # Only the last stream can be shorter than the others; its missing targets do not count.
        padded = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=_NO_TARGET)
        yield Block(padded[:, :-1].clamp(min=0), padded[:, 1:], 0, begin == 0)


_NO_TARGET = -100


@torch.no_grad()
def language_model_sums(model: Reader, blocks: Iterable[Block]) -> Iterator[tuple[float, int]]:
    """Summed negative log-likelihood in nats and number of characters of each block."""
    device = next(model.parameters()).device
    caches: list[Tensor] = []
    for batch in blocks:
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        if batch.is_first:
            caches = model.start(len(tokens))
        logits, caches = model(tokens, caches)
        nll = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=_NO_TARGET,
            reduction="sum",
        )
        yield nll.item(), int((targets != _NO_TARGET).sum())


def language_model_loss(model: Reader, blocks: Iterable[Block]) -> dict[str, float]:
    """Negative log-likelihood in nats, and bits, per character."""
    bits = bits_per_character(language_model_sums(model, blocks)).value
    return {"loss": bits * math.log(2), "bits_per_character": bits}

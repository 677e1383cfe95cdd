"""Keys and values that attention keeps while a decoder writes one token after another.

``N`` is the number of rows being decoded: ``N = B * G`` for ``G`` hypotheses of each sentence.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Project = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps a source ``(B, S, M)`` to keys and values, each ``(B, H, S, D)``."""

_FIRST_CAPACITY = 32


class Cache(Protocol):
    """What an attention module asks for the keys and values of a call."""

    def read(self, source: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """Return keys and values, using ``project(source)`` where they are not known yet."""
        ...


class GrowingCache:
    """Keys and values of self-attention: each call adds those of the new positions.

    They are written in place into a buffer that doubles when it is full. It is time-first,
    ``(capacity, 2, N, H, D)``, so that the part in use is one contiguous block. Reordering copies
    that part to a second buffer, and the two change places: fresh memory at every step would cost
    more than the copy.
    """

    def __init__(self) -> None:
        self.length = 0
        self._buffer: Tensor | None = None
        self._spare: Tensor | None = None

    def read(self, source: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """Append the keys and values of ``source (N, T, M)``; return all, ``(N, H, length, D)``."""
        keys, values = project(source)
        end = self.length + source.size(1)
        buffer = self._buffer
        if buffer is None or end > buffer.size(0):
            rows, heads, _, width = keys.shape
            grown = keys.new_empty(max(_FIRST_CAPACITY, 2 * end), 2, rows, heads, width)
            if buffer is not None:
                grown[: self.length] = buffer[: self.length]
            self._buffer = buffer = grown
        buffer[self.length : end, 0] = keys.permute(2, 0, 1, 3)
        buffer[self.length : end, 1] = values.permute(2, 0, 1, 3)
        self.length = end
        all_keys, all_values = buffer[:end].permute(1, 2, 3, 0, 4).unbind()
        return all_keys, all_values

    def reorder(self, index: Tensor) -> None:
        """Let row ``i`` continue what row ``index[i]`` holds."""
        buffer = self._buffer
        if buffer is None:
            return
        target = _room(self._spare, (*buffer.shape[:2], index.numel(), *buffer.shape[3:]), buffer)
        torch.index_select(buffer[: self.length], 2, index, out=target[: self.length])
        self._buffer, self._spare = target, buffer


def _room(old: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An unfilled tensor of this shape, in the memory of ``old`` where that is large enough."""
    size = math.prod(shape)
    if old is None or old.numel() < size:
        return like.new_empty(shape)
    return old.view(-1)[:size].view(shape)


class FixedCache:
    """Keys and values of cross-attention: projected by the first call and kept, ``(B, H, S, D)``.

    There is one row per sentence however many hypotheses it has, so permuting hypotheses within
    their sentences leaves this cache as it is.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor] | None = None

    def read(self, source: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """Return the keys and values of ``source (B, S, M)``, projecting it only once."""
        if self._known is None:
            keys, values = project(source)
            # Heads apart in memory: products would otherwise copy them at every step.
            self._known = keys.contiguous(), values.contiguous()
        return self._known

    def keep(self, sentences: Tensor) -> None:
        """Drop all sentences but these."""
        if self._known is not None:
            keys, values = self._known
            self._known = keys.index_select(0, sentences), values.index_select(0, sentences)


class LayerCache:
    """What one decoder layer keeps."""

    def __init__(self) -> None:
        self.self_attention = GrowingCache()
        self.cross_attention = FixedCache()


class DecoderState:
    """Everything a decoder keeps between two steps, made by ``Decoder.start``.

    Attributes:
        memory: Encoder output ``(B, S, M)``.
        memory_mask: Boolean of four dimensions, broadcastable to ``(B, H, 1, S)``, True = may
            attend; or None.
        layers: One cache per decoder layer.
    """

    def __init__(self, memory: Tensor, memory_mask: Tensor | None, num_layers: int) -> None:
        self.memory = memory
        self.memory_mask = memory_mask
        self.layers = [LayerCache() for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Number of target positions decoded so far."""
        return self.layers[0].self_attention.length

    def reorder(self, index: Tensor, sentences: Tensor | None = None) -> None:
        """Rearrange the rows before the next step.

        Args:
            index: ``(N,)`` row ``i`` of the next step continues row ``index[i]`` of the last one.
                The rows of one sentence stay together and come in the order of the sentences; a
                sentence may get any number of rows, the same for all.
            sentences: ``(B,)`` the sentences that go on, ascending; None when all do.
        """
        for layer in self.layers:
            layer.self_attention.reorder(index)
        if sentences is None:
            return
        for layer in self.layers:
            layer.cross_attention.keep(sentences)
        self.memory = self.memory.index_select(0, sentences)
        if self.memory_mask is not None and self.memory_mask.size(0) > 1:
            self.memory_mask = self.memory_mask.index_select(0, sentences)

"""Keys and values that attention keeps while a decoder writes one token after another.

``N`` is the number of rows being decoded: ``N = B * G`` for ``G`` hypotheses of each sentence.
"""

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

    They are written in place into buffers that double when full. The buffers are time-first,
    ``(capacity, N, H, D)``, so that the part in use is one contiguous block.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def read(self, source: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """Append the keys and values of ``source (N, T, M)``; return all, ``(N, H, length, D)``."""
        keys, values = project(source)
        end = self.length + source.size(1)
        self._keys = self._append(self._keys, keys, end)
        self._values = self._append(self._values, values, end)
        self.length = end
        return self._keys[:end].permute(1, 2, 0, 3), self._values[:end].permute(1, 2, 0, 3)

    def reorder(self, index: Tensor) -> None:
        """Let row ``i`` continue what row ``index[i]`` holds."""
        self._keys = self._gather(self._keys, index)
        self._values = self._gather(self._values, index)

    def _append(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        if buffer is None or end > buffer.size(0):
            rows, heads, _, width = new.shape
            grown = new.new_empty(max(_FIRST_CAPACITY, 2 * end), rows, heads, width)
            if buffer is not None:
                grown[: self.length] = buffer[: self.length]
            buffer = grown
        buffer[self.length : end] = new.permute(2, 0, 1, 3)
        return buffer

    def _gather(self, buffer: Tensor | None, index: Tensor) -> Tensor | None:
        if buffer is None:
            return None
        gathered = buffer.new_empty(buffer.size(0), index.numel(), *buffer.shape[2:])
        torch.index_select(
            buffer[: self.length], 1, index, out=gathered[: self.length]
        )  # the unused rest of the buffer is not copied
        return gathered


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
            self._known = project(source)
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
        memory_mask: Boolean, broadcastable to ``(B, H, 1, S)``, True = may attend; or None.
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

"""What a model must offer to be decoded: a step function and a state that can be rearranged."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor


class State(Protocol):
    """What a model remembers of the tokens it has been given; updated in place by the step."""

    def reorder(self, index: Tensor, sentences: Tensor | None = None) -> None:
        """Rearrange the rows before the next step.

        Args:
            index: ``(N,)`` row ``i`` of the next step continues row ``index[i]`` of the last one.
                The rows of a sentence stay together, in the order of the sentences. ``N`` may
                differ from the number of rows before.
            sentences: The sentences that go on, ascending, where some have ended; else None. For
                what is kept once per sentence, however many rows it has.
        """
        ...


StateT = TypeVar("StateT", bound=State)

Step = Callable[[Tensor, StateT], Tensor]
"""``step(tokens, state)``: logits or log-probabilities ``(N, V)`` after tokens ``(N,)``."""


def check_lengths(first_tokens: Tensor, max_lengths: Sequence[int], min_length: int) -> None:
    """Raise a ``ValueError`` unless there is a fitting maximum length for every sentence."""
    if len(max_lengths) != first_tokens.size(0):
        raise ValueError(
            f"max_lengths must have one number for each of the {first_tokens.size(0)} sentences, "
            f"not {len(max_lengths)}"
        )
    if any(length < min_length for length in max_lengths):
        raise ValueError(f"max_lengths must be at least min_length ({min_length})")

"""A number with what is needed to repeat it."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Score:
    """The value of a metric on a test set.

    Args:
        value: The number.
        unit: What it counts: ``percent``, ``fraction``, ``bits per character``, ...
        signature: How it was computed, in the words of the tool that did.
        n: Items it was computed from: sentences, tokens, queries.

    Raises:
        ValueError: ``value`` is not a number, or ``n`` is not positive.
    """

    value: float
    unit: str
    signature: str
    n: int

    def __post_init__(self) -> None:
        """Refuse a score that measures nothing."""
        if math.isnan(self.value):
            raise ValueError(f"{self.signature}: the score is not a number")
        if self.n < 1:
            raise ValueError(f"{self.signature}: nothing to score")

    def __str__(self) -> str:
        return f"{self.value:.4g} {self.unit} ({self.signature}, n = {self.n})"

    def as_dict(self) -> dict[str, float | int | str]:
        """The fields, as ``scores.json`` stores them."""
        return asdict(self)

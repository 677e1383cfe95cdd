"""Perplexity and bits per character from summed negative log-likelihoods."""

import math
import sys
from collections.abc import Iterable

from separata_shared.metrics.score import Score


def perplexity(sums: Iterable[tuple[float, int]]) -> Score:
    """Perplexity over all tokens: exp(sum of -log p / number of tokens).

    Every token weighs the same, however the text was cut into batches; a mean of per-batch
    perplexities would not be that.

    Args:
        sums: For each batch the summed negative log-likelihood in nats, and its tokens.

    Returns:
        Perplexity; n is the number of tokens. Infinite where the sum is too large to exponentiate.

    Raises:
        ValueError: There are no tokens, or the loss is not a number.
    """
    mean, tokens = _mean(sums)
    value = math.inf if mean > math.log(sys.float_info.max) else math.exp(mean)
    return Score(value, "perplexity", "perplexity|weight:token", tokens)


def bits_per_character(sums: Iterable[tuple[float, int]]) -> Score:
    """Bits per character: sum of -log2 p / number of characters.

    Args:
        sums: For each batch the summed negative log-likelihood in nats, and its characters. With
            sub-words, count the characters of the text and not the tokens.

    Returns:
        Bits per character; n is the number of characters.

    Raises:
        ValueError: There are no characters, or the loss is not a number.
    """
    mean, characters = _mean(sums)
    return Score(mean / math.log(2), "bits per character", "bpc|weight:character", characters)


def _mean(sums: Iterable[tuple[float, int]]) -> tuple[float, int]:
    pairs = list(sums)
    count = sum(number for _, number in pairs)
    if count < 1:
        raise ValueError("perplexity: nothing to score")
    return math.fsum(total for total, _ in pairs) / count, count

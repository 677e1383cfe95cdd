"""How varied generated text is."""

from collections.abc import Sequence

from separata_shared.metrics.score import Score


def distinct_n(sentences: Sequence[Sequence[str]], n: int) -> Score:
    """Distinct-n (Li et al. 2016): different n-grams / all n-grams of a whole test set.

    No n-gram crosses the end of a sentence; sentences shorter than n have none.

    Args:
        sentences: Tokens of each generated sentence.
        n: Length of the n-grams.

    Returns:
        Fraction in (0, 1]; its n is the number of n-grams.

    Raises:
        ValueError: ``n`` is not positive, or no sentence is that long.
    """
    if n < 1:
        raise ValueError(f"distinct-n: n must be at least 1, got {n}")
    grams = [
        tuple(tokens[start : start + n])
        for tokens in sentences
        for start in range(len(tokens) - n + 1)
    ]
    if not grams:
        raise ValueError(f"distinct-{n}: no sentence has {n} tokens")
    return Score(len(set(grams)) / len(grams), "fraction", f"distinct-{n}|corpus", len(grams))

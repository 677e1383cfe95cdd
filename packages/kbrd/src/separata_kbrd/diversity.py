"""Distinct n-grams by response, as the authors count them; by n-gram it is ``shared``'s."""

from collections.abc import Sequence

from separata_shared.metrics import Score


def distinct_per_response(responses: Sequence[Sequence[str]], n: int) -> Score:
    """Different n-grams of all responses, divided by the number of responses.

    It can exceed one. A response shorter than n, an empty one too, has no n-gram and still counts
    in the denominator.

    Args:
        responses: Tokens of each response.
        n: Length of the n-grams.

    Raises:
        ValueError: ``n`` is not positive, or there is no response.
    """
    if n < 1 or not responses:
        raise ValueError(f"distinct-{n}: n must be at least 1, and something must be said")
    grams = {
        gram
        for tokens in responses
        for gram in zip(*(tokens[start:] for start in range(n)), strict=False)
    }
    value = len(grams) / len(responses)
    return Score(value, "n-grams per response", f"distinct-{n}|per response", len(responses))

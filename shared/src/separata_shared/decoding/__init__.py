"""Decoding of any model that offers a step function and a state that can be rearranged."""

from separata_shared.decoding.beam import (
    Constrain,
    Enough,
    Hypothesis,
    LengthPenalty,
    Limit,
    any_token,
    beam_search,
    gnmt_penalty,
    only_ends,
    power_penalty,
)
from separata_shared.decoding.sampling import greedy_search, sample
from separata_shared.decoding.step import State, Step

__all__ = [
    "Constrain",
    "Enough",
    "Hypothesis",
    "LengthPenalty",
    "Limit",
    "State",
    "Step",
    "any_token",
    "beam_search",
    "gnmt_penalty",
    "greedy_search",
    "only_ends",
    "power_penalty",
    "sample",
]

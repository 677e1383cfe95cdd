"""Decoding of any model that offers a step function and a state that can be rearranged."""

from separata_shared.decoding.beam import (
    Constrain,
    Hypothesis,
    LengthPenalty,
    beam_search,
    gnmt_penalty,
    power_penalty,
)
from separata_shared.decoding.sampling import greedy_search, sample
from separata_shared.decoding.step import State, Step

__all__ = [
    "Constrain",
    "Hypothesis",
    "LengthPenalty",
    "State",
    "Step",
    "beam_search",
    "gnmt_penalty",
    "greedy_search",
    "power_penalty",
    "sample",
]

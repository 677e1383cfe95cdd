"""Decoding of any model that offers a step function and a state that can be rearranged."""

from separata_shared.decoding.beam import Hypothesis, beam_search, gnmt_penalty, power_penalty
from separata_shared.decoding.sampling import greedy_search, sample
from separata_shared.decoding.step import State, Step

__all__ = [
    "Hypothesis",
    "State",
    "Step",
    "beam_search",
    "gnmt_penalty",
    "greedy_search",
    "power_penalty",
    "sample",
]

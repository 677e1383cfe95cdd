"""Masks that the operations have in common."""

import torch
from hypothesis import given, settings
from separata_shared.attention._inputs import allowed_keys, compute_dtype
from separata_shared.attention.topk.api import count_allowed
from separata_shared.testing.strategies import AttentionInputs, attention_inputs


@settings(max_examples=40, deadline=None)
@given(inputs=attention_inputs())
def test_allowed_keys_are_those_of_mask_and_causality(inputs: AttentionInputs) -> None:
    target, source = inputs.query.shape[2], inputs.key.shape[2]
    expected = inputs.allowed()
    sizes = {"target": target, "source": source, "device": torch.device("cpu")}
    allowed = allowed_keys(inputs.mask, causal=inputs.causal, **sizes)
    if allowed is None:
        assert expected.all()
    else:
        assert torch.equal(allowed.expand(expected.shape), expected)
    if inputs.causal or inputs.mask is not None:
        count = count_allowed(inputs.mask, causal=inputs.causal, **sizes)
        assert torch.equal(count.expand(expected.shape[:3]), expected.sum(-1))


def test_scores_have_at_least_single_precision() -> None:
    half, single, double = (
        torch.zeros(1, dtype=t) for t in (torch.half, torch.float, torch.double)
    )
    assert compute_dtype(half, half) == torch.float32
    assert compute_dtype(half, single) == torch.float32
    assert compute_dtype(single, double) == torch.float64

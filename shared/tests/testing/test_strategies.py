import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from separata_shared.testing.strategies import AttentionInputs, attention_inputs

quick = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(attention_inputs(dtypes=(torch.float32, torch.bfloat16)))
def test_inputs_have_the_stated_shapes(inputs: AttentionInputs) -> None:
    query, key, value = inputs.tensors
    batch, heads, target, width = query.shape
    assert key.shape[:3] == value.shape[:3]
    assert (key.shape[0], key.shape[3], heads % key.shape[1]) == (batch, width, 0)
    scores = (batch, heads, target, key.shape[2])
    for extra in (inputs.mask, inputs.bias):
        assert extra is None or torch.broadcast_shapes(extra.shape, scores) == scores
    assert inputs.allowed().shape == inputs.scores().shape == scores
    assert query.dtype == key.dtype == value.dtype


@quick
@given(attention_inputs(gap=1e-3))
def test_the_selection_is_clear_by_the_gap(inputs: AttentionInputs) -> None:
    ordered = inputs.scores().sort(dim=-1, descending=True).values
    for row in ordered.flatten(0, -2):
        finite = row[row.isfinite()]
        if len(finite) > inputs.top_k:
            assert finite[inputs.top_k - 1] - finite[inputs.top_k] > 1e-3


@quick
@given(attention_inputs())
def test_leaves_keep_numbers_and_layout(inputs: AttentionInputs) -> None:
    for old, new in zip(inputs.tensors, inputs.leaves().tensors, strict=True):
        assert torch.equal(old, new.detach())
        assert old.stride() == new.stride()
        assert new.is_leaf
        assert new.requires_grad


def test_the_corners_are_reached() -> None:
    search = settings(quick, max_examples=500, phases=[Phase.generate])

    def some(condition: object) -> None:
        find(attention_inputs(), condition, settings=search)

    some(lambda x: not x.allowed().any(dim=-1).all())
    some(lambda x: x.top_k > x.key.shape[2])
    some(lambda x: x.query.shape[1] > x.key.shape[1])
    some(lambda x: not x.query.is_contiguous() and x.query.numel() > 1)
    some(lambda x: x.query.shape[2] > x.key.shape[2] and x.causal)
    some(lambda x: x.mask is not None and x.mask.dim() == 4 and x.mask.shape[1] > 1)
    some(lambda x: x.bias is not None and x.query.shape[2] == 1)


@quick
@given(attention_inputs(), st.sampled_from([torch.float64, torch.float16]))
def test_another_type_keeps_everything_else(inputs: AttentionInputs, dtype: torch.dtype) -> None:
    other = inputs.to(dtype)
    assert {tensor.dtype for tensor in other.tensors} == {dtype}
    assert torch.equal(other.allowed(), inputs.allowed())
    assert other.top_k == inputs.top_k

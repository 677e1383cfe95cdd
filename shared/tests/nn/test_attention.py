from functools import partial

import pytest
import torch
from separata_shared.attention import Attend, dense_attention, topk_attention
from separata_shared.nn import MultiHeadAttention, padding_mask
from torch import Tensor, nn
from torch.testing import assert_close


def test_equals_torch_multi_head_attention_with_the_same_weights() -> None:
    module = MultiHeadAttention(16, 4)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([each.weight for each in projections]))
        theirs.in_proj_bias.copy_(torch.randn(48))
        for each, bias in zip(projections, theirs.in_proj_bias.split(16), strict=True):
            each.bias.copy_(bias)
        theirs.out_proj.load_state_dict(module.out_proj.state_dict())
    query, memory = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    allowed = torch.rand(3, 7) > 0.3
    allowed[:, 0] = True
    expected, _ = theirs(query, memory, memory, key_padding_mask=~allowed)
    assert_close(module(query, memory, mask=allowed[:, None, None]), expected)


def test_state_dict_names() -> None:
    names = [f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    assert set(MultiHeadAttention(8, 2).state_dict()) == {
        *names,
        "out_proj.weight",
        "out_proj.bias",
    }


def test_initial_weights_have_the_published_bounds() -> None:
    # Xavier: U(-b, b) with b = gain * sqrt(6 / (fan_in + fan_out)); fairseq's gain is 1/sqrt(2)
    # where queries, keys and values have the same width.
    same = MultiHeadAttention(64, 4)
    bound = (6 / 128) ** 0.5
    for projection, gain in ((same.q_proj, 0.5**0.5), (same.v_proj, 0.5**0.5), (same.out_proj, 1)):
        assert 0.95 * bound * gain < projection.weight.abs().max() <= bound * gain
        assert not projection.bias.any()
    other = MultiHeadAttention(64, 4, key_width=32)
    assert 0.95 * bound < other.q_proj.weight.abs().max() <= bound
    assert 0.95 < other.k_proj.weight.abs().max() / (6 / 96) ** 0.5 <= 1


def test_grouped_heads_equal_repeated_ones() -> None:
    grouped = MultiHeadAttention(16, 4, num_kv_heads=2)
    full = MultiHeadAttention(16, 4)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        heads = state[name].view(2, 4, *state[name].shape[1:])
        state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 6, 16)
    assert_close(grouped(x, causal=True), full(x, causal=True))


def test_groups_of_queries_share_a_row_of_memory(attend: Attend) -> None:
    module = MultiHeadAttention(16, 4, attend=attend, key_width=12)
    query, memory = torch.randn(6, 1, 16), torch.randn(2, 9, 12)
    mask = torch.rand(2, 1, 1, 9) > 0.4
    shared = module(query, memory, mask=mask)
    repeated = module(query, memory.repeat_interleave(3, 0), mask=mask.repeat_interleave(3, 0))
    assert_close(shared, repeated)


def test_rows_that_cannot_share_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows, no multiple of the 6"):
        MultiHeadAttention(16, 4)(torch.randn(2, 3, 16), torch.randn(6, 5, 16))


def test_masked_memory_has_no_influence_and_no_gradient(attend: Attend) -> None:
    module = MultiHeadAttention(16, 4, attend=attend)
    query, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16, requires_grad=True)
    mask = (torch.arange(7) < 4)[None, None, None]
    output = module(query, memory, mask=mask)
    output.square().sum().backward()
    assert memory.grad is not None
    assert not memory.grad[:, 4:].any()
    assert memory.grad[:, :4].any()
    assert_close(output, module(query, memory[:, :4]))


def test_gradient_reaches_every_parameter(attend: Attend) -> None:
    module = MultiHeadAttention(16, 4, attend=attend)
    module(torch.randn(2, 6, 16), causal=True).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        # A key bias adds the same to all scores of a query, which softmax ignores.
        assert parameter.grad.abs().max() > (0 if name == "k_proj.bias" else 1e-4), name


def test_bias_is_added_to_the_scores() -> None:
    module = MultiHeadAttention(16, 4)
    x = torch.randn(2, 5, 16)
    allowed = torch.rand(5, 5) > 0.5
    bias = torch.zeros(5, 5).masked_fill(~allowed, -torch.inf)
    assert_close(module(x, bias=bias), module(x, mask=allowed))


def test_dropout_acts_in_training_only() -> None:
    module = MultiHeadAttention(16, 4, dropout=0.5)
    x = torch.randn(2, 5, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


class Counting(nn.Module):
    calls = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        self.calls += self.training
        return value


def test_attend_may_be_a_module_and_be_replaced_both_ways() -> None:
    module = MultiHeadAttention(16, 4, attend=Counting())
    x = torch.randn(1, 3, 16)
    module(x)
    module.eval()
    module(x)
    assert module.attend.calls == 1
    module.replace_attend(dense_attention)
    dense = module(x)
    module.replace_attend(partial(topk_attention, top_k=1))
    assert not torch.equal(module(x), dense)
    module.replace_attend(Counting())
    assert isinstance(dict(module.named_children())["attend"], Counting)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, None), (4, 3)])
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int | None) -> None:
    with pytest.raises(ValueError, match="must divide"):
        MultiHeadAttention(16, heads, num_kv_heads=kv_heads)


def test_runs_under_autocast() -> None:
    module = MultiHeadAttention(16, 4)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x, causal=True)
    assert output.dtype == torch.bfloat16
    # bf16 has 8 significant bits; the values here are below 2.
    assert_close(output.float(), module(x, causal=True), atol=2e-2, rtol=0)


def test_padding_mask_allows_what_is_not_padding() -> None:
    mask = padding_mask(torch.tensor([[5, 1, 1], [4, 2, 1]]), padding_index=1)
    assert mask.tolist() == [[[[True, False, False]]], [[[True, True, False]]]]

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_explicit_sparse_transformer.multihead import (
    TopKMultiheadAttention,
    from_fairseq_attention,
)
from separata_shared.attention import topk_attention
from torch import Tensor, nn

WIDTHS: list[dict[str, int]] = [{}, {"kdim": 6}, {"kdim": 6, "vdim": 5}]


def pair(top_k: int, **options: Any) -> tuple[nn.MultiheadAttention, TopKMultiheadAttention]:
    """A torch module in float64 and ours with its parameters."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    nn.init.normal_(dense.out_proj.weight)
    return dense, TopKMultiheadAttention.from_dense(dense, top_k=top_k)


@settings(max_examples=40, deadline=None)
@given(
    target=st.integers(1, 5),
    source=st.integers(1, 6),
    batch_first=st.booleans(),
    bias=st.booleans(),
    widths=st.sampled_from(WIDTHS),
    masks=st.sampled_from(["none", "bool", "float", "per_head"]),
    average=st.booleans(),
    seed=st.integers(0, 100),
)
def test_with_k_of_all_keys_it_is_the_torch_module(
    target: int,
    source: int,
    batch_first: bool,
    bias: bool,
    widths: dict[str, int],
    masks: str,
    average: bool,
    seed: int,
) -> None:
    dense, sparse = pair(source, batch_first=batch_first, bias=bias, **widths)
    generator = torch.Generator().manual_seed(seed)
    shape = {True: lambda n: (3, n), False: lambda n: (n, 3)}[batch_first]

    def draw(length: int, width: int) -> Tensor:
        return torch.randn(*shape(length), width, dtype=torch.float64, generator=generator)

    inputs = [
        draw(target, 8),
        draw(source, widths.get("kdim", 8)),
        draw(source, widths.get("vdim", 8)),
    ]
    padded = torch.rand(3, source, generator=generator) < 0.4
    padded[:, 0] = False
    hidden = torch.rand(target, source, generator=generator) < 0.4
    hidden[:, 0] = False
    options: dict[str, Any] = {
        "none": {},
        "bool": {"key_padding_mask": padded, "attn_mask": hidden},
        "float": {"attn_mask": torch.zeros(hidden.shape, dtype=torch.float64) - 3 * hidden},
        "per_head": {"attn_mask": hidden.expand(6, -1, -1)},
    }[masks]
    results = []
    for module in (dense, sparse):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, weights = module(*leaves, average_attn_weights=average, **options)
        out.square().sum().backward()
        gradients = [x.grad for x in leaves] + [p.grad for p in module.parameters()]
        results.append([out, weights, *gradients])
        module.zero_grad()
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_have_the_same_names_and_initial_values(
    widths: dict[str, int], bias: bool
) -> None:
    torch.manual_seed(3)
    dense = nn.MultiheadAttention(8, 2, bias=bias, **widths)
    torch.manual_seed(3)
    sparse = TopKMultiheadAttention(8, 2, top_k=2, bias=bias, **widths)
    expected, actual = dense.state_dict(), sparse.state_dict()
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    dense.load_state_dict(sparse.state_dict(), strict=True)


def test_each_query_attends_k_keys_and_weights_need_not_be_asked_for() -> None:
    _, sparse = pair(3, batch_first=True)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    out, weights = sparse(x, x, x, average_attn_weights=False)
    assert ((weights > 0).sum(dim=-1) == 3).all()
    again, none = sparse(x, x, x, need_weights=False)
    assert none is None
    torch.testing.assert_close(again, out)


def test_a_single_sequence_equals_a_batch_of_one() -> None:
    _, sparse = pair(2)
    x = torch.randn(5, 8, dtype=torch.float64)
    padded = torch.tensor([False, False, True, False, True])
    out, weights = sparse(x, x, x, key_padding_mask=padded)
    batch = x[:, None]
    expected, expected_weights = sparse(batch, batch, batch, key_padding_mask=padded[None])
    torch.testing.assert_close(out, expected[:, 0])
    torch.testing.assert_close(weights, expected_weights[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_attend_or_nobody_who_does_is_as_in_torch(
    sizes: tuple[int, int, int], masked: bool, batch_first: bool
) -> None:
    dense, sparse = pair(2, batch_first=batch_first)
    batch, target, source = sizes
    shapes = [(batch, length, 8) for length in (target, source)]
    if not batch_first:
        shapes = [(length, batch, 8) for length in (target, source)]
    query, key = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    mask = torch.zeros(batch * 2, target, source, dtype=torch.float64) if masked else None
    for actual, expected in zip(
        sparse(query, key, key, attn_mask=mask), dense(query, key, key, attn_mask=mask), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_inputs_that_do_not_belong_together_are_named() -> None:
    module = TopKMultiheadAttention(8, 2, top_k=2, kdim=6, vdim=5, batch_first=True)
    sizes = {"query": (2, 3, 8), "key": (2, 7, 6), "value": (2, 7, 5)}
    wrong: list[tuple[dict[str, tuple[int, ...]], str]] = [
        ({"key": (4, 7, 6), "value": (4, 7, 5)}, r"key \(4, 7, 6\) must have the batch of query"),
        ({"value": (2, 6, 5)}, r"value \(2, 6, 5\) must have the batch and length of key"),
        ({"value": (4, 7, 5)}, r"value \(4, 7, 5\) must have the batch and length of key"),
        ({"query": (2, 3, 9)}, r"query must .* width 8, not \(2, 3, 9\)"),
        ({"key": (2, 7, 8)}, r"key must .* width 6, not \(2, 7, 8\)"),
        ({"value": (2, 7, 6)}, r"value must .* width 5, not \(2, 7, 6\)"),
        ({"query": (8,)}, r"query must have 3 dimensions.* not \(8,\)"),
        ({"query": (3, 8)}, r"key must have 3 dimensions, or all inputs 2.* not \(2, 7, 6\)"),
        ({n: (1, *size) for n, size in sizes.items()}, r"query must .* not \(1, 2, 3, 8\)"),
    ]
    module(**{name: torch.randn(size) for name, size in sizes.items()})
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            module(**{name: torch.randn(size) for name, size in (sizes | change).items()})
    module.batch_first = False
    lengths = {"query": (3, 2, 8), "key": (7, 4, 6), "value": (7, 4, 5)}
    with pytest.raises(ValueError, match=r"key .* dimension 1 with batch_first=False"):
        module(**{name: torch.randn(size) for name, size in lengths.items()})


def test_inputs_of_another_precision_or_kind_are_named() -> None:
    module = TopKMultiheadAttention(8, 2, top_k=2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"key must be torch\.float32 .*, not torch\.float64"):
        module(x, x.double(), x)
    with pytest.raises(TypeError, match="value must be a tensor, not list"):
        module(x, x, x.tolist())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x, x.bfloat16(), x)[0].dtype == torch.bfloat16


def test_masks_that_do_not_fit_are_named() -> None:
    module = TopKMultiheadAttention(8, 2, top_k=2, batch_first=True)
    x = torch.randn(2, 3, 8)
    for name, sizes in {
        "key_padding_mask": [(3,), (1, 3), (3, 3), (2, 4)],
        "attn_mask": [(3,), (1, 3), (2, 3, 3), (8, 3, 3), (5, 3, 3), (1, 1, 3, 3)],
    }.items():
        for size in sizes:
            with pytest.raises(ValueError, match=f"{name} must have the shape"):
                module(x, x, x, **{name: torch.zeros(size, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"attn_mask must be boolean .* not torch\.int64"):
        module(x, x, x, attn_mask=torch.zeros(3, 3, dtype=torch.long))


def test_causal_flag_equals_the_causal_mask() -> None:
    _, sparse = pair(2, batch_first=True)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    masked, _ = sparse(x, x, x, attn_mask=mask, is_causal=True)
    flagged, _ = sparse(x, x, x, is_causal=True)
    torch.testing.assert_close(flagged, masked)


def test_a_fully_padded_sentence_gives_the_output_bias_and_no_nan() -> None:
    _, sparse = pair(2, batch_first=True)
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    padded = torch.tensor([[True] * 4, [False] * 4])
    out, _ = sparse(x, x, x, key_padding_mask=padded)
    torch.testing.assert_close(out[0], sparse.out_proj.bias.expand(4, -1))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *sparse.parameters()])
    assert (x.grad[0] == 0).all()


def test_ratio_keeps_a_share_of_the_valid_keys() -> None:
    module = TopKMultiheadAttention(8, 2, ratio=2.0, min_keys=2, batch_first=True)
    x = torch.randn(2, 6, 8)
    padded = torch.arange(6) >= torch.tensor([[6], [3]])
    _, weights = module(x, x, x, key_padding_mask=padded, average_attn_weights=False)
    assert ((weights > 0).sum(dim=-1)[0] == 3).all()
    assert ((weights > 0).sum(dim=-1)[1] == 2).all()


def test_every_head_may_keep_its_own_number_of_keys() -> None:
    module = TopKMultiheadAttention(8, 2, top_k=torch.tensor([[1], [4]]), batch_first=True)
    x = torch.randn(3, 6, 8)
    _, weights = module(x, x, x, average_attn_weights=False)
    assert ((weights > 0).sum(dim=-1) == torch.tensor([[1], [4]])).all()
    module.selection["top_k"] = 2  # of a schedule, say
    _, weights = module(x, x, x, average_attn_weights=False)
    assert ((weights > 0).sum(dim=-1) == 2).all()


@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_layer_uses_it_and_not_its_fused_dense_attention(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 9, 8)
    sparse = TopKMultiheadAttention.from_dense(layer.self_attn, top_k=1)
    with torch.no_grad():
        expected = layer.norm1(x + sparse(x, x, x)[0])
        expected = layer.norm2(expected + layer.linear2(layer.linear1(expected).relu()))
        dense = layer(x)
        layer.self_attn = sparse
        torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(dense, expected, atol=1e-3)


@pytest.mark.parametrize("kdim", [8, 6])
def test_fairseq_parameters_give_the_same_attention(kdim: int) -> None:
    torch.manual_seed(0)
    projections = {n: nn.Linear(w, 8) for n, w in zip("qkv", (8, kdim, kdim), strict=True)}
    out_proj = nn.Linear(8, 8)
    state = {f"{n}_proj.{k}": v for n, p in projections.items() for k, v in p.state_dict().items()}
    state |= {f"out_proj.{name}": tensor for name, tensor in out_proj.state_dict().items()}
    module = TopKMultiheadAttention(8, 2, kdim=kdim, vdim=kdim, top_k=2, batch_first=True)
    module.load_state_dict(from_fairseq_attention(state))
    query, key = torch.randn(3, 4, 8), torch.randn(3, 5, kdim)
    heads = [
        projections[n](x).view(3, -1, 2, 4).transpose(1, 2)
        for n, x in (("q", query), ("k", key), ("v", key))
    ]
    expected = topk_attention(*heads, top_k=2)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(
        module(query, key, key)[0], out_proj(expected.transpose(1, 2).reshape(3, 4, 8))
    )


def test_foreign_or_missing_parameters_are_named() -> None:
    state = {f"{n}_proj.weight": torch.zeros(8, 8) for n in ("q", "k", "v", "out")}
    with pytest.raises(ValueError, match=r"bias_k"):
        from_fairseq_attention(state | {"bias_k": torch.zeros(1)})
    del state["k_proj.weight"]
    with pytest.raises(ValueError, match=r"k_proj\.weight"):
        from_fairseq_attention(state)


def test_what_is_not_offered_is_said() -> None:
    with pytest.raises(TypeError, match="add_bias_kv"):
        TopKMultiheadAttention(8, 2, top_k=2, add_bias_kv=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="exactly one of top_k and ratio"):
        TopKMultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="must divide"):
        TopKMultiheadAttention(8, 3, top_k=2)
    for option in ("add_bias_kv", "add_zero_attn"):
        dense = nn.MultiheadAttention(8, 2, **{option: True})
        with pytest.raises(ValueError, match="add_bias_kv or add_zero_attn"):
            TopKMultiheadAttention.from_dense(dense, top_k=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, not 0"),
        ({"num_heads": 2.0}, r"num_heads must be an integer of at least 1, not 2\.0"),
        ({"embed_dim": 0}, "embed_dim must be .* not 0"),
        ({"kdim": -1}, "kdim must be .* not -1"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_k": 2.5}, r"top_k must be an integer .* not 2\.5"),
        ({"top_k": True}, "top_k must be an integer .* not True"),
        ({"ties": "lose"}, "ties must be 'keep' or 'exact', not 'lose'"),
        ({"min_keys": 0}, "min_keys must be .* not 0"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, not 1\.0"),
        ({"dropout": -0.1}, r"dropout must be .* not -0\.1"),
    ],
)
def test_numbers_out_of_range_are_refused_when_it_is_made(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TopKMultiheadAttention(**{"embed_dim": 8, "num_heads": 2, "top_k": 2} | change)
    for ratio in (0, -1.0, math.nan, "2"):
        with pytest.raises(ValueError, match="ratio must be a positive number"):
            TopKMultiheadAttention(8, 2, ratio=ratio)  # type: ignore[arg-type]  # one is text

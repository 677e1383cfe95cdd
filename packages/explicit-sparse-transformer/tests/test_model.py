import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_explicit_sparse_transformer.build import build_model
from separata_explicit_sparse_transformer.config import SITES, AttentionConfig, ModelConfig, Site
from separata_explicit_sparse_transformer.model import (
    ExplicitSparseTransformer,
    TopKAttention,
    set_top_k,
    sparse_attentions,
)
from separata_shared.attention import Attend, dense_attention, topk_attention
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.nn import MultiHeadAttention, PostNorm, PreNorm, record_attention
from torch import Tensor, nn

VOCABULARY = 20
KINDS = get_args(get_type_hints(AttentionConfig)["kind"])
PATTERNS = ("out_of_window", "window", "block", "dilated", "global", "random", "big_bird")
SELF: list[Site] = ["encoder_self", "decoder_self"]


def config(attention: AttentionConfig | None = None, **changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "width": 16,
        "num_heads": 2,
        "hidden_width": 24,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "dropout": 0.0,
        "max_length": 64,
        "source_vocabulary_size": VOCABULARY,
        "target_vocabulary_size": VOCABULARY,
    }
    return ModelConfig(**sizes | changes, attention=attention or AttentionConfig(top_k=3))


def attention_of(kind: Any, **changes: Any) -> AttentionConfig:
    sites = SELF if kind in PATTERNS else list(SITES)
    return AttentionConfig(**{"kind": kind, "top_k": 4, "sites": sites} | changes)


def built(attention: AttentionConfig | None = None, **changes: Any) -> ExplicitSparseTransformer:
    torch.manual_seed(0)
    return build_model(config(attention, **changes)).double().eval()


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(4, VOCABULARY, (batch, length), generator=generator)
    drawn[:, -1] = EOS
    return drawn


def padded(row: Tensor, *, left: int = 0, right: int = 0) -> Tensor:
    return nn.functional.pad(row, (left, right), value=PAD)


def supports(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Number of keys with weight (B,H,T) of every attention."""
    with record_attention(model) as weights:
        model(*inputs)
    return {name: (weight > 0).sum(dim=-1) for name, weight in weights.items()}


def site_of(name: str) -> str:
    if "cross" in name:
        return "cross"
    return "encoder_self" if name.startswith("encoder") else "decoder_self"


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (["encoder_self", "decoder_self", "cross"], 18),
        (["encoder_self", "decoder_self"], 12),
        (["cross"], 6),
        ([], 0),
    ],
)
def test_number_of_sparse_attentions_is_the_configured(sites: list[Site], expected: int) -> None:
    model = built(AttentionConfig(top_k=3, sites=sites), encoder_layers=6, decoder_layers=6)
    found = sparse_attentions(model)
    assert len(found) == expected
    assert {site_of(name) for name in found} == set(sites)
    every = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    assert len(every) == 18
    assert sum(isinstance(module, TopKAttention) for module in model.modules()) == expected


@pytest.mark.parametrize("phase", ["both", "train", "predict"])
def test_dense_kind_has_no_sparse_attention(phase: Any) -> None:
    assert sparse_attentions(built(AttentionConfig(kind="dense", phase=phase))) == {}
    assert len(sparse_attentions(built(AttentionConfig(phase=phase)))) == 6


def test_context_attention_is_a_module_of_its_own_and_selects_source_positions() -> None:
    model = built(AttentionConfig(top_k=3))
    for layer in model.decoder.layers:
        own = {id(parameter) for parameter in layer.self_attention.parameters()}
        cross = {id(parameter) for parameter in layer.cross_attention.parameters()}
        assert len(own) == len(cross) == 8  # weight and bias of q, k, v and output
        assert not own & cross
    with record_attention(model) as weights:
        model(tokens(2, 9), tokens(2, 5))
    for n in range(2):
        assert weights[f"decoder.layers.{n}.cross_attention"].shape == (2, 2, 5, 9)
        assert weights[f"decoder.layers.{n}.self_attention"].shape == (2, 2, 5, 5)
        assert (weights[f"decoder.layers.{n}.cross_attention"] > 0).sum(-1).eq(3).all()


@pytest.mark.parametrize("sites", [["encoder_self"], ["decoder_self"], ["cross"], list(SITES)])
def test_selection_happens_at_the_named_sites_only(sites: list[Site]) -> None:
    source, target = tokens(2, 9), tokens(2, 7)
    allowed = {
        "encoder_self": torch.full((7,), 9)[:1],
        "decoder_self": torch.arange(1, 8),
        "cross": torch.tensor([9]),
    }
    for name, support in supports(
        built(AttentionConfig(top_k=3, sites=sites)), source, target
    ).items():
        site = site_of(name)
        expected = allowed[site].clamp(max=3) if site in sites else allowed[site]
        assert support.eq(expected).all(), name


def test_k_of_layers_and_heads_reaches_their_attentions() -> None:
    per_head = AttentionConfig(top_k=[[1, 2], [3, 5]])
    for name, support in supports(built(per_head), tokens(2, 9), tokens(2, 9)).items():
        expected = torch.tensor([[1, 2], [3, 5]])[int(name.split(".")[2])]
        assert support[:, :, -1].eq(expected).all(), name
    per_layer = AttentionConfig(top_k=[2, 4])
    for name, support in supports(built(per_layer), tokens(2, 9), tokens(2, 9)).items():
        assert support[:, :, -1].eq([2, 4][int(name.split(".")[2])]).all(), name


def test_configured_ties_reach_every_kind_that_selects() -> None:
    # Equal keys: with all scores of a row alike, ``keep`` keeps all and ``exact`` two of them.
    query, key = torch.randn(1, 2, 3, 4), torch.ones(1, 2, 6, 4)
    for kind in ("topk", "straight_through", "softmax_topk", "softmax_topk_softmax"):
        for ties, expected in (("keep", 6), ("exact", 2)):
            model = built(attention_of(kind, top_k=2, ties=ties))
            attend = model.encoder.layers[0].self_attention.attend
            _, weights = attend(query, key, key, return_weights=True)
            assert (weights > 0).sum(dim=-1).eq(expected).all(), kind


@pytest.mark.parametrize(("phase", "training", "k"), [
    ("both", True, 2), ("both", False, 2), ("train", True, 2),
    ("train", False, 9), ("predict", True, 9), ("predict", False, 2),
])  # fmt: skip
def test_phase_says_when_attention_is_sparse(phase: Any, training: bool, k: int) -> None:
    model = built(AttentionConfig(top_k=2, phase=phase)).train(training)
    plain = built(AttentionConfig(top_k=k)).train(training)
    source, target = tokens(2, 9), tokens(2, 9)
    torch.testing.assert_close(model(source, target), plain(source, target), rtol=0, atol=1e-12)


@pytest.mark.parametrize("phase", ["both", "train", "predict"])
def test_k_can_be_set_later(phase: Any) -> None:
    model = built(AttentionConfig(top_k=2, phase=phase)).train(phase != "predict")
    set_top_k(model, 5)
    for support in supports(model, tokens(2, 9), tokens(2, 9)).values():
        assert support[:, :, -1].eq(5).all()


def test_a_model_with_a_schedule_is_built_with_the_k_it_ends_with() -> None:
    # Only training moves k; a model that is loaded to translate has arrived.
    scheduled = built(AttentionConfig(top_k=2, start_top_k=7, schedule_steps=10))
    for support in supports(scheduled, tokens(2, 9), tokens(2, 9)).values():
        assert support[:, :, -1].eq(2).all()


def test_another_attention_can_be_given_for_every_site_and_layer() -> None:
    asked: list[tuple[Site, int]] = []

    def attend(site: Site, layer: int) -> Attend:
        asked.append((site, layer))
        return dense_attention

    torch.manual_seed(0)
    model = build_model(config(), attend=attend)
    assert sorted(asked) == sorted((site, layer) for site in SITES for layer in range(2))
    assert sparse_attentions(model) == {}


def decoded_step_by_step(
    model: ExplicitSparseTransformer, source: Tensor, target: Tensor
) -> Tensor:
    state = model.start(source)
    return torch.stack([model.step(column, state) for column in target.unbind(1)], dim=1)


@settings(max_examples=25, deadline=None)
@given(
    attention=st.one_of(
        st.builds(AttentionConfig, top_k=st.integers(1, 9)),
        st.builds(AttentionConfig, kind=st.just("ratio"), ratio=st.floats(1.0, 5.0)),
        st.builds(
            AttentionConfig,
            kind=st.just("ratio"),
            ratio=st.integers(1, 5),
            min_keys=st.integers(1, 4),
        ),
        st.just(AttentionConfig(top_k=[[1, 3], [4, 2]])),
        st.sampled_from([attention_of(kind) for kind in PATTERNS]),
        st.sampled_from([attention_of(kind) for kind in ("sparsemax", "entmax15", "softmax_topk")]),
    ),
    sizes=st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(0, 4)),
    normalisation=st.sampled_from(["post", "pre"]),
)
def test_cached_decoding_equals_teacher_forcing(
    attention: AttentionConfig, sizes: tuple[int, int, int], normalisation: str
) -> None:
    model = built(attention, normalisation=normalisation)
    source_length, target_length, padding = sizes
    source = torch.cat([tokens(1, source_length), tokens(1, source_length, seed=1)])
    source[0, max(source_length - padding, 1) :] = PAD
    target = tokens(2, target_length, seed=2)
    target[:, 0] = EOS
    with torch.no_grad():
        forced = model(source, target)
        stepped = decoded_step_by_step(model, source, target)
    torch.testing.assert_close(stepped, forced, rtol=0, atol=1e-10)


def test_official_ratio_differs_between_decoding_and_training() -> None:
    # The authors' rule takes k from the length of the whole target, or of what is decoded so far.
    source, target = tokens(1, 9), tokens(1, 9, seed=1)
    official = built(AttentionConfig(kind="official_ratio", ratio=4.0))
    gap = (decoded_step_by_step(official, source, target) - official(source, target)).abs()
    assert gap.max() > 1e-3


@pytest.mark.parametrize("kind", ["topk", "ratio", "dense", "sparsemax", "straight_through"])
@pytest.mark.parametrize("sides", [{"left": 3}, {"right": 3}, {"left": 2, "right": 4}])
def test_padding_changes_nothing(kind: Any, sides: dict[str, int]) -> None:
    model = built(attention_of(kind, top_k=3, ratio=2.0))
    source, target = tokens(2, 8), tokens(2, 6, seed=1)
    with torch.no_grad():
        plain = model(source, target)
        wider = model(padded(source, **sides), padded(target, right=2))[:, :6]
    torch.testing.assert_close(wider, plain, rtol=0, atol=1e-10)


def test_official_ratio_depends_on_padding() -> None:
    model = built(AttentionConfig(kind="official_ratio", ratio=4.0))
    source, target = tokens(1, 8), tokens(1, 6, seed=1)
    gap = (model(padded(source, right=8), target) - model(source, target)).abs()
    assert gap.max() > 1e-3


def test_a_batch_of_two_equals_two_batches_of_one() -> None:
    model = built(AttentionConfig(top_k=3))
    long, short, target = tokens(1, 8), tokens(1, 5, seed=1), tokens(2, 6, seed=2)
    with torch.no_grad():
        both = model(torch.cat([long, padded(short, right=3)]), target)
        alone = torch.cat([model(long, target[:1]), model(short, target[1:])])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-10)


def logits_and_gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    logits = model(*inputs)
    logits.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [logits.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("k", [9, 10, 100])
def test_k_of_all_keys_is_the_dense_model(k: int) -> None:
    source, target = padded(tokens(2, 9)[:, 1:], right=1), tokens(2, 7, seed=1)
    sparse = logits_and_gradients(built(AttentionConfig(top_k=k)), source, target)
    dense = logits_and_gradients(built(AttentionConfig(kind="dense")), source, target)
    assert len(sparse) == len(dense) > 1
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-9)
    fewer = built(AttentionConfig(top_k=2))(source, target)
    assert (fewer - dense[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["topk", "ratio", "official_ratio", "sparsemax", "entmax15"])
def test_a_sample_of_padding_alone_is_finite_and_disturbs_nobody(kind: Any) -> None:
    model = built(attention_of(kind))
    source, target = tokens(2, 6), tokens(2, 5, seed=1)
    source[1], target[1] = PAD, PAD
    results = logits_and_gradients(model, source, target)
    assert all(result.isfinite().all() for result in results)
    alone = model(source[:1], target[:1])
    torch.testing.assert_close(results[0][:1], alone, rtol=0, atol=1e-10)
    with record_attention(model) as weights:
        model(source, target)
    assert weights["encoder.layers.0.self_attention"][1].eq(0).all()
    assert weights["decoder.layers.0.cross_attention"][1].eq(0).all()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"selection_before_masking"}))
def test_no_logit_depends_on_later_target_tokens(kind: Any) -> None:
    model = built(attention_of(kind))
    source, target = tokens(2, 8), tokens(2, 8, seed=1)
    changed = target.clone()
    changed[:, 5:] = (target[:, 5:] - 3) % (VOCABULARY - 4) + 4
    with torch.no_grad():
        before, after = model(source, target), model(source, changed)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-10)
    assert (after[:, 5:] - before[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("phase", ["both", "train", "predict"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_builds_and_trains(kind: Any, phase: Any) -> None:
    torch.manual_seed(0)
    model = build_model(config(attention_of(kind, phase=phase), attention_dropout=0.1))
    source, target = padded(tokens(2, 8), right=2), tokens(2, 7, seed=1)
    for training in (True, False):
        model.train(training).zero_grad()
        results = logits_and_gradients(model, source, target)
        assert results[0].shape == (2, 7, VOCABULARY)
        assert len(results) == 1 + len(list(model.parameters()))
        assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_stays_near_single_precision(kind: Any) -> None:
    torch.manual_seed(0)
    model = build_model(config(attention_of(kind))).eval()
    source, target = padded(tokens(2, 8), left=2), tokens(2, 7, seed=1)
    exact = model(source, target)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(source, target)
        rough.float().square().sum().backward()
    assert rough.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # bf16 has 8 significant bits; a key that changes sides of a threshold may move single logits.
    relative = (rough.float() - exact).norm() / exact.norm()
    assert relative < 0.1


def normalised(states: Tensor) -> bool:
    mean, variance = states.mean(dim=-1), states.var(dim=-1, correction=0)
    return bool(mean.abs().max() < 1e-6 and (variance - 1).abs().max() < 1e-2)


def test_norms_stand_where_the_configuration_says() -> None:
    sizes = {"encoder_layers": 6, "decoder_layers": 6}
    for normalisation, residual, norms in (("post", PostNorm, 30), ("pre", PreNorm, 32)):
        model = built(normalisation=normalisation, **sizes)
        modules = list(model.modules())
        # Two sub-layers in each of 6 encoder layers, three in each of 6 decoder layers.
        assert sum(isinstance(module, residual) for module in modules) == 6 * 2 + 6 * 3
        assert sum(isinstance(module, nn.LayerNorm) for module in modules) == norms
        assert normalised(model.encode(tokens(2, 9))[0])
    states: dict[str, Tensor] = {}
    for normalisation in ("post", "pre"):
        model = built(normalisation=normalisation)
        layer = model.encoder.layers[0]
        states[normalisation] = layer(model.source(tokens(2, 9)), mask=None)
    assert normalised(states["post"])
    assert not normalised(states["pre"])


def test_dropout_acts_in_training_on_embeddings_sublayers_and_weights() -> None:
    source, target = tokens(2, 9), tokens(2, 7)
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        model = built(**{name: 0.5})
        assert torch.equal(model(source, target), model(source, target))
        model.train()
        assert not torch.equal(model(source, target), model(source, target)), name


Weights = Callable[[ExplicitSparseTransformer], Tensor]


def test_embeddings_are_shared_as_they_say() -> None:
    source_weight: Weights = lambda model: model.source.get_parameter("tokens.weight")  # noqa: E731
    target_weight: Weights = lambda model: model.target.get_parameter("tokens.weight")  # noqa: E731
    joint, target, separate = (built(embeddings=name) for name in ("joint", "target", "separate"))
    table = VOCABULARY * 16
    without = sum(parameter.numel() for parameter in joint.parameters()) - table
    for model, tables in ((joint, 1), (target, 2), (separate, 3)):
        assert (
            sum(parameter.numel() for parameter in model.parameters()) == without + tables * table
        )
    assert source_weight(joint) is target_weight(joint)
    assert source_weight(target) is not target_weight(target)
    states = torch.randn(3, 16, dtype=torch.float64)
    for model in (joint, target):
        assert torch.equal(model.output(states), states @ target_weight(model).mT)
    assert not torch.equal(separate.output(states), states @ target_weight(separate).mT)


def test_different_vocabularies_need_tables_of_their_own() -> None:
    for embeddings in ("target", "separate"):
        model = built(embeddings=embeddings, source_vocabulary_size=VOCABULARY + 5)
        assert model(tokens(1, 5) + 5, tokens(1, 4)).shape == (1, 4, VOCABULARY)
    with pytest.raises(ValueError, match=r"^model\.embeddings: .*25 types.*20"):
        built(embeddings="joint", source_vocabulary_size=VOCABULARY + 5)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_model_needs_vocabulary_sizes(side: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{side}_vocabulary_size: must be set"):
        build_model(replace(config(), **{f"{side}_vocabulary_size": 0}))  # type: ignore[arg-type]


def test_attention_module_is_the_shared_function() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    output = TopKAttention(2)(query, key, value, causal=True)
    assert torch.equal(output, topk_attention(query, key, value, top_k=2, causal=True))
    assert "top_k=2" in str(TopKAttention(2))


def test_weights_are_the_softmax_of_the_kept_scores() -> None:
    # Scores 1, 2, 3 with k = 2: e^2 / (e^2 + e^3) = 1 / (1 + e) and e / (1 + e).
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    _, weights = TopKAttention(2)(query, key, key, return_weights=True)
    expected = torch.tensor([0.0, 1 / (1 + math.e), math.e / (1 + math.e)])
    torch.testing.assert_close(weights.flatten(), expected)


def test_a_window_of_the_decoder_spends_all_its_keys_on_the_past():
    model = built(attention_of("window"))
    with record_attention(model) as weights:
        model(tokens(1, 9), tokens(1, 9))
    last_row = weights["decoder.layers.0.self_attention"][0, 0, -1]
    assert last_row.nonzero().flatten().tolist() == [5, 6, 7, 8]

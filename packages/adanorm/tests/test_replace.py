"""Replacing the norms of models of several styles."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from separata_adanorm.norms import AdaNorm, ClippedLayerNorm, LayerNormSimple
from separata_adanorm.replace import load_layer_norm_checkpoint, replace_norms
from separata_shared.nn import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    MultiHeadAttention,
    PostNorm,
    PreNorm,
)
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8


def trained(model: nn.Module) -> nn.Module:
    """The model with a gain and a bias in every norm that differ from 1 and 0."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def torch_encoder(*, norm_first: bool = True, layers: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    norm = nn.LayerNorm(WIDTH) if norm_first else None
    return nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=not norm_first)


def torch_transformer() -> nn.Transformer:
    with warnings.catch_warnings(action="ignore"):  # it cannot be told that pre-norm is meant
        return nn.Transformer(WIDTH, 2, 2, 2, 16, dropout=0.0, batch_first=True, norm_first=True)


def residual() -> PreNorm:
    return PreNorm(WIDTH)


class SharedTransformer(nn.Module):
    """Six and six layers as in De-En, narrow: 32 norms."""

    def __init__(self, layers: int = 6, wiring: Callable[[], nn.Module] = residual) -> None:
        super().__init__()

        def attention() -> MultiHeadAttention:
            return MultiHeadAttention(WIDTH, 2)

        def feed_forward() -> FeedForward:
            return FeedForward(WIDTH, 16)

        self.encoder = Encoder(
            [EncoderLayer(attention(), feed_forward(), residual=wiring) for _ in range(layers)],
            final_norm=nn.LayerNorm(WIDTH),
        )
        self.decoder = Decoder(
            [
                DecoderLayer(attention(), attention(), feed_forward(), residual=wiring)
                for _ in range(layers)
            ],
            final_norm=nn.LayerNorm(WIDTH),
        )
        self.output = nn.Linear(WIDTH, 11)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        output: Tensor = self.output(self.decoder(target, self.encoder(source)))
        return output


class BertLayerNorm(nn.Module):
    """As in the first transformers library: the same function, another class and name of eps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.variance_epsilon = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        y = (x - mean) / torch.sqrt(variance + self.variance_epsilon)
        return self.weight * y + self.bias


class T5LayerNorm(nn.Module):
    """Called a layer norm, but does not subtract the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class LayerNorm2d(nn.LayerNorm):
    """As in timm: normalises the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A block in timm's style: nobody but its author knows what reads its norms."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1 = norm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm2 = norm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(query, key, value)
        return x + self.fc1(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm_pre = norm(WIDTH)
        self.blocks = nn.Sequential(Block(norm), Block(norm))
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.blocks(self.norm_pre(x))))
        return output


CONSUMERS = {
    "blocks.*.norm1": ["blocks.*.qkv"],
    "blocks.*.norm2": ["blocks.*.fc1"],
    "norm": ["head"],
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))


def classes(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


class TestScope:
    def test_all_reaches_the_32_norms_of_six_and_six_layers(self) -> None:
        model = SharedTransformer()
        assert len(replace_norms(model, "ada_norm")) == 32
        assert classes(model).count("AdaNorm") == 32
        assert "LayerNorm" not in classes(model)

    def test_final_only_reaches_two_of_them(self) -> None:
        model = SharedTransformer()
        report = replace_norms(model, "ada_norm", scope="final_only")
        names = [replacement.name for replacement in report.replaced]
        assert names == ["encoder.final_norm", "decoder.final_norm"]
        assert classes(model).count("LayerNorm") == 30
        assert set(report.left.values()) == {"not a final norm"}
        assert len(report.left) == 30

    @pytest.mark.parametrize(
        ("model", "names"),
        [
            (torch_transformer, ["encoder.norm", "decoder.norm"]),
            (VisionTransformer, ["norm"]),  # norm_pre stands before the blocks
            (lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(Block()), nn.LayerNorm(8)), "2"),
        ],
    )
    def test_final_norms_of_other_models(self, model: Callable[[], nn.Module], names: Any) -> None:
        report = replace_norms(model(), "ada_norm", scope="final_only")
        assert [replacement.name for replacement in report.replaced] == list(names)

    def test_post_norm_layers_have_no_final_norm(self) -> None:
        with pytest.raises(ValueError, match=r"no norm .* scope='final_only'; there are layers\.0"):
            replace_norms(torch_encoder(norm_first=False), "ada_norm", scope="final_only")

    def test_patterns_choose(self) -> None:
        model = VisionTransformer()
        report = replace_norms(model, "ada_norm", include="blocks.*", exclude=["*.1.norm2"])
        names = [replacement.name for replacement in report.replaced]
        assert names == ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1"]
        assert report.left["blocks.1.norm2"] == "excluded"
        assert report.left["norm"] == "not included"

    @pytest.mark.parametrize("argument", ["include", "exclude"])
    def test_a_pattern_without_a_norm_is_an_error(self, argument: str) -> None:
        options: Any = {argument: "layers.*"}
        with pytest.raises(ValueError, match=rf"^{argument}: 'layers\.\*' matches none .*norm_pre"):
            replace_norms(VisionTransformer(), "ada_norm", **options)

    def test_models_without_norms_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no norm to replace"):
            replace_norms(nn.Sequential(nn.Linear(2, 2)), "ada_norm")
        with pytest.raises(ValueError, match="LayerNorm has no modules inside"):
            replace_norms(nn.LayerNorm(3), "ada_norm")


class TestReport:
    def test_says_what_happened_to_every_norm(self) -> None:
        report = replace_norms(VisionTransformer(), "ada_norm", exclude="norm_pre")
        assert len(report) == 5
        first = report.replaced[0]
        assert (first.name, first.old, first.new) == ("blocks.0.norm1", "LayerNorm", "AdaNorm")
        assert (first.width, first.gain) == ((8,), "1 and 0, not missed")
        lines = str(report).splitlines()
        assert lines[0].split() == ["module", "old", "new", "width", "gain", "and", "bias"]
        assert lines[-2:] == ["norm_pre: stays, excluded", "5 norms replaced"]

    def test_a_module_used_twice_is_one_norm(self, x: Tensor) -> None:
        block = Block()
        model = nn.Sequential(block, block)
        report = replace_norms(model, "ada_norm")
        assert len(report) == 2
        assert model[0].norm1 is model[1].norm1
        assert isinstance(model[1].norm1, AdaNorm)

        norm = nn.LayerNorm(WIDTH)
        model = nn.Sequential(norm, nn.Linear(WIDTH, WIDTH), norm)
        assert len(replace_norms(model, "ada_norm")) == 1
        assert model[0] is model[2]


class TestOtherStyles:
    def test_a_class_is_believed_what_it_computes(self) -> None:
        model = VisionTransformer(BertLayerNorm)
        report = replace_norms(model, "layer_norm_simple", convention="torch")
        assert {replacement.old for replacement in report.replaced} == {"BertLayerNorm"}
        assert isinstance(model.norm, LayerNormSimple)
        assert model.norm.eps == 1e-12

    @pytest.mark.parametrize("norm", [T5LayerNorm, LayerNorm2d, nn.RMSNorm])
    def test_a_norm_of_another_sort_is_refused_by_name(self, norm: Any) -> None:
        model = VisionTransformer()
        model.blocks[1].norm2 = norm(WIDTH)
        before = classes(model)
        with pytest.raises(ValueError, match=rf"^blocks\.1\.norm2: {norm.__name__} does not"):
            replace_norms(model, "ada_norm")
        assert classes(model) == before
        assert len(replace_norms(model, "ada_norm", exclude="blocks.1.norm2")) == 5

    def test_norms_with_parameters_keep_gain_and_bias(self) -> None:
        model = trained(VisionTransformer())
        gain = model.norm.weight.detach().clone()  # type: ignore[union-attr]
        report = replace_norms(model, "clipped")
        assert {replacement.gain for replacement in report.replaced} == {"kept"}
        assert isinstance(model.norm, ClippedLayerNorm)
        assert torch.equal(model.norm.weight, gain)

    def test_precision_and_mode_stay(self, x: Tensor) -> None:
        model = VisionTransformer().bfloat16().eval()
        replace_norms(model, "clipped", include="blocks.*")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not any(module.training for module in model.modules())
        assert model(x.bfloat16()).dtype == torch.bfloat16

    def test_norms_of_this_package_can_be_replaced_again(self) -> None:
        model = VisionTransformer()
        for kind in ("no_norm", "ada_norm", "layer_norm", "clipped", "detach_norm"):
            report = replace_norms(model, kind)
            assert [replacement.width for replacement in report.replaced] == [(WIDTH,)] * 6

    def test_shapes_of_two_dimensions(self) -> None:
        model = nn.Sequential(nn.LayerNorm((3, 4)), nn.Flatten())
        report = replace_norms(model, "layer_norm_simple", convention="torch")
        x = torch.randn(2, 3, 4)
        assert report.replaced[0].width == (3, 4)
        assert torch.allclose(model(x), F.layer_norm(x, (3, 4)).flatten(1), atol=1e-6)

    def test_a_function_may_make_the_norm(self) -> None:
        model = VisionTransformer()
        replace_norms(model, lambda width: AdaNorm(width, k=0.05))
        assert isinstance(model.norm, AdaNorm)
        assert model.norm.k == 0.05

    def test_a_model_without_memory_can_be_converted(self) -> None:
        with torch.device("meta"):
            model = VisionTransformer()
        assert len(replace_norms(model, "ada_norm")) == 6

    def test_every_parameter_of_a_converted_model_receives_a_gradient(self, x: Tensor) -> None:
        model = SharedTransformer(2)
        before = sum(1 for _ in model.parameters())
        replace_norms(model, "ada_norm")
        assert sum(1 for _ in model.parameters()) == before - 2 * 12
        model(x, x).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


class TestGains:
    def test_folding_into_pre_norm_layers_of_torch_keeps_the_function(self, x: Tensor) -> None:
        model = trained(torch_transformer())
        with torch.no_grad():
            expected = model.decoder(x, model.encoder(x), tgt_is_causal=False)
        consumers = {"encoder.norm": ["decoder.layers.*.multihead_attn:kv"]}
        report = replace_norms(
            model,
            "layer_norm_simple",
            exclude="decoder.norm",
            consumers=consumers,
            convention="torch",
        )
        with torch.no_grad():
            output = model.decoder(x, model.encoder(x), tgt_is_causal=False)
        assert torch.allclose(output, expected, atol=2e-6)
        texts = {replacement.name: replacement.gain for replacement in report.replaced}
        assert texts["decoder.layers.1.norm2"] == "folded into decoder.layers.1.multihead_attn:q"
        assert texts["encoder.layers.0.norm2"] == "folded into encoder.layers.0.linear1"

    def test_folding_into_layers_of_this_library_keeps_the_function(self, x: Tensor) -> None:
        model = trained(SharedTransformer(2))
        expected = model(x, x)
        cross = ["decoder.layers.*.cross_attention." + name for name in ("k_proj", "v_proj")]
        replace_norms(
            model,
            "layer_norm_simple",
            consumers={"encoder.final_norm": cross, "decoder.final_norm": ["output"]},
            convention="torch",
        )
        assert "LayerNorm" not in classes(model)
        assert torch.allclose(model(x, x), expected, atol=2e-6)

    def test_folding_where_the_caller_says(self, x: Tensor) -> None:
        model = trained(VisionTransformer())
        expected = model(x)
        replace_norms(
            model,
            "layer_norm_simple",
            exclude="norm_pre",
            consumers=CONSUMERS,
            convention="torch",
        )
        assert torch.allclose(model(x), expected, atol=2e-6)

    def test_folding_into_the_next_of_a_sequence_and_into_transposed_weights(self) -> None:
        class Conv1D(nn.Module):
            """As in transformers."""

            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 6))
                self.bias = nn.Parameter(torch.randn(6))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight + self.bias

        model = trained(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4), nn.LayerNorm(4), Conv1D()))
        x = torch.randn(5, 3)
        expected = model(x)
        replace_norms(model, "layer_norm_simple", consumers={"2": ["3"]}, convention="torch")
        assert torch.allclose(model(x), expected, atol=1e-5)

    @pytest.mark.parametrize(
        ("model", "names"),
        [
            (VisionTransformer(), r"norm_pre, blocks\.0\.norm1, .*norm"),
            (torch_encoder(norm_first=False), r"layers\.0\.norm1, layers\.0\.norm2"),
            (SharedTransformer(1, lambda: PostNorm(WIDTH)), r"encoder\.final_norm, decoder"),
        ],
    )
    def test_gains_are_never_lost_in_silence(self, model: nn.Module, names: str) -> None:
        model = trained(copy.deepcopy(model))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"{names}.* trained.*gains='drop'"):
            replace_norms(model, "ada_norm")
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())

    def test_dropping_is_said(self) -> None:
        model = trained(VisionTransformer())
        report = replace_norms(model, "ada_norm", gains="drop")
        for replacement in report.replaced:
            assert replacement.gain.startswith("dropped (gain 0.")

    def test_a_tied_weight_is_refused(self) -> None:
        model = trained(VisionTransformer())
        model.table = nn.Embedding(3, WIDTH)
        model.table.weight = model.head.weight  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"head cannot take up the gain of norm: .* tied"):
            replace_norms(model, "ada_norm", include="norm", consumers={"norm": ["head"]})

    def test_a_map_without_bias_is_refused_only_for_a_bias(self) -> None:
        model = VisionTransformer()
        model.head = nn.Linear(WIDTH, 3, bias=False)
        nn.init.constant_(model.norm.weight, 2.0)  # type: ignore[arg-type]
        other = trained(copy.deepcopy(model))
        weight = model.head.weight.detach().clone()
        replace_norms(model, "ada_norm", include="norm", consumers={"norm": ["head"]})
        assert torch.equal(model.head.weight, 2 * weight)
        with pytest.raises(ValueError, match="head has no bias to take up that of norm"):
            replace_norms(other, "ada_norm", include="norm", consumers={"norm": ["head"]})

    @pytest.mark.parametrize(
        ("consumers", "message"),
        [
            ({"nrom": ["head"]}, "consumers: 'nrom' names no norm that is replaced"),
            ({"norm": ["haed"]}, "consumers: the model has no module haed"),
            ({"norm": ["blocks"]}, r"blocks \(Sequential\) cannot take up the gain of norm"),
            ({"*": ["head"]}, "consumers: head is named for norm_pre and blocks.0.norm1"),
            ({"norm": ["wide"]}, "consumers: wide reads 9 features, norm has"),
            ({"norm": ["attention:x"]}, "an attention has the parts q, k and v"),
        ],
    )
    def test_consumers_that_do_not_fit_are_named(self, consumers: Any, message: str) -> None:
        model = VisionTransformer()
        model.wide = nn.Linear(9, 1)
        model.attention = nn.MultiheadAttention(WIDTH, 2)
        with pytest.raises(ValueError, match=message):
            replace_norms(trained(model), "ada_norm", consumers=consumers)


class TestCheckpoints:
    def converted(self) -> VisionTransformer:
        model = VisionTransformer()
        replace_norms(model, "layer_norm_simple", exclude="norm_pre", convention="torch")
        return model

    def test_loading_gains_is_one_error_with_their_names(self) -> None:
        state = VisionTransformer().state_dict()
        for strict in (True, False):
            with pytest.raises(
                ValueError, match=r"blocks\.0\.norm1\.weight.* norm\.bias; use load"
            ):
                self.converted().load_state_dict(state, strict=strict)
        part = {name.removeprefix("blocks."): t for name, t in state.items() if "blocks" in name}
        with pytest.raises(ValueError, match=r"0\.norm1\.weight"):
            self.converted().blocks.load_state_dict(part, strict=False)

    def test_its_own_state_is_loaded_as_ever(self) -> None:
        model, other = self.converted(), self.converted()
        model.load_state_dict(other.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])

    def test_norms_with_gains_anew_load_them(self) -> None:
        model = self.converted()
        replace_norms(model, "layer_norm")
        state = trained(VisionTransformer()).state_dict()
        model.load_state_dict(state)
        assert torch.equal(model.norm.weight, state["norm.weight"])  # type: ignore[union-attr]

    def test_the_helper_folds(self, x: Tensor) -> None:
        old = trained(VisionTransformer())
        model = self.converted()
        texts = load_layer_norm_checkpoint(model, old.state_dict(), consumers=CONSUMERS)
        assert texts["norm"] == "folded into head"
        assert torch.allclose(model(x), old(x), atol=2e-6)

    def test_the_helper_refuses_or_drops(self) -> None:
        old, model = trained(VisionTransformer()), self.converted()
        before = model.head.weight.clone()
        with pytest.raises(ValueError, match=r"^blocks\.0\.norm1\.weight, .*gains='drop'"):
            load_layer_norm_checkpoint(model, old.state_dict())
        assert torch.equal(model.head.weight, before)
        texts = load_layer_norm_checkpoint(model, old.state_dict(), gains="drop")
        assert all(text.startswith("dropped (gain 0.") for text in texts.values())
        assert torch.equal(model.head.weight, old.head.weight)  # type: ignore[union-attr]

    def test_the_helper_refuses_the_state_of_another_model(self) -> None:
        state = VisionTransformer().state_dict()
        del state["head.bias"]
        with pytest.raises(ValueError, match=r"another model; .* head\.bias"):
            load_layer_norm_checkpoint(self.converted(), state)

    def test_converted_models_are_copied_and_pickled(self, x: Tensor) -> None:
        model = self.converted()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))
            with pytest.raises(ValueError, match="gain and bias"):
                other.load_state_dict(VisionTransformer().state_dict())


def test_misspelled_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="scope must be one of all, final_only, not 'final'"):
        replace_norms(torch_encoder(), "ada_norm", scope="final")  # type: ignore[arg-type]  # a typo
    for call in (replace_norms, load_layer_norm_checkpoint):
        with pytest.raises(ValueError, match="gains must be one of fold, drop, not 'lose'"):
            call(torch_encoder(), {}, gains="lose")  # type: ignore[arg-type]  # a typo

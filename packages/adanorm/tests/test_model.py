from typing import Any, get_args

import pytest
import torch
from separata_adanorm import AdaNorm, DetachNorm, LayerNormSimple
from separata_adanorm.build import NormKind
from separata_adanorm.config import ModelConfig
from separata_adanorm.model import build_model
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.nn import Transformer
from torch import Tensor, nn

VOCABULARY = 20


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "width": 16,
        "num_heads": 2,
        "hidden_width": 24,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "dropout": 0.0,
        "max_length": 32,
        "source_vocabulary_size": VOCABULARY,
        "target_vocabulary_size": VOCABULARY,
    }
    return ModelConfig(**sizes | changes)


def de_en(**changes: Any) -> Transformer:
    """The model of IWSLT'14 De-En in depth and wiring, without its width."""
    return build_model(config(encoder_layers=6, decoder_layers=6, **changes))


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("ada_norm", AdaNorm),
        ("layer_norm_simple", LayerNormSimple),
        ("detach_norm", DetachNorm),
        ("layer_norm", nn.LayerNorm),
    ],
)
def test_all_32_norms_are_of_the_kind_asked_for(kind: str, norm: type[nn.Module]) -> None:
    model = de_en(norm=kind)
    assert count(model, norm) == 32
    assert count(model, nn.LayerNorm) == (32 if norm is nn.LayerNorm else 0)


def test_final_only_changes_two_of_the_32_norms() -> None:
    model = de_en(scope="final_only")
    assert count(model, AdaNorm) == 2
    assert count(model, nn.LayerNorm) == 30
    assert isinstance(model.encoder.final_norm, AdaNorm)
    assert isinstance(model.decoder.final_norm, AdaNorm)


def test_post_norm_has_30_norms() -> None:
    assert count(de_en(normalisation="post"), AdaNorm) == 30


def test_c_reaches_every_norm() -> None:
    constants = {m.C for m in de_en(C=0.8).modules() if isinstance(m, AdaNorm)}
    assert constants == {0.8}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_norms_bring_no_parameters_but_those_of_layer_norm() -> None:
    # Of 12 norms each LayerNorm has a gain and a bias of 16 entries.
    bare = parameters(build_model(config(norm="no_norm")))
    for kind in get_args(NormKind):
        extra = 12 * 2 * 16 if kind in ("layer_norm", "clipped") else 0
        assert parameters(build_model(config(norm=kind))) == bare + extra, kind
    assert parameters(build_model(config(scope="final_only"))) == bare + 10 * 2 * 16


def tokens(batch: int, length: int) -> Tensor:
    drawn = torch.randint(4, VOCABULARY, (batch, length))
    drawn[:, -1] = EOS
    return drawn


@pytest.mark.parametrize("kind", get_args(NormKind))
def test_every_parameter_receives_a_gradient(kind: str) -> None:
    torch.manual_seed(0)
    model = build_model(config(norm=kind))
    logits = model(tokens(4, 9), tokens(4, 7))
    logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["ada_norm", "no_norm"])
def test_decoding_step_by_step_agrees_with_teacher_forcing(kind: str) -> None:
    torch.manual_seed(0)
    model = build_model(config(norm=kind)).eval()
    source, target = tokens(3, 6), tokens(3, 5)
    source[0, :2] = PAD
    with torch.no_grad():
        whole = model(source, target)
        state = model.start(source)
        steps = [model.step(target[:, n], state) for n in range(5)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


def attention_weights(model: nn.Module, ending: str) -> Tensor:
    chosen = [p.flatten() for name, p in model.named_parameters() if name.endswith(ending)]
    return torch.cat(chosen)


def test_km_draws_attention_within_the_bound_of_the_authors_code() -> None:
    # Measured on the authors' model of width 512: 0.0442 instead of Xavier's 0.0541.
    sizes: dict[str, Any] = {
        "width": 512, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1,
    }  # fmt: skip
    drawn = {kind: build_model(config(initialisation=kind, **sizes)) for kind in ("xavier", "km")}
    for kind, bound in (("km", 512**-0.5), ("xavier", (6 / (512 + 1536)) ** 0.5)):
        largest = attention_weights(drawn[kind], "q_proj.weight").abs().max()
        assert 0.99 * bound < largest <= bound
    for ending in ("fc1.weight", "fc2.weight"):
        bound = (6 / (512 + 24)) ** 0.5
        assert attention_weights(drawn["km"], ending).abs().max() > 0.99 * bound
    assert not attention_weights(drawn["km"], "q_proj.bias").any()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"C": 0.0}, "C"),
        ({"C": float("nan")}, "C"),
        ({"scope": "final_only", "normalisation": "post"}, "scope"),
        ({"width": 15}, "num_heads"),
    ],
)
def test_impossible_settings_name_their_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{key}: "):
        config(**changes)

"""Numbers that the published recipes state, without training anything.

"Authors' code" is GitHub lancopku/Explicit-Sparse-Transformer, commit fa0841d.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_explicit_sparse_transformer.build import build_model
from separata_explicit_sparse_transformer.config import DecodeConfig, ModelConfig
from separata_explicit_sparse_transformer.data import DataConfig, ParallelBatch
from separata_explicit_sparse_transformer.model import sparse_attentions
from separata_shared.cli import from_yaml
from separata_shared.data.vocabulary import PAD
from separata_shared.training import TrainConfig
from separata_shared.training.optim import make_schedule
from separata_shared.translation import translation_step
from separata_shared.translation.search import length_penalty
from torch import Tensor, nn

GROUPS = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "decode": DecodeConfig,
    "label_smoothing": float,
}


def shipped(name: str) -> dict[str, Any]:
    folder = Path(str(resources.files("separata_explicit_sparse_transformer"))) / "configs"
    return from_yaml(folder / f"{name}.yaml", GROUPS)


# What the training scripts and architectures of the authors' code say; ``group.field`` to value.
RECIPES: dict[str, dict[str, Any]] = {
    "iwslt14_de_en": {
        "model.encoder_layers": 6,
        "model.decoder_layers": 6,
        "model.width": 512,
        "model.hidden_width": 1024,
        "model.num_heads": 4,
        "model.normalisation": "post",
        "model.embeddings": "separate",
        "model.dropout": 0.4,
        "model.attention_dropout": 0.0,
        "model.activation_dropout": 0.0,
        "model.attention.kind": "topk",
        "model.attention.top_k": 8,
        "model.attention.sites": ["encoder_self", "decoder_self", "cross"],
        "data.vocabulary_size": 10_000,
        "data.max_tokens": 4000,
        "train.optimizer": "adamw",
        "train.betas": (0.9, 0.98),
        "train.eps": 1e-8,
        "train.weight_decay": 1e-4,
        "train.clip_norm": 25.0,
        "train.accumulate": 4,
        "train.keep": 10,
        "decode.beam": 5,
        "decode.length_penalty": "power",
        "decode.alpha": 1.0,
        "label_smoothing": 0.1,
    },
    "iwslt15_en_vi": {
        "model.encoder_layers": 6,
        "model.decoder_layers": 6,
        "model.width": 512,
        "model.hidden_width": 2048,
        "model.num_heads": 8,
        "model.normalisation": "pre",
        "model.embeddings": "joint",
        "model.dropout": 0.1,
        "model.attention_dropout": 0.1,
        "model.activation_dropout": 0.1,
        "model.attention.kind": "topk",
        "model.attention.top_k": 6,
        "model.attention.sites": ["encoder_self", "decoder_self"],
        "data.vocabulary_size": 2**15,
        "data.max_tokens": 4096,
        "train.optimizer": "adam",
        "train.betas": (0.9, 0.997),
        "train.eps": 1e-9,
        "train.clip_norm": 0.0,
        "train.accumulate": 1,
        "train.steps": 35_000,
        "train.save_every": 1000,
        "train.keep": 8,
        "decode.beam": 4,
        "decode.length_penalty": "gnmt",
        "decode.alpha": 0.6,
        "label_smoothing": 0.1,
    },
}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, values in RECIPES.items() for key in values]
)
def test_shipped_configuration_has_the_published_value(name: str, key: str) -> None:
    value: Any = shipped(name)
    group, *fields = key.split(".")
    value = value[group]
    for field in fields:
        value = getattr(value, field)
    assert value == RECIPES[name][key]


def parameters(model: ModelConfig) -> int:
    """Number of parameters by the formulas of Vaswani et al. 2017.

    An attention has four projections M x M with biases, a feed-forward network M x F and F x M with
    biases, a norm 2 M. An encoder layer is one attention, one network and two norms; a decoder
    layer two attentions, one network and three norms. Positions have none, nor has top-k.
    """
    width, inner = model.width, model.hidden_width
    attention = 4 * (width * width + width)
    network = width * inner + inner + inner * width + width
    norm = 2 * width
    layers = model.encoder_layers * (attention + network + 2 * norm)
    layers += model.decoder_layers * (2 * attention + network + 3 * norm)
    layers += 2 * norm if model.normalisation == "pre" else 0
    source, target = model.source_vocabulary_size, model.target_vocabulary_size
    tables = {"joint": target, "target": source + target, "separate": source + 2 * target}
    return layers + tables[model.embeddings] * width


@pytest.mark.parametrize(
    ("name", "vocabulary", "total"),
    [
        # 6 (2 norms, 1 attention, 1 network) + 6 (3, 2, 1) layers, tables of 3 x 10,000 x 512:
        # 31,543,296 + 15,360,000.
        ("iwslt14_de_en", 10_000, 46_903_296),
        # Transformer base without tables 44,138,496 with two final norms 44,140,544;
        # 32,768 x 512 = 16,777,216.
        ("iwslt15_en_vi", 32_768, 60_917_760),
    ],
)
def test_parameters_of_the_paper_models(name: str, vocabulary: int, total: int) -> None:
    fields = shipped(name)["model"].__dict__
    sizes = {"source_vocabulary_size": vocabulary, "target_vocabulary_size": vocabulary}
    config = ModelConfig(**fields | sizes)
    with torch.device("meta"):
        model = build_model(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == parameters(config) == total


@pytest.mark.parametrize(("name", "sparse"), [("iwslt14_de_en", 18), ("iwslt15_en_vi", 12)])
def test_sparse_attentions_of_the_paper_models(name: str, sparse: int) -> None:
    fields = shipped(name)["model"].__dict__
    sizes = {"source_vocabulary_size": 10, "target_vocabulary_size": 10}
    with torch.device("meta"):
        model = build_model(ModelConfig(**fields | sizes))
    assert len(sparse_attentions(model)) == sparse


def test_initial_weights_have_the_published_spread() -> None:
    # fairseq: q, k, v Xavier-uniform with gain 1/sqrt(2), that is U(-a, a) with
    # a = sqrt(6 / (M + M)) / sqrt(2); output projection with gain 1; embeddings N(0, 1/M).
    torch.manual_seed(1)
    fields = shipped("iwslt14_de_en")["model"].__dict__
    sizes = {"source_vocabulary_size": 4000, "target_vocabulary_size": 100, "encoder_layers": 1}
    model = build_model(ModelConfig(**fields | sizes))
    bound = (6 / 1024) ** 0.5
    attention = model.encoder.layers[0].self_attention
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        largest = projection.weight.abs().max().item()
        assert 0.99 * bound / 2**0.5 < largest <= bound / 2**0.5
        assert projection.bias.eq(0).all()
    assert 0.99 * bound < attention.out_proj.weight.abs().max().item() <= bound
    table = model.source.get_parameter("tokens.weight")
    # Two million draws: the sample's deviation is within 0.2 % of the true one.
    assert table.std().item() == pytest.approx(512**-0.5, rel=2e-3)
    assert table[PAD].eq(0).all()


def test_noam_learning_rates_of_en_vi() -> None:
    # tensor2tensor: 2 * 512^-0.5 * min(1, s / 8000) * max(s, 8000)^-0.5.
    schedule = make_schedule(shipped("iwslt15_en_vi")["train"])
    constant = 2 * 512**-0.5
    assert schedule(8000) == pytest.approx(constant * 8000**-0.5, rel=1e-12)
    assert schedule(8000) == pytest.approx(9.882e-4, rel=1e-4)
    assert schedule(4000) == pytest.approx(9.882e-4 / 2, rel=1e-4)
    assert schedule(32_000) == pytest.approx(9.882e-4 / 2, rel=1e-4)
    assert max(schedule(step) for step in range(0, 35_000, 100)) == schedule(8000)


def test_inverse_square_root_learning_rates_of_de_en() -> None:
    # fairseq: from 1e-7 straight to 1e-3 at update 4000, then 1e-3 * sqrt(4000 / s).
    schedule = make_schedule(shipped("iwslt14_de_en")["train"])
    assert schedule(0) == 1e-7
    assert schedule(2000) == pytest.approx((1e-7 + 1e-3) / 2, rel=1e-12)
    assert schedule(4000) == pytest.approx(1e-3, rel=1e-12)
    assert schedule(16_000) == pytest.approx(5e-4, rel=1e-12)
    assert schedule(54_000) == pytest.approx(1e-3 * (4000 / 54_000) ** 0.5, rel=1e-12)
    assert schedule(10**16) == 1e-9


class Fixed(nn.Module):
    """Gives the same logits (B,T,V) for every input."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.logits


def test_label_smoothed_loss_is_fairseqs() -> None:
    # V = 4. First row: p = softmax(0, ln 2, ln 3, ln 4) = (1, 2, 3, 4) / 10 with target 3;
    # second row is padding. 0.9 * NLL + 0.1 / V * sum_v -log p_v over the tokens, with
    # NLL = -ln 0.4 = 0.9162907 and the sum -ln(0.1 * 0.2 * 0.3 * 0.4) = 6.0322865:
    # 0.9 * 0.9162907 + 0.1 / 4 * 6.0322865 = 0.9754688.
    logits = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 1.0, 1.0, 1.0]]]).log()
    target = torch.tensor([[3, PAD]])
    batch = ParallelBatch(target, target, target, torch.zeros(1, dtype=torch.long))
    loss = translation_step(0.1)(Fixed(logits), batch)
    assert loss.total.item() == pytest.approx(0.9754688, abs=1e-6)
    assert loss.count.item() == 1
    assert loss.log["nll"].item() == pytest.approx(0.9162907, abs=1e-6)
    # torch's cross-entropy spreads the smoothed share in the same way.
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=0.1
    )
    torch.testing.assert_close(loss.total, expected)


def test_padding_gets_no_gradient_from_the_loss() -> None:
    model = Fixed(torch.randn(2, 3, 7, dtype=torch.float64))
    target = torch.tensor([[4, 5, 2], [6, 2, PAD]])
    batch = ParallelBatch(target, target, target, torch.arange(2))
    loss = translation_step(0.1)(model, batch)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert loss.count.item() == 5
    assert model.logits.grad is not None
    assert model.logits.grad[1, 2].eq(0).all()
    assert model.logits.grad[1, 1].ne(0).all()


def test_length_penalties_are_the_published_ones() -> None:
    # En-Vi: ((5 + 7) / 6)^0.6 = 2^0.6; De-En: the mean over the length.
    assert length_penalty(shipped("iwslt15_en_vi")["decode"])(7) == pytest.approx(2**0.6)
    assert length_penalty(shipped("iwslt14_de_en")["decode"])(7) == pytest.approx(7.0)

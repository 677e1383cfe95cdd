import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_explicit_sparse_transformer.build import build_model
from separata_explicit_sparse_transformer.config import AttentionConfig, DecodeConfig, ModelConfig
from separata_explicit_sparse_transformer.convert import (
    attention_table,
    convert,
    make_sparse,
    measure_attention,
)
from separata_explicit_sparse_transformer.data import DataConfig
from separata_explicit_sparse_transformer.evaluate import evaluate
from separata_explicit_sparse_transformer.generate import load_run
from separata_explicit_sparse_transformer.model import ExplicitSparseTransformer, sparse_attentions
from separata_explicit_sparse_transformer.train import train
from separata_shared.nn import record_attention
from separata_shared.training import Run, TrainConfig
from separata_shared.training.average import average_checkpoints
from torch import Tensor, nn


def translation_model(kind: str, top_k: int = 8) -> ExplicitSparseTransformer:
    torch.manual_seed(0)
    config = ModelConfig(
        width=16,
        num_heads=2,
        hidden_width=16,
        encoder_layers=2,
        decoder_layers=2,
        source_vocabulary_size=12,
        target_vocabulary_size=12,
        attention=AttentionConfig(kind=kind, top_k=top_k),  # type: ignore[arg-type]
    )
    return build_model(config).eval()


def torch_encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def tokens(*lengths: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(
        [torch.arange(length) % 8 + 4 for length in lengths], batch_first=True, padding_value=1
    )


def test_a_converted_model_is_the_sparse_model_with_the_same_parameters() -> None:
    dense, sparse = translation_model("dense"), translation_model("topk", 3)
    source, target = tokens(9, 5), tokens(7, 7)
    changed = make_sparse(dense, 3)
    assert changed == list(sparse_attentions(sparse))
    assert len(changed) == 6
    torch.testing.assert_close(dense(source, target), sparse(source, target))


def test_only_chosen_attentions_become_sparse() -> None:
    model = translation_model("dense")
    changed = make_sparse(model, 3, chosen=lambda name: "self_attention" in name)
    assert changed == list(sparse_attentions(model))
    assert len(changed) == 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_torchs_encoder_becomes_sparse_and_keeps_its_parameters() -> None:
    model = torch_encoder()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 9, 16)
    padded = torch.arange(9) >= torch.tensor([[9], [4]])
    dense = model(x, src_key_padding_mask=padded)
    assert make_sparse(model, 9) == ["layers.0.self_attn", "layers.1.self_attn"]
    same = model(x, src_key_padding_mask=padded)
    torch.testing.assert_close(same[~padded], dense[~padded])
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    model = torch_encoder()
    make_sparse(model, 1)
    assert not torch.allclose(model(x), dense, atol=1e-3)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention"):
        make_sparse(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="nothing was attended"):
        measure_attention(translation_model("dense"), [], top_k=3, call=lambda m, b: None)


@pytest.mark.parametrize("top_k", [0, -1, 2.5, True])
def test_an_impossible_k_is_refused_before_anything_is_changed(top_k: Any) -> None:
    for model in (translation_model("dense"), torch_encoder()):
        before = str(model)
        with pytest.raises(ValueError, match="top_k must be"):
            make_sparse(model, top_k)
        assert str(model) == before
    with pytest.raises(ValueError, match="top_k must be"):
        measured(top_k)


def test_a_model_of_which_one_attention_cannot_become_sparse_stays_as_it_was() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    model.append(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    with pytest.raises(ValueError, match="add_zero_attn"):
        make_sparse(model, 3)
    assert all(isinstance(module, nn.MultiheadAttention) for module in model)


def test_what_is_no_model_with_attention_inside_is_said() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, not int"):
        make_sparse(3, 3)  # type: ignore[arg-type]  # no module
    with pytest.raises(ValueError, match=r"itself an nn\.MultiheadAttention.*from_dense"):
        make_sparse(nn.MultiheadAttention(8, 2), 3)


def measured(top_k: int) -> list[dict[str, float]]:
    def real(name: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0 if name.startswith("encoder") else 1] != 1

    return measure_attention(
        translation_model("dense"),
        [(tokens(9, 5), tokens(7, 3)), (tokens(4), tokens(6))],
        top_k=top_k,
        call=lambda model, batch: model(*batch),
        real_queries=real,
    )


def test_mass_kept_is_the_dense_probability_of_the_kept_keys() -> None:
    """By definition, on one sentence whose weights are looked at directly."""
    model = translation_model("dense")
    source, target = tokens(9), tokens(7)
    with torch.no_grad(), record_attention(model) as weights:
        model(source, target)
    rows = measure_attention(
        model, [(source, target)], top_k=2, call=lambda model, batch: model(*batch)
    )
    assert len(rows) == 6 * 2
    for row in rows:
        dense = weights[row["module"]][0, row["head"]].double()
        kept = dense.sort(dim=-1, descending=True).values[:, :2]
        assert row["mass_kept"] == pytest.approx(kept.sum(dim=-1).mean().item())
        entropy = torch.distributions.Categorical(dense).entropy().mean().item()
        assert row["entropy_dense"] == pytest.approx(entropy, abs=1e-6)
        assert row["support"] <= 2


def test_more_keys_keep_more_mass_and_all_keys_keep_everything() -> None:
    reports = [measured(top_k) for top_k in (1, 2, 4, 9)]
    for fewer, more in pairwise(reports):
        for row, next_row in zip(fewer, more, strict=True):
            assert row["mass_kept"] <= next_row["mass_kept"] + 1e-9
            assert row["entropy"] <= math.log(row["support"] + 1e-9) + 1e-6
    for row in reports[-1]:
        assert row["mass_kept"] == pytest.approx(1, abs=1e-6)
        assert row["entropy"] == pytest.approx(row["entropy_dense"], abs=1e-6)
    for row in reports[0]:
        assert row["support"] == 1
        assert row["entropy"] == 0


def test_padding_queries_do_not_count() -> None:
    queries = {row["module"]: row["queries"] for row in measured(2)}
    assert queries["encoder.layers.0.self_attention"] == 9 + 5 + 4
    assert queries["decoder.layers.0.cross_attention"] == 7 + 3 + 6


@torch.no_grad()
def test_torchs_attention_is_measured_too() -> None:
    model = torch_encoder()
    x = torch.randn(2, 9, 16)
    padded = torch.arange(9) >= torch.tensor([[9], [4]])
    before = model(x, src_key_padding_mask=padded)
    rows = measure_attention(
        model,
        [x],
        top_k=4,
        call=lambda model, x: model(x, src_key_padding_mask=padded),
        real_queries=lambda name, batch: ~padded,
    )
    assert [(row["module"], row["head"]) for row in rows] == [
        (f"layers.{layer}.self_attn", head) for layer in range(2) for head in range(2)
    ]
    assert all(row["queries"] == 13 for row in rows)
    assert rows[0]["support_dense"] == pytest.approx((9 * 9 + 4 * 4) / 13)
    assert all(0 < row["mass_kept"] < 1 for row in rows)
    after = model(x, src_key_padding_mask=padded)
    torch.testing.assert_close(after, before)  # no hook stays behind


def test_the_report_is_json_and_its_table_has_a_line_for_every_head() -> None:
    rows = measured(2)
    assert json.loads(json.dumps(rows)) == rows
    lines = attention_table(rows).splitlines()
    assert len(lines) == 1 + len(rows)
    assert "mass kept" in lines[0]


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "dense"
    train(
        model=ModelConfig(
            width=16,
            num_heads=2,
            hidden_width=16,
            encoder_layers=1,
            decoder_layers=1,
            dropout=0.0,
            attention=AttentionConfig(sites=[]),
        ),
        data=DataConfig(tiny_pairs=100, tiny_length=5),
        train=TrainConfig(steps=2, save_every=1, device="cpu"),
        decode=DecodeConfig(beam=2),
        run=run,
    )
    return run


def test_a_converted_run_is_a_run_with_the_same_weights(dense_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "sparse"
    report = convert(run=dense_run, output=output, top_k=2, sites=["encoder_self", "cross"])
    assert json.loads((output / "report.json").read_text()) == report
    assert len(report["attentions"]) == 3 * 2
    before, after = load_run(dense_run), load_run(output)
    assert set(sparse_attentions(after.network)) == {
        "encoder.layers.0.self_attention",
        "decoder.layers.0.cross_attention",
    }
    for name, parameter in before.network.state_dict().items():
        assert torch.equal(after.network.state_dict()[name], parameter)
    assert evaluate(run=output)["sentences"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


def test_averaged_weights_can_be_converted(dense_run: Path, tmp_path: Path) -> None:
    average = average_checkpoints(run=dense_run, last=2)
    convert(run=dense_run, output=tmp_path / "sparse", top_k=2, weights=average, batches=1)
    assert load_run(tmp_path / "sparse").weights.read_bytes() == average.read_bytes()


def test_averaged_weights_replace_none_of_a_step(dense_run: Path) -> None:
    output = Run(dense_run).weight_files()[-1]
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"^output: .*\.safetensors holds the weights of a step"):
        average_checkpoints(run=dense_run, last=2, output=output)
    assert output.read_bytes() == before


def test_what_cannot_be_converted_is_refused(dense_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: not a run"):
        convert(run=tmp_path / "nowhere", output=tmp_path / "sparse")
    with pytest.raises(ValueError, match="dense: is not empty"):
        convert(run=dense_run, output=dense_run)
    with pytest.raises(ValueError, match="top_k"):
        convert(run=dense_run, output=tmp_path / "sparse", top_k=0)
    convert(run=dense_run, output=tmp_path / "sparse", top_k=2, batches=1)
    with pytest.raises(ValueError, match="sparse attention already"):
        convert(run=tmp_path / "sparse", output=tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]

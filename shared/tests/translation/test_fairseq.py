import pytest
import torch
from separata_shared.translation import from_fairseq


def test_stacked_and_tied_fairseq_parameters_are_understood() -> None:
    table, stacked = torch.randn(12, 4), torch.randn(12, 4)
    state = {
        "encoder.version": torch.ones(1),
        "encoder.embed_positions._float_tensor": torch.ones(1),
        "encoder.embed_tokens.weight": torch.randn(12, 4),
        "encoder.layers.0.self_attn.in_proj_weight": stacked,
        "decoder.embed_tokens.weight": table,
        "decoder.output_projection.weight": table.clone(),
    }
    renamed = from_fairseq(state)
    assert set(renamed) == {
        "source.tokens.weight",
        "target.tokens.weight",
        *(f"encoder.layers.0.self_attention.{letter}_proj.weight" for letter in "qkv"),
    }
    torch.testing.assert_close(
        renamed["encoder.layers.0.self_attention.k_proj.weight"], stacked[4:8]
    )
    untied = from_fairseq(state | {"decoder.embed_out": table + 1})
    assert torch.equal(untied["output.weight"], table + 1)
    with pytest.raises(ValueError, match=r"encoder\.embed_tokens\.weight"):
        from_fairseq({})


def test_learned_fairseq_positions_are_kept() -> None:
    table = torch.randn(12, 4)
    renamed = from_fairseq(
        {
            "encoder.embed_tokens.weight": table,
            "encoder.embed_positions.weight": table + 1,
            "decoder.embed_positions.weight": table + 2,
        }
    )
    assert torch.equal(renamed["source.positions.weight"], table + 1)
    assert torch.equal(renamed["target.positions.weight"], table + 2)

from typing import Any

import pytest
from separata_explicit_sparse_transformer.config import AttentionConfig, DecodeConfig, ModelConfig


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": []}, "top_k"),
        ({"top_k": [4, 0]}, "top_k"),
        ({"top_k": [[4, 4], [4, -1]]}, "top_k"),
        ({"ratio": 0.5}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"min_keys": 0}, "min_keys"),
        ({"start_top_k": 0, "schedule_steps": 4}, "start_top_k"),
        ({"start_top_k": 8}, "start_top_k"),
        ({"start_top_k": 8, "schedule_steps": 4, "top_k": [4, 4]}, "start_top_k"),
        ({"start_top_k": 8, "schedule_steps": 4, "kind": "softmax_topk"}, "start_top_k"),
        ({"kind": "joint_heads", "top_k": [[4, 4]]}, "top_k"),
        ({"kind": "window", "top_k": [[4, 4]], "sites": ["encoder_self"]}, "top_k"),
        ({"kind": "out_of_window", "top_k": 1, "sites": ["encoder_self"]}, "top_k"),
        # A pattern is made of positions, which query and key share in self-attention only.
        ({"kind": "window"}, "sites"),
        ({"kind": "out_of_window"}, "sites"),
        ({"kind": "official_ratio", "ties": "exact"}, "ties"),
    ],
)
def test_impossible_attention_is_refused_by_its_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.attention\.{key}: "):
        AttentionConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"width": 0}, "width"),
        ({"width": 10, "num_heads": 4}, "num_heads"),
        ({"hidden_width": -1}, "hidden_width"),
        ({"max_length": 1}, "max_length"),
        ({"encoder_layers": 0}, "encoder_layers"),
        ({"decoder_layers": 0}, "decoder_layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"activation_dropout": float("nan")}, "activation_dropout"),
        ({"attention": AttentionConfig(top_k=[8, 4])}, "attention.top_k"),
        ({"num_heads": 4, "attention": AttentionConfig(top_k=[[8, 4]] * 6)}, "attention.top_k"),
    ],
)
def test_impossible_model_is_refused_by_its_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{key}\b.*: "):
        ModelConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"beam": 0}, "beam"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"alpha": float("nan")}, "alpha"),
        ({"max_length_factor": -1.0}, "max_length_factor"),
        ({"max_length_constant": 0}, "max_length_constant"),
    ],
)
def test_impossible_search_is_refused_by_its_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"decode\.{key}\b.*: "):
        DecodeConfig(**changes)


def test_k_may_be_given_for_more_layers_than_there_are() -> None:
    config = ModelConfig(
        encoder_layers=2, decoder_layers=2, attention=AttentionConfig(top_k=[1] * 3)
    )
    assert config.attention.top_k == [1, 1, 1]

from collections.abc import Callable

import pytest
import torch
from separata_shared.attention import dense_attention
from separata_shared.nn import Decoder, record_attention
from torch.testing import assert_close


def test_every_attention_is_recorded_and_the_output_unchanged(
    make_decoder: Callable[..., Decoder],
) -> None:
    decoder = make_decoder()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    names = set(decoder.state_dict())
    expected = decoder(x, memory)
    with record_attention(decoder) as weights:
        assert_close(decoder(x, memory), expected)
    assert {name: tuple(each.shape) for name, each in weights.items()} == {
        "layers.0.self_attention": (2, 4, 5, 5),
        "layers.0.cross_attention": (2, 4, 5, 7),
        "layers.1.self_attention": (2, 4, 5, 5),
        "layers.1.cross_attention": (2, 4, 5, 7),
    }
    for each in weights.values():
        assert not each.requires_grad
        assert_close(each.sum(-1), torch.ones(2, 4, 5))
    assert set(decoder.state_dict()) == names
    assert decoder.layers[0].self_attention.attend is dense_attention


def test_attention_is_restored_after_an_error(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder()
    with pytest.raises(RuntimeError, match="stop"), record_attention(decoder):
        raise RuntimeError("stop")
    assert decoder.layers[1].cross_attention.attend is dense_attention

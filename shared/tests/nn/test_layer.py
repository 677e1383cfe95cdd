from collections.abc import Callable

import torch
from separata_shared.nn import Decoder, Encoder
from torch.testing import assert_close


def test_state_dict_names(
    make_encoder: Callable[..., Encoder], make_decoder: Callable[..., Decoder]
) -> None:
    def parts(module: Encoder | Decoder) -> set[str]:
        return {name.split(".")[2] for name in module.state_dict()}

    encoder_parts = {"self_attention", "feed_forward"}
    decoder_parts = {*encoder_parts, "cross_attention"}
    assert parts(make_encoder()) == {*encoder_parts, *(f"{p}_residual" for p in encoder_parts)}
    assert parts(make_decoder()) == {*decoder_parts, *(f"{p}_residual" for p in decoder_parts)}
    assert "layers.1.cross_attention_residual.norm.weight" in make_decoder().state_dict()


def test_decoder_layer_does_not_see_the_future(make_decoder: Callable[..., Decoder]) -> None:
    layer = make_decoder().layers[0]
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = layer(x, memory), layer(changed, memory)
    assert_close(after[:, :4], before[:, :4])
    assert not torch.isclose(after[:, 4:], before[:, 4:]).all(dim=-1).any()


def test_attend_is_a_decoder_layer_without_its_feed_forward(
    make_decoder: Callable[..., Decoder],
) -> None:
    layer = make_decoder().layers[0].eval()
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    attended = layer.attend(x, memory)
    assert_close(layer.feed_forward_residual(attended, layer.feed_forward), layer(x, memory))


def test_encoder_layer_sees_both_directions(make_encoder: Callable[..., Encoder]) -> None:
    layer = make_encoder().layers[0]
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 3] += torch.randn(16)
    assert not torch.isclose(layer(x), layer(changed)).all(dim=-1).any()

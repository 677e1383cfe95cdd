from collections.abc import Callable

import torch
from separata_shared.data.vocabulary import PAD
from separata_shared.nn import Decoder, DecoderLayer, LearnedPositions, Transformer
from separata_shared.translation import TransformerConfig, build_transformer
from torch import Tensor, nn
from torch.nn import functional as F


def small(**changes: int) -> TransformerConfig:
    sizes = {"width": 8, "num_heads": 2, "hidden_width": 12, "max_length": 9} | changes
    layers = {"encoder_layers": 2, "decoder_layers": 3}
    types = {"source_vocabulary_size": 11, "target_vocabulary_size": 11}
    return TransformerConfig(**sizes, **layers, **types)


def test_activation_and_positions_are_those_handed_in() -> None:
    model = build_transformer(
        small(),
        Transformer,
        activation=F.gelu,
        positions=lambda config: LearnedPositions(
            config.width, padding_index=PAD, max_length=config.max_length
        ),
    )
    assert isinstance(model, Transformer)
    layers = [*model.encoder.layers, *model.decoder.layers]
    assert all(layer.feed_forward.activation is F.gelu for layer in layers)
    tables = model.source.positions.weight, model.target.positions.weight
    assert all(len(table) == 9 + PAD + 1 for table in tables)
    assert not torch.equal(*tables)


class OwnDecoder(Decoder):
    pass


class OwnLayer(DecoderLayer):
    def __init__(self, number: int, *parts: nn.Module, residual: Callable[[], nn.Module]) -> None:
        super().__init__(*parts, residual=residual)
        self.number = number


class OwnModel(nn.Module):
    def __init__(self, *, decoder: Decoder, output: Callable[[Tensor], Tensor], **rest: object):
        super().__init__()
        self.decoder = decoder


def test_layers_decoder_and_model_are_made_by_what_is_handed_in() -> None:
    model = build_transformer(small(), OwnModel, decoder_layer=OwnLayer, decoder=OwnDecoder)
    assert isinstance(model, OwnModel)
    assert isinstance(model.decoder, OwnDecoder)
    assert [layer.number for layer in model.decoder.layers] == [0, 1, 2]

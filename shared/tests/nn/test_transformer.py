import pytest
import torch
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.nn import Transformer
from separata_shared.translation import TransformerConfig, build_transformer
from torch import Tensor


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(1)
    config = TransformerConfig(
        width=16,
        num_heads=2,
        hidden_width=24,
        encoder_layers=2,
        decoder_layers=2,
        source_vocabulary_size=12,
        target_vocabulary_size=12,
    )
    return build_transformer(config, Transformer).eval()


def first_logits(model: Transformer, source: Tensor) -> Tensor:
    return model.step(torch.full((len(source),), EOS), model.start(source))


def test_only_padding_needs_a_mask_while_decoding(model: Transformer) -> None:
    sentence = torch.tensor([[4, 5, 6, EOS]])
    padded = torch.tensor([[4, 5, 6, EOS, PAD], [7, 8, 9, 10, EOS]])
    assert model.start(sentence).memory_mask is None
    mask = model.start(padded).memory_mask
    assert mask is not None
    assert mask.squeeze().tolist() == [[True, True, True, True, False], [True] * 5]
    torch.testing.assert_close(first_logits(model, padded)[:1], first_logits(model, sentence))


def test_steps_give_the_logits_of_the_whole_target(model: Transformer) -> None:
    source = torch.tensor([[4, 5, 6, EOS, PAD], [7, 8, 9, 10, EOS]])
    target = torch.tensor([[EOS, 4, 5], [EOS, 6, 7]])
    state = model.start(source)
    steps = torch.stack([model.step(tokens, state) for tokens in target.T], dim=1)
    torch.testing.assert_close(steps, model(source, target))

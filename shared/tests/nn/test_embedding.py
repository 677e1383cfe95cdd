import math

import pytest
import torch
from separata_shared.nn import LearnedPositions, SinusoidalPositions, TokenEmbedding
from torch import nn
from torch.testing import assert_close

PAD = 1
LEFT = torch.tensor([[1, 1, 7, 8, 9]])
RIGHT = torch.tensor([[7, 8, 9, 1, 1]])


def test_token_vectors_are_scaled_by_the_root_of_the_width() -> None:
    embedding = TokenEmbedding(10, width=16, padding_index=PAD)
    tokens = torch.tensor([[3, 1]])
    assert torch.equal(embedding(tokens)[0, 0], 4 * embedding.weight[3])
    assert not embedding(tokens)[0, 1].any()


def test_token_weights_have_variance_one_over_the_width() -> None:
    embedding = TokenEmbedding(5000, width=64, padding_index=PAD)
    # The standard deviation of 320,000 draws is within 1 % of 1/8 beyond any doubt.
    assert embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.01)


def test_output_layer_shares_the_weights() -> None:
    embedding = TokenEmbedding(10, width=16, padding_index=PAD)
    x = torch.randn(2, 3, 16)
    logits = embedding.project(x)
    assert_close(logits, x @ embedding.weight.T)
    (logits.sum() + embedding(LEFT).sum()).backward()
    assert [name for name, _ in embedding.named_parameters()] == ["weight"]
    assert embedding.weight.grad is not None
    # Each row gets the states' sum through the output layer; tokens in use also get sqrt(16).
    expected = x.sum(dim=(0, 1)).expand(10, 16).clone()
    expected[7:] += 4
    assert_close(embedding.weight.grad, expected)


def test_sinusoid_numbers() -> None:
    # Width 6: frequencies 10000^(-i/2) = 1, 1/100, 1/10000; the first token has position 2.
    positions = SinusoidalPositions(6, padding_index=PAD, max_length=8)
    angles = [2.0, 0.02, 0.0002]
    expected = [*map(math.sin, angles), *map(math.cos, angles)]
    assert_close(positions(torch.tensor([[7]]))[0, 0], torch.tensor(expected))


def test_sinusoid_of_odd_width_ends_in_zero() -> None:
    positions = SinusoidalPositions(7, padding_index=PAD, max_length=8)
    output = positions(RIGHT)
    assert not output[..., -1].any()
    assert output[0, :3, :-1].all()


def test_sinusoids_beyond_the_table_continue_it() -> None:
    tokens = torch.full((2, 50), 5)
    short = SinusoidalPositions(16, padding_index=PAD, max_length=3)
    long = SinusoidalPositions(16, padding_index=PAD, max_length=60)
    assert torch.equal(short(tokens), long(tokens))
    assert torch.equal(short(tokens[:, :1], offset=40), long(tokens)[:, 40:41])
    assert not short.state_dict()


@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
class TestBothKinds:
    def test_padding_side_changes_nothing(self, kind: type[nn.Module]) -> None:
        positions = kind(16, padding_index=PAD, max_length=8)
        left, right = positions(LEFT), positions(RIGHT)
        assert torch.equal(left[:, 2:], right[:, :3])
        assert not left[:, :2].any()
        assert not right[:, 3:].any()

    def test_pieces_equal_the_whole(self, kind: type[nn.Module]) -> None:
        positions = kind(16, padding_index=PAD, max_length=8)
        tokens = torch.tensor([[2, 7, 8, 9, 4]])
        pieces = [positions(tokens[:, i : i + 1], offset=i) for i in range(5)]
        assert torch.equal(torch.cat(pieces, dim=1), positions(tokens))


def test_learned_positions_refuse_longer_sentences() -> None:
    positions = LearnedPositions(16, padding_index=PAD, max_length=5)
    assert positions(torch.full((1, 5), 7)).shape == (1, 5, 16)
    for tokens, offset in ((torch.full((1, 6), 7), 0), (torch.full((1, 1), 7), 5)):
        with pytest.raises(ValueError, match="6 tokens is longer than the 5 learned positions"):
            positions(tokens, offset=offset)

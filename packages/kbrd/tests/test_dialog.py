"""The dialog model: what may depend on what."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_kbrd.config import DialogConfig
from separata_kbrd.dialog import DialogModel, Positions, count_places, count_tokens
from separata_kbrd.model import FrozenRecommender
from separata_kbrd.replies import reply_loss, shifted
from separata_kbrd.words import END, NULL, START, UNK
from separata_shared.nn import FeedForward, MultiHeadAttention
from torch import Tensor
from torch.nn import functional as F

V, d = 23, 6
SMALL = DialogConfig(
    width=12, num_heads=2, hidden_width=10, bias_width=9, max_length=30, max_reply=8
)


def make_model(seed: int = 0, config: DialogConfig = SMALL) -> DialogModel:
    torch.manual_seed(seed)
    return DialogModel(config, num_tokens=V, user_width=d).double().eval()


def texts(lengths: list[int], seed: int, *, end: bool = False) -> Tensor:
    """Random words, padded on the right with 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(lengths), max(1, *lengths), dtype=torch.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = torch.randint(UNK, V, (length,), generator=generator)
        if end and length:
            row[length - 1] = END
    return rows


def users(count: int, seed: int) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=3)
seeds = st.integers(0, 10_000)


@settings(deadline=None, max_examples=25)
@given(lengths=lengths, seed=seeds, place=st.integers(0, 6), extra=st.integers(1, 5))
def test_no_logit_depends_on_a_later_token_nor_on_the_padding_of_the_dialog(
    lengths: list[int], seed: int, place: int, extra: int
) -> None:
    model, u = make_model(seed), users(len(lengths), seed)
    xs, written = texts(lengths, seed), shifted(texts([7] * len(lengths), seed + 1))
    logits = model(xs, written, u)
    changed = written.clone()
    changed[:, place + 1 :] = (changed[:, place + 1 :] + 1) % V
    assert torch.equal(model(xs, changed, u)[:, : place + 1], logits[:, : place + 1])
    padded = F.pad(xs, (0, extra), value=NULL)
    assert torch.allclose(model(padded, written, u), logits, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(lengths=lengths, seed=seeds)
def test_one_row_alone_gets_the_same_logits(lengths: list[int], seed: int) -> None:
    model, u = make_model(seed), users(len(lengths), seed)
    xs, written = texts(lengths, seed), shifted(texts([5] * len(lengths), seed))
    logits = model(xs, written, u)
    for row, length in enumerate(lengths):
        alone = model(xs[row : row + 1, : max(length, 1)], written[row : row + 1], u[row : row + 1])
        assert torch.allclose(alone[0], logits[row], rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(seed=seeds, constant=st.floats(-50, 50))
def test_the_bias_is_the_same_at_every_step_and_a_constant_changes_no_probability(
    seed: int, constant: float
) -> None:
    model, u = make_model(seed), users(2, seed)
    xs, written = texts([4, 6], seed), shifted(texts([5, 5], seed))
    plain = model.transformer(xs, written)
    v = model(xs, written, u) - plain
    assert torch.allclose(v, model.bias(u)[:, None].expand_as(v), rtol=0, atol=1e-12)
    before = model(xs, written, u).softmax(dim=-1)
    with torch.no_grad():
        model.bias.second.bias += constant
    assert torch.allclose(model(xs, written, u).softmax(dim=-1), before, rtol=0, atol=1e-12)


def test_without_user_and_biases_it_is_the_plain_transformer() -> None:
    model = make_model()
    torch.nn.init.zeros_(model.bias.first.bias)
    torch.nn.init.zeros_(model.bias.second.bias)
    xs, written = texts([4, 0], 1), shifted(texts([5, 5], 2))
    logits = model(xs, written, torch.zeros(2, d, dtype=torch.float64))
    assert torch.equal(logits, model.transformer(xs, written))


def test_the_frozen_recommender_gets_no_gradient_and_no_randomness() -> None:
    torch.manual_seed(0)
    frozen = FrozenRecommender(
        torch.randn(9, d), a=torch.randn(d, d), b=torch.randn(d, 1), output_bias=torch.randn(9)
    )
    model = make_model().float().train()
    frozen.train()
    nodes, mask = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[True, True], [True, False]])
    u, _ = frozen.users(nodes, mask)
    assert torch.equal(u, frozen.users(nodes, mask)[0])
    u.requires_grad_()
    reply_loss(
        model(texts([4, 5], 0), shifted(texts([3, 3], 1)), u), texts([3, 3], 1), slot=UNK
    ).total.backward()
    assert u.grad is None
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_step_by_step_gives_the_logits_of_the_whole() -> None:
    model, u = make_model(3), users(2, 3)
    xs, written = texts([5, 0], 3), shifted(texts([6, 6], 4))
    state = model.start(xs, u)
    steps = torch.stack([model.step(column, state) for column in written.unbind(1)], dim=1)
    assert torch.allclose(steps, model(xs, written, u), rtol=0, atol=1e-12)


def test_a_text_of_padding_alone_gives_finite_logits_and_gradients() -> None:
    model = make_model()
    logits = model(texts([0], 0), shifted(texts([4], 1)), users(1, 0))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_positions_follow_the_formula_and_count_as_encoder_and_decoder_do() -> None:
    positions = Positions(6, number=count_places, max_length=9)
    for p, k in ((0, 0), (3, 1), (8, 2)):
        angle = p / 10000 ** (2 * k / 6)
        assert positions.table[p, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-7)
        assert positions.table[p, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)
    tokens = torch.tensor([[5, NULL, 6, 7]])
    assert count_tokens(tokens, 0).tolist() == [[0, 0, 1, 2]]
    assert count_places(tokens, 2).tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"dialog\.max_length"):
        positions(torch.ones(1, 10, dtype=torch.int64))


def test_initialisation_is_that_of_the_authors_code() -> None:
    config = DialogConfig(width=64, num_heads=2, hidden_width=48, max_length=50)
    torch.manual_seed(0)
    model = DialogModel(config, num_tokens=4000, user_width=d)
    table = model.transformer.source.tokens.weight
    assert table is model.transformer.target.tokens.weight
    assert not table[NULL].any()
    assert table[1:].std().item() == pytest.approx(64**-0.5, rel=0.02)
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            # Xavier normal: standard deviation sqrt(2 / (64 + 64)).
            assert module.q_proj.weight.std().item() == pytest.approx(0.125, rel=0.05)
            assert 0 < module.out_proj.bias.abs().max() <= 64**-0.5
        if isinstance(module, FeedForward):
            # Xavier uniform: bound sqrt(6 / (64 + 48)).
            assert module.fc1.weight.abs().max().item() == pytest.approx((6 / 112) ** 0.5, rel=0.01)


def test_loss_counts_every_token_and_the_end_but_no_padding() -> None:
    ys = torch.tensor([[7, UNK, END, NULL], [UNK, END, NULL, NULL]])
    found = reply_loss(torch.zeros(2, 4, V), ys, slot=UNK)
    assert (int(found.count), int(found.slot_count)) == (5, 2)
    assert found.total.item() == pytest.approx(5 * math.log(V), rel=1e-6)
    assert found.slot_total.item() == pytest.approx(2 * math.log(V), rel=1e-6)
    assert shifted(ys)[0].tolist() == [START, 7, UNK, END]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"width": 0}, "width"),
        ({"num_heads": 7}, "num_heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"min_length": 50}, "min_length"),
        ({"block_ngram": -1}, "block_ngram"),
        ({"max_length": 20}, "max_length"),
        ({"beam": 0}, "beam"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=rf"dialog\.{name}"):
        DialogConfig(**wrong)  # type: ignore[arg-type]

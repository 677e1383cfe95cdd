from collections.abc import Callable
from functools import partial

import pytest
import torch
from separata_shared.attention import Attend
from separata_shared.nn import Decoder, Encoder, PostNorm, PreNorm, SandwichNorm
from torch import Tensor, nn
from torch.testing import assert_close

LENGTH = 9


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, memory = torch.randn(3, LENGTH, 16), torch.randn(3, 7, 16)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    return x, memory, mask[:, None, None]


@torch.no_grad()
def test_cached_decoding_equals_teacher_forcing(
    make_decoder: Callable[..., Decoder], attend: Attend, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, memory, mask = inputs
    decoder = make_decoder(attend=attend)
    state = decoder.start(memory, memory_mask=mask)
    sizes = [1, 3, 1, 1, 2, 1]  # pieces of one token and of several
    pieces = [decoder.step(piece, state) for piece in x.split(sizes, dim=1)]
    assert state.length == LENGTH
    assert_close(torch.cat(pieces, dim=1), decoder(x, memory, memory_mask=mask))


@torch.no_grad()
def test_reordered_state_continues_the_chosen_rows(
    make_decoder: Callable[..., Decoder], attend: Attend, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, memory, mask = inputs
    decoder = make_decoder(attend=attend)
    state = decoder.start(memory, memory_mask=mask)
    decoder.step(x[:, :3], state)
    # Two hypotheses each, then permuted, then the middle sentence ends.
    histories = [x[:, :3]]
    for index, sentences in (
        (torch.tensor([0, 0, 1, 1, 2, 2]), None),
        (torch.tensor([1, 0, 2, 2, 5, 4]), None),
        (torch.tensor([0, 0, 5, 4]), torch.tensor([0, 2])),
    ):
        state.reorder(index, sentences)
        new = torch.randn(len(index), 1, 16)
        histories.append(torch.cat((histories[-1][index], new), dim=1))
        output = decoder.step(new, state)
    rows = torch.tensor([0, 0, 2, 2])
    full = decoder(histories[-1], memory[rows], memory_mask=mask[rows])
    assert_close(output, full[:, -1:])


@torch.no_grad()
def test_permuting_hypotheses_leaves_the_cross_attention_alone(
    make_decoder: Callable[..., Decoder], inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, memory, mask = inputs
    decoder = make_decoder()
    state = decoder.start(memory, memory_mask=mask)
    decoder.step(x[:, :1], state)
    cache = state.layers[0].cross_attention

    def address() -> int:
        return cache.read(memory, lambda _: pytest.fail("projected twice"))[0].data_ptr()

    before = address()
    state.reorder(torch.arange(3).repeat_interleave(5))
    assert address() == before
    state.reorder(torch.arange(10), torch.tensor([0, 1]))
    assert address() != before


def test_batch_of_two_equals_two_of_one(
    make_encoder: Callable[..., Encoder], attend: Attend
) -> None:
    encoder = make_encoder(attend=attend)
    x = torch.randn(2, 6, 16)
    assert_close(encoder(x), torch.cat([encoder(x[:1]), encoder(x[1:])]))


def test_padding_changes_nothing(make_encoder: Callable[..., Encoder], attend: Attend) -> None:
    encoder = make_encoder(attend=attend)
    x = torch.randn(2, 6, 16)
    expected = encoder(x)
    for places in (slice(0, 6), slice(4, 10)):  # padded right, padded left
        padded, mask = torch.randn(2, 10, 16), torch.zeros(1, 1, 1, 10, dtype=torch.bool)
        padded[:, places], mask[..., places] = x, True
        assert_close(encoder(padded, mask=mask)[:, places], expected)


def test_fully_padded_sentence_stays_finite(
    make_encoder: Callable[..., Encoder], make_decoder: Callable[..., Decoder], attend: Attend
) -> None:
    encoder, decoder = make_encoder(attend=attend), make_decoder(attend=attend)
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 5)
    memory = encoder(torch.randn(2, 5, 16), mask=mask)
    output = decoder(torch.randn(2, 3, 16), memory, memory_mask=mask)
    output.square().sum().backward()
    assert output.isfinite().all()
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(("wiring", "norms"), [(PostNorm, 1), (PreNorm, 1), (SandwichNorm, 2)])
def test_norm_factory_reaches_every_norm(
    make_encoder: Callable[..., Encoder],
    make_decoder: Callable[..., Decoder],
    wiring: type[nn.Module],
    norms: int,
) -> None:
    options = {"residual": partial(wiring, 16, norm=nn.RMSNorm), "final_norm": nn.RMSNorm(16)}
    # Two layers of two or three sub-layers, and the final norm.
    for stack, sublayers in ((make_encoder(**options), 2), (make_decoder(**options), 3)):
        made = [each for each in stack.modules() if isinstance(each, nn.RMSNorm)]
        assert len(made) == 2 * sublayers * norms + 1
        assert not any(isinstance(each, nn.LayerNorm) for each in stack.modules())


def test_final_norm_comes_last(make_encoder: Callable[..., Encoder]) -> None:
    output = make_encoder(final_norm=nn.LayerNorm(16, elementwise_affine=False))(
        10 * torch.randn(2, 3, 16)
    )
    assert_close(output.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    assert_close(output.std(-1, correction=0), torch.ones(2, 3), atol=1e-3, rtol=0)


def test_gradient_reaches_every_parameter(
    make_decoder: Callable[..., Decoder], attend: Attend, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, memory, mask = inputs
    decoder = make_decoder(attend=attend)
    decoder(x, memory, memory_mask=mask)[..., 0].square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        # Softmax ignores what a key bias adds to all scores of a query.
        assert parameter.grad.any() or name.endswith("k_proj.bias"), name


def test_training_forward_compiles_as_one_graph(
    make_decoder: Callable[..., Decoder], inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, memory, mask = inputs
    decoder = make_decoder()
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    assert_close(compiled(x, memory, memory_mask=mask), decoder(x, memory, memory_mask=mask))

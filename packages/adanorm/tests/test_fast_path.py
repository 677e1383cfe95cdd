"""torch's encoder has a fused path in evaluation that computes LayerNorm whatever the norm is."""

import pytest
import torch
from separata_adanorm.replace import replace_norms
from torch import Tensor, nn

WIDTH = 8


def encoder(*, norm_first: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["ada_norm", "no_norm", "clipped"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_evaluation_equals_training(kind: str, norm_first: bool, x: Tensor) -> None:
    model = encoder(norm_first=norm_first)
    replace_norms(model, kind)
    expected = model(x)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-6)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        padded = model(x, src_key_padding_mask=padding)
    assert torch.allclose(padded[1, :3], model(x[1:, :3])[0], atol=1e-6)


def test_one_layer_replaced_is_enough_to_leave_it(x: Tensor) -> None:
    model = encoder(norm_first=False)
    replace_norms(model, "ada_norm", include="layers.1.*")
    expected = model(x)
    model.eval()
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]])
    with torch.no_grad():
        padded = model(x, src_key_padding_mask=padding)
    assert torch.allclose(padded[0], expected[0], atol=1e-5)


def test_the_converted_layer_can_be_stacked_anew(x: Tensor) -> None:
    layer = encoder(norm_first=True).layers[0]
    replace_norms(layer, "ada_norm")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        assert model(x).isfinite().all()

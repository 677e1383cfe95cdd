"""Counting features that AdaNorm maps oddly."""

import pytest
import torch
from separata_adanorm.monitor import monitor_outliers
from separata_adanorm.norms import AdaNorm, LayerNormSimple, NoNorm, ada_norm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def spiked(rows: int, width: int, *, spike: float) -> Tensor:
    """Alternating ones, and in feature 0 of the first row a large number."""
    x = torch.ones(rows, width)
    x[:, ::2] = -1.0
    x[0, 0] = spike
    return x


class Ops(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_shares_of_the_peak_and_of_the_flip() -> None:
    model = nn.Sequential(AdaNorm(512))
    with monitor_outliers(model) as monitor:
        z = model(spiked(4, 512, spike=40.0))
        model(spiked(4, 512, spike=-40.0))
    (record,) = monitor.report()
    assert record.module == "0"
    assert record.features == 2 * 4 * 512
    assert record.above_peak == pytest.approx(2 / 4096)
    assert record.above_flip == pytest.approx(2 / 4096)
    assert record.flipped == pytest.approx(1 / 4096)  # the negative one keeps its sign
    assert record.largest == pytest.approx(19.6, abs=0.5)
    assert z[0, 0] < 0


def test_between_peak_and_flip() -> None:
    model = nn.Sequential(AdaNorm(512, convention="torch"))
    with monitor_outliers(model) as monitor:
        model(spiked(1, 512, spike=8.0))
    (record,) = monitor.report()
    assert 5 < record.largest < 10
    assert (record.above_peak, record.above_flip, record.flipped) == (1 / 512, 0.0, 0.0)


def test_limits_follow_k() -> None:
    model = nn.Sequential(nn.LayerNorm(512), AdaNorm(512, k=2.0))
    with monitor_outliers(model, k=0.03) as monitor:
        model(spiked(1, 512, spike=40.0))
    before, after = monitor.report()
    assert (before.above_peak, before.above_flip) == (1 / 512, 0.0)  # limits 16.7 and 33.3
    assert (after.above_peak, after.above_flip) == (
        1.0,
        0.5,
    )  # limits 0.25 and 0.5; y is 0.46, -0.56


def test_without_a_slope_there_is_neither_peak_nor_flip() -> None:
    model = nn.Sequential(nn.LayerNorm(512), AdaNorm(512, k=0.0))
    with monitor_outliers(model, k=0.0) as monitor:
        model(spiked(1, 512, spike=40.0))
    for record in monitor.report():
        assert record.largest > 10
        assert (record.above_peak, record.above_flip, record.flipped) == (0.0, 0.0, 0.0)


def test_an_eps_that_is_a_whole_number_counts() -> None:
    model = nn.Sequential(nn.LayerNorm(512, eps=0), AdaNorm(512, eps=0))
    with monitor_outliers(model) as monitor:
        model[0](1e-9 * spiked(1, 512, spike=40.0))
        model[1](1e-9 * spiked(1, 512, spike=40.0))
    assert [record.above_flip for record in monitor.report()] == [1 / 512] * 2


def test_models_that_are_not_converted_yet_are_watched() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), LayerNormSimple(512), NoNorm())
    nn.init.constant_(model[1].weight, 7.0)  # type: ignore[arg-type]
    with monitor_outliers(model) as monitor:
        model(torch.randn(3, 512))
    assert [record.module for record in monitor.report()] == ["1", "2", "3"]
    assert all(record.largest < 5 for record in monitor.report())  # y, not the output
    assert "largest |y|" in str(monitor).splitlines()[0]
    assert len(str(monitor).splitlines()) == 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nothing_is_left_behind_and_nothing_changes() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0), 1
    ).eval()
    x = torch.randn(2, 3, 8)
    padding = torch.tensor([[False] * 3, [False, False, True]])
    with torch.no_grad():
        with Ops() as before:
            expected = model(x, src_key_padding_mask=padding)
        with monitor_outliers(model) as monitor:
            watched = model(x, src_key_padding_mask=padding)
        with Ops() as after:
            model(x, src_key_padding_mask=padding)
    assert len(monitor.report()) == 2
    assert torch.allclose(watched[0], expected[0], atol=1e-6)
    assert after.names == before.names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_the_block_fails() -> None:
    model = nn.Sequential(AdaNorm(8))
    with pytest.raises(RuntimeError, match="stop"), monitor_outliers(model):
        raise RuntimeError("stop")
    assert not model[0]._forward_pre_hooks


def test_counting_does_not_wait_for_the_device() -> None:
    model = nn.Sequential(AdaNorm(16), nn.Linear(16, 16), nn.LayerNorm(16))
    x = torch.randn(4, 16)
    with monitor_outliers(model) as monitor, Ops() as ops:
        model(x)
        model(x)
        assert not [name for name in ops.names if "_local_scalar_dense" in name]
        monitor.report()
        assert [name for name in ops.names if "_local_scalar_dense" in name]


def test_training_is_not_disturbed() -> None:
    model = nn.Sequential(AdaNorm(16))
    x = torch.randn(4, 16, requires_grad=True)
    with monitor_outliers(model):
        output = model(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    (expected,) = torch.autograd.grad(ada_norm(x).sum(), x)
    assert torch.equal(gradient, expected)

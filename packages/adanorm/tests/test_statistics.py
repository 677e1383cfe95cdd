"""Theorem 1 of the paper, measured on models."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_adanorm import statistics
from separata_adanorm.norms import AdaNorm, ClippedLayerNorm, DetachNorm, LayerNormSimple, NoNorm
from separata_adanorm.statistics import (
    CASES,
    GradientStatistics,
    gradient_statistics,
    write_statistics,
)
from torch import Tensor, nn
from torch.nn import functional as F


def network(norm: nn.Module, width: int, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A norm between two linear maps and something to feed it, in double precision."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, width), norm, nn.Linear(width, 3)).double()
    return model, torch.randn(4, 6, 5, dtype=torch.float64)


def by_case(model: nn.Module, x: Tensor) -> dict[str, GradientStatistics]:
    records = gradient_statistics(model, lambda: model(x).square().sum())
    return {record.case: record for record in records}


def same(one: GradientStatistics, other: GradientStatistics) -> None:
    for name in ("mean_after", "variance_after"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(2, 40),
    seed=st.integers(0, 2**16),
    convention=st.sampled_from(["official", "torch"]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_theorem_1(width: int, seed: int, convention: Any, scale: float) -> None:
    model, x = network(LayerNormSimple(width, convention=convention), width, seed)
    found = by_case(model, scale * x)
    assert set(found) == set(CASES)
    standard, mean, std, both = (found[case] for case in CASES[1:])
    expected, bound = both.mean_over_s, both.variance_over_s2
    tiny = 1e-9 * (expected + bound**0.5)
    assert standard.mean_after == pytest.approx(0, abs=tiny)
    assert std.mean_after == pytest.approx(0, abs=tiny)
    assert mean.mean_after == pytest.approx(expected, abs=tiny)
    assert both.mean_after == pytest.approx(expected, abs=tiny)
    assert std.variance_after == pytest.approx(bound, rel=1e-9)
    assert both.variance_after == pytest.approx(bound, rel=1e-9)
    assert standard.variance_after <= bound * (1 + 1e-9)
    assert mean.variance_after == pytest.approx(standard.variance_after, rel=1e-6, abs=tiny**2)
    assert [record.violations for record in found.values()] == [0] * 5
    assert standard.rows == 24


@pytest.mark.parametrize(
    ("wrong", "cases"),
    [
        ({"detach_mean": False}, {"detach mean", "detach both"}),
        ({"detach_mean": True}, {"detach std"}),
        ({"detach_std": False}, {"detach std", "detach both"}),
    ],
)
def test_a_norm_that_detaches_the_wrong_statistic_is_caught(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, bool], cases: set[str]
) -> None:
    right = statistics.detach_norm
    monkeypatch.setattr(statistics, "detach_norm", lambda x, **given: right(x, **given | wrong))
    found = by_case(*network(LayerNormSimple(16), 16))
    assert {case for case, record in found.items() if record.violations} == cases
    assert all(record.violations in (0, 24) for record in found.values())


class TestRecording:
    @pytest.mark.parametrize(
        ("norm", "case"),
        [
            (LayerNormSimple(16), "standard"),
            (nn.LayerNorm(16), "standard"),
            (AdaNorm(16, C=2.0), "standard"),
            (DetachNorm(16), "detach both"),
            (DetachNorm(16, detach_mean=False), "detach std"),
            (DetachNorm(16, detach_std=False, convention="torch"), "detach mean"),
        ],
    )
    def test_the_gradient_of_a_module_is_that_of_its_case(self, norm: nn.Module, case: str) -> None:
        if isinstance(norm, nn.LayerNorm):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
        found = by_case(*network(norm, 16))
        same(found["as built"], found[case])
        others = [found[other] for other in CASES[1:] if other != case]
        assert all(found["as built"] != other for other in others)

    def test_numbers_are_those_of_autograd(self) -> None:
        model, x = network(nn.LayerNorm(8, elementwise_affine=False), 8)
        hidden = model[0](x).detach().requires_grad_()
        y = F.layer_norm(hidden, (8,))
        (g,) = torch.autograd.grad(model[2](y).square().sum(), y, retain_graph=True)
        (dx,) = torch.autograd.grad(y, hidden, g)
        record = by_case(model, x)["as built"]
        assert record.mean_before == pytest.approx(g.mean(-1).abs().mean().item())
        assert record.variance_before == pytest.approx(g.var(-1, correction=0).mean().item())
        assert record.variance_after == pytest.approx(dx.var(-1, correction=0).mean().item())

    def test_the_model_is_left_as_it_was(self) -> None:
        model, x = network(AdaNorm(8), 8)
        by_case(model, x)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_what_follows_may_work_in_place_and_the_input_may_be_data(self) -> None:
        x = torch.randn(7, 8)
        inplace = nn.Sequential(nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 2))
        plain = nn.Sequential(inplace[0], nn.ReLU(), inplace[2])
        assert by_case(inplace, x) == by_case(plain, x)

    def test_a_norm_called_twice_sums_its_rows(self) -> None:
        norm = nn.LayerNorm(5)
        model, x = nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 5), norm), torch.randn(6, 5)
        assert by_case(model, x)["standard"].rows == 12

    def test_rows_without_a_gradient_do_not_count(self) -> None:
        model, x = network(LayerNormSimple(8), 8)
        records = gradient_statistics(model, lambda: model(x)[:, :2].sum())
        assert {record.rows for record in records} == {8}

    @pytest.mark.parametrize("kind", [nn.LayerNorm, AdaNorm])
    def test_norms_of_a_shape_and_arguments_by_name(self, kind: type[nn.Module]) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = kind((3, 4))
                self.idle = nn.LayerNorm(4)

            def forward(self, x: Tensor) -> Tensor:
                output: Tensor = self.norm(**{"x" if kind is AdaNorm else "input": x})
                return output

        model = Model()
        records = gradient_statistics(model, lambda: model(torch.randn(5, 3, 4)).pow(3).sum())
        assert {record.module for record in records} == {"norm"}
        assert {record.rows for record in records} == {5}

    def test_what_is_not_finite_is_a_violation(self) -> None:
        model, x = network(LayerNormSimple(8), 8)
        x[0, :2] = torch.nan
        found = by_case(model, x)
        assert {case: record.violations for case, record in found.items() if record.violations} == (
            dict.fromkeys(CASES[1:], 2)
        )

    @pytest.mark.parametrize("norm", [NoNorm(), ClippedLayerNorm(8)])
    def test_other_norms_are_measured_too(self, norm: nn.Module) -> None:
        found = by_case(*network(norm, 8))
        assert [record.violations for record in found.values()] == [0] * 5

    def test_what_cannot_be_measured_is_said(self) -> None:
        model, x = network(LayerNormSimple(8), 8)
        with pytest.raises(ValueError, match="Linear has no layer norms"):
            gradient_statistics(nn.Linear(2, 2), lambda: x.sum())
        with pytest.raises(ValueError, match="the loss has no gradient"):
            gradient_statistics(model, lambda: model(x).sum().detach())
        with pytest.raises(ValueError, match="depends on none"):
            gradient_statistics(model, lambda: model[0](x).sum())


def test_files(tmp_path: Path) -> None:
    model, x = network(AdaNorm(8), 8)
    records = gradient_statistics(model, lambda: model(x).square().sum())
    write_statistics(records, tmp_path / "deep")
    assert (tmp_path / "deep" / "gradients.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "deep" / "gradients.csv").open()))
    assert [row["case"] for row in rows] == list(CASES)
    assert float(rows[1]["variance_over_s2"]) == records[1].variance_over_s2
    assert json.loads((tmp_path / "deep" / "gradients.json").read_text())[4]["case"] == CASES[4]

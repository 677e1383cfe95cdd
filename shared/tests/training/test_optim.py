import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.training import optim
from separata_shared.training.config import TrainConfig
from torch import nn


def test_inverse_sqrt_is_the_schedule_of_fairseq() -> None:
    # 1e-7 to 1e-3 over 4000 updates, then 1e-3 * sqrt(4000 / n).
    schedule = partial(optim.inverse_sqrt, lr=1e-3, warmup=4000, start=1e-7, floor=1e-9)
    assert schedule(0) == 1e-7
    assert schedule(2000) == pytest.approx((1e-7 + 1e-3) / 2, rel=1e-12)
    assert schedule(4000) == 1e-3
    assert schedule(16000) == pytest.approx(5e-4, rel=1e-12)
    assert schedule(10**18) == 1e-9


def test_noam_is_the_schedule_of_tensor2tensor() -> None:
    # 2 * 512^-0.5 * min(1, s / 8000) * max(s, 8000)^-0.5 has its peak 9.88e-4 at 8000.
    schedule = partial(optim.noam, lr=2 * 512**-0.5, warmup=8000)
    assert schedule(0) == 0
    assert schedule(8000) == pytest.approx(9.882118e-4, rel=1e-6)
    assert schedule(4000) == pytest.approx(schedule(8000) / 2, rel=1e-12)
    assert schedule(32000) == pytest.approx(schedule(8000) / 2, rel=1e-12)


def test_linear_and_cosine_pass_their_corners() -> None:
    for schedule in (optim.linear, optim.cosine):
        at = partial(schedule, lr=1.0, warmup=10, steps=110, start=0.2, floor=0.1)
        assert at(0) == 0.2
        assert at(5) == pytest.approx(0.6)
        assert at(10) == 1.0
        assert at(60) == pytest.approx(0.55)
        assert at(110) == pytest.approx(0.1)
        assert at(1000) == pytest.approx(0.1)


@given(
    name=st.sampled_from(["constant", "linear", "inverse_sqrt", "noam", "cosine"]),
    warmup=st.integers(1, 50),
    steps=st.integers(51, 200),
)
def test_every_schedule_rises_to_its_peak_and_never_after(
    name: str, warmup: int, steps: int
) -> None:
    config = TrainConfig(schedule=name, warmup=warmup, steps=steps, lr=0.5)  # type: ignore[arg-type]
    values = [optim.make_schedule(config)(step) for step in range(steps + 1)]
    assert all(a < b for a, b in pairwise(values[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(values[warmup:]))
    assert max(values) == values[warmup]


def test_adamw_decays_as_fairseq_does() -> None:
    # With a zero gradient Adam moves nothing, so p -= lr * wd * p is all that is left.
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    config = TrainConfig(optimizer="adamw", lr=0.1, weight_decay=0.5)
    optimizer = optim.make_optimizer(model, config)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert model.weight.item() == pytest.approx(1 - 0.1 * 0.5, rel=1e-6)


def test_predicate_decides_what_decays() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    groups = optim.parameter_groups(model, 0.1, lambda name, p: p.ndim > 1)
    assert [group["weight_decay"] for group in groups] == [0.0]
    model[0].weight.requires_grad_(True)
    groups = optim.parameter_groups(model, 0.1, lambda name, p: p.ndim > 1)
    assert [len(group["params"]) for group in groups] == [1, 3]  # type: ignore[arg-type]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_weight_decay_reaches_every_optimizer() -> None:
    model = nn.Linear(2, 2)
    for name in ("adam", "adamw", "sgd", "adagrad"):
        config = TrainConfig(optimizer=name, weight_decay=0.25)  # type: ignore[arg-type]
        (group,) = optim.make_optimizer(model, config).param_groups
        assert group["weight_decay"] == 0.25


def with_gradients(*values: float) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor([value])
    return parameters


def test_total_clip_scales_all_gradients_together() -> None:
    parameters = with_gradients(3.0, 4.0)
    assert optim.clip_total_norm(parameters, max_norm=1.0).item() == pytest.approx(5.0)
    assert [p.grad.item() for p in parameters] == pytest.approx([0.6, 0.8], rel=1e-5)  # type: ignore[union-attr]
    assert optim.clip_total_norm(parameters, max_norm=math.inf).item() == pytest.approx(1.0)
    assert [p.grad.item() for p in parameters] == pytest.approx([0.6, 0.8], rel=1e-5)  # type: ignore[union-attr]


def test_each_clip_scales_every_gradient_alone() -> None:
    # adaptive-span clips each parameter to 0.03.
    parameters = with_gradients(3.0, 0.01)
    assert optim.clip_each_norm(parameters, max_norm=0.03).item() == pytest.approx(3.0, rel=1e-4)
    assert [p.grad.item() for p in parameters] == pytest.approx([0.03, 0.01], rel=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("accumulate", 0),
        ("lr", -1.0),
        ("clip_norm", float("nan")),
        ("eps", -1e-8),
        ("betas", (0.9, 2.0)),
    ],
)
def test_configuration_names_the_wrong_key(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"train\.{key}"):
        TrainConfig(**{key: value})  # type: ignore[arg-type]

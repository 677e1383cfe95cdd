"""Which implementation "auto" means."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from separata_shared.attention import _select


@pytest.mark.parametrize(
    ("device", "dtype", "source", "return_weights", "name"),
    [
        ("cpu", torch.float32, 30, False, "eager"),
        ("cpu", torch.float32, 100, False, "sdpa"),
        ("cpu", torch.bfloat16, 100, False, "eager"),
        ("cpu", torch.bfloat16, 5000, False, "sdpa"),
        ("cuda", torch.bfloat16, 30, False, "sdpa"),
        ("cpu", torch.float32, 100, True, "reference"),
    ],
)
def test_dense(
    device: str, dtype: torch.dtype, source: int, return_weights: bool, name: str
) -> None:
    chosen = _select.dense(device=device, dtype=dtype, source=source, return_weights=return_weights)
    assert chosen == name


SUPPORTED = dict.fromkeys(("native", "blocked", "eager", "reference"))


def topk(source: int, most_keys: int | None, **options: Any) -> str:
    return _select.topk(
        **{
            "device": "cpu",
            "dtype": torch.float32,
            "target": source,
            "source": source,
            "most_keys": most_keys,
            "unsupported": {**SUPPORTED, "triton": "there is no GPU"},
            **options,
        }
    )


def test_topk_on_a_cpu() -> None:
    no_compiler = {**SUPPORTED, "native": "there is no compiler"}
    assert topk(4096, 8) == "native"
    assert topk(4096, None) == "native"
    assert topk(4096, 8, unsupported=no_compiler) == "blocked"
    assert topk(5000, 8, unsupported=no_compiler) == "blocked"
    assert topk(4096, 4000, unsupported=no_compiler) == "eager"
    assert topk(30, 8, unsupported=no_compiler) == "eager"
    assert topk(4096, 8, unsupported={"eager": None}) == "eager"


def test_topk_on_a_gpu() -> None:
    everything = dict.fromkeys(("triton", "blocked", "eager"))
    assert topk(4096, 8, device="cuda", unsupported=everything) == "triton"
    without = {**everything, "triton": "it is not installed"}
    assert topk(4096, 8, device="cuda", unsupported=without) == "blocked"
    assert topk(512, 8, device="cuda", unsupported=without) == "eager"


@pytest.fixture(scope="module")
def choose() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "choose.py"
    spec = importlib.util.spec_from_file_location("choose", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_limits_are_those_that_were_measured(choose: ModuleType) -> None:
    measured = choose.limits(choose.read(choose.RESULTS / "choice-cpu.csv"), "cpu")
    assert measured == _select.TOPK_LIMITS


def test_limits_follow_from_measurements(choose: ModuleType) -> None:
    times = {
        # k: native, blocked, eager
        4: (1.0, 2.0, 3.0),
        8: (1.0, 4.0, 3.0),
        16: (5.0, 4.0, 3.0),
        32: (1.0, 2.0, 3.0),  # beyond one that was lost: not used
    }
    rows = [
        {
            "phase": "training",
            "dtype": "float32",
            "source": "64",
            "top_k": str(k),
            "implementation": name,
            "median_ms": str(time),
        }
        for k, row in times.items()
        for name, time in zip(("native", "blocked", "eager"), row, strict=True)
    ]
    assert choose.limits(rows, "cpu") == {
        ("cpu", "training", "float32"): {"native": {64: 8}, "blocked": {64: 4}}
    }

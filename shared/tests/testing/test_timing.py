import ctypes
import subprocess
import sys
import weakref
from itertools import count
from typing import Any

import pytest
import torch
from separata_shared.testing import timing
from torch import Tensor


def test_each_competitor_is_timed_once_a_round_in_turn() -> None:
    calls: list[str] = []
    ticks = count()
    competitors = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleave(competitors, lambda: float(next(ticks)), rounds=6, seconds=1e9)
    assert times == {"a": [1.0] * 6, "b": [1.0] * 6}  # one tick passes between two readings
    assert "".join(calls).endswith("ab" * 6)


def test_no_round_begins_after_the_time_but_five_are_made() -> None:
    ticks = count()
    times = timing.interleave(
        {"a": lambda: None}, lambda: float(next(ticks)), rounds=100, seconds=0.0
    )
    assert len(times["a"]) == 5


def test_a_short_call_is_repeated_and_its_time_is_that_of_one_call() -> None:
    now = 0.0

    def call() -> None:
        nonlocal now
        now += timing.SAMPLE_SECONDS / 4

    times = timing.interleave({"a": call}, lambda: now, rounds=1, seconds=1.0)
    assert times["a"] == pytest.approx([timing.SAMPLE_SECONDS / 4])
    assert now == pytest.approx(6 * timing.SAMPLE_SECONDS / 4)  # twice to warm up, then four times


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    assert timing.ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0)


def test_precision_is_restored_also_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    inside = []

    def fail() -> None:
        with timing.matmul_precision("medium"):
            inside.append(torch.get_float32_matmul_precision())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == ["medium"]
    assert torch.get_float32_matmul_precision() == before


class Holder(torch.autograd.Function):
    """Keeps one tensor as torch asks for and one behind its back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.hidden = torch.ones(100, dtype=torch.float64)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_saved_bytes_count_each_storage_once_and_hidden_tensors_too() -> None:
    x = torch.ones(10, requires_grad=True)
    y = torch.ones(10)
    assert timing.saved_bytes(lambda: x * y) == 40  # x needs y only
    assert timing.saved_bytes(lambda: (x * y) * y[:5].sum()) == 40 + 4
    assert timing.saved_bytes(lambda: x * x) == 40
    held = timing.saved_bytes(lambda: Holder.apply(x))  # type: ignore[no-untyped-call]
    assert held == 40 + 800


def test_saved_tensors_are_free_once_they_are_counted() -> None:
    x = torch.ones(10, requires_grad=True)
    outputs = []

    def forward() -> Tensor:
        output = x.softmax(0)  # which waits for its own backward
        outputs.append(weakref.ref(output))
        return output

    assert timing.saved_bytes(forward) == 40
    assert outputs[0]() is None


FAULTS = """
import resource, torch
from separata_shared.testing import timing
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with timing.kept_memory(ready={ready}, limit={limit}):
    inside = faults()
print(inside, faults(), resource.getrlimit(resource.RLIMIT_DATA)[0])
"""
PAGES = 2**24 * 4 // 4096  # of one of the five buffers


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_kept_memory_is_not_faulted_in_again() -> None:
    script = FAULTS.format(ready=2**29, limit=2**34)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    inside, after, limit = map(int, result.stdout.split())
    assert inside < PAGES
    assert limit != 2**34
    if hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        assert after > inside  # huge pages may make them few


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_beyond_the_limit_is_refused() -> None:
    script = FAULTS.format(ready=2**29, limit=2**28)
    failed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "alloc" in failed.stderr.lower()


def test_the_speeds_of_the_machine_are_those_of_the_clock() -> None:
    ticks = count()
    # A sample is one call and one tick long: 2 * 2048^3 operations, 2 * 128 MiB in a second.
    clock = lambda: float(next(ticks))  # noqa: E731
    assert timing.copy_bandwidth("cpu", clock) == 2**28

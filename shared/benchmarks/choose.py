"""Measures from which k on the gather of kept keys loses against whole matrices of scores.

    python choose.py

Writes what it measured, and prints the constants of ``separata_shared.attention._select`` that
follow from it. A test compares the constants with the committed file. ``attention.py`` checks
that the implementations are right.
"""

import csv
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from separata_shared.attention import topk_attention
from separata_shared.attention._select import TOPK
from separata_shared.files import atomic_write
from separata_shared.testing import timing

Row = dict[str, Any]
Limits = dict[tuple[str, str, str], dict[str, dict[int, int]]]

RESULTS = Path(__file__).parent / "results"
# Forward and backward of as many queries as keys; and forward of one query, as with a cache.
SIZES = {
    "training": (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "decoding": (32, 128, 512, 2048, 8192),
}
TOP_K = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Rows of scores: enough for every size, few enough for the whole grid.
ROWS = {"training": 8192, "decoding": 128}
WIDTH = 64


def main(
    device: Literal["cpu", "cuda"] | None = None,
    rounds: int = 7,
    seconds: float = 3.0,
    output: Path | None = None,
) -> None:
    """Time the implementations of top-k attention and print which one to choose.

    Args:
        device: Where to run; by default the GPU where there is one.
        rounds: Timings of each implementation.
        seconds: Time for a case after which no further round begins; there are five at least.
        output: CSV file; by default results/choice-DEVICE.csv beside this script.
    """
    torch.set_num_threads(1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    clock = timing.make_clock(device, 1)
    machine = timing.environment(device, 1)
    interleave = partial(timing.interleave, clock=clock, rounds=rounds, seconds=seconds)
    rows = []
    for phase, sizes in SIZES.items():
        for dtype in ("float32", "bfloat16"):
            for source in sizes:
                inputs = make_inputs(phase, source, getattr(torch, dtype), device)
                for k in (k for k in TOP_K if 2 * k <= source):
                    competitors = calls(inputs, k, phase == "training")
                    case = {"phase": phase, "dtype": dtype, "source": source, "top_k": k}
                    for name, times in interleave(competitors).items():
                        median, low, high = (round(1e3 * x, 3) for x in timing.spread(times))
                        numbers = {"median_ms": median, "p20_ms": low, "p80_ms": high}
                        rows.append({**machine, **case, "implementation": name, **numbers})
                        print(*case.values(), name, median, "ms", flush=True)
    path = output or RESULTS / f"choice-{device}.csv"
    write(path, rows)
    print(f"written to {path}")
    for (_, phase, dtype), implementations in limits(read(path), device).items():
        print(f'("{device}", "{phase}", "{dtype}"): {{')
        for name, table in implementations.items():
            print(f'    "{name}": {table},')
        print("},")


def make_inputs(
    phase: str, source: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    """Random query, key and value."""
    target = source if phase == "training" else 1
    heads = max(ROWS[phase] // target, 1)
    lengths = (target, source, source)
    return tuple(
        torch.randn(1, heads, length, WIDTH, device=device, dtype=dtype) for length in lengths
    )


def calls(inputs: tuple[torch.Tensor, ...], k: int, training: bool) -> dict[str, timing.Call]:
    """The implementations that can serve the call, by name."""
    inputs = tuple(x.detach().requires_grad_(training) for x in inputs)

    def run(name: Any) -> None:
        output = topk_attention(*inputs, top_k=k, impl=name)
        if training:
            torch.autograd.grad(output, inputs, inputs[0].detach())

    found: dict[str, timing.Call] = {}
    for name in TOPK:
        try:
            run(name)
        except ValueError:  # cannot serve this device
            continue
        found[name] = partial(run, name)
    return found


def limits(rows: list[Row], device: str) -> Limits:
    """Up to which k each implementation is faster than all that come after it, from a size on.

    Args:
        rows: What was measured.
        device: Where.
    """
    times: dict[tuple[str, str], dict[int, dict[int, dict[str, float]]]] = {}
    for row in rows:
        sizes = times.setdefault((row["phase"], row["dtype"]), {})
        case = sizes.setdefault(int(row["source"]), {}).setdefault(int(row["top_k"]), {})
        case[row["implementation"]] = float(row["median_ms"])
    return {
        (device, phase, dtype): {
            name: changes({size: most_keys(cases, name) for size, cases in sorted(sizes.items())})
            for name in TOPK[:-1]
            if any(name in times for cases in sizes.values() for times in cases.values())
        }
        for (phase, dtype), sizes in times.items()
    }


def changes(most: dict[int, int]) -> dict[int, int]:
    """The sizes from which on the limit is another one than for the size before."""
    before = [0, *most.values()]
    return {
        size: limit
        for (size, limit), last in zip(most.items(), before, strict=False)
        if limit != last
    }


def most_keys(cases: dict[int, dict[str, float]], name: str) -> int:
    """The largest k up to which an implementation is the fastest of those from it on.

    Args:
        cases: Times of the implementations by k.
        name: The implementation.
    """
    most = 0
    for k, times in sorted(cases.items()):
        rest = [times[other] for other in TOPK[TOPK.index(name) :] if other in times]
        if name not in times or times[name] > min(rest):
            break
        most = k
    return most


def write(path: Path, rows: list[Row]) -> None:
    """Write rows as CSV."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """Read rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    with timing.kept_memory(ready=2**30, limit=12 * 2**30):
        auto_cli(main)

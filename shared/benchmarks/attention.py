"""Times attention operations against dense attention, after checking that they are right.

    python attention.py --suites '[main]'

The competitors take turns in one process; ``separata_shared.testing.timing`` explains the clocks.
Ratios go to two baselines of the same rounds: torch's SDPA as users call it, and the best dense
form, the fastest of SDPA and product-softmax-product, each with the default and with the ``medium``
setting of float32 products. What deviates from its reference is not timed, and the exit status
is 1.
"""

import csv
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from _cases import Case, goals, suite
from _competitors import ALL, DENSE, Competitor, competitors
from _operation import TOLERANCES, Operation
from _step import Step
from jsonargparse import auto_cli
from separata_shared.files import atomic_write
from separata_shared.testing import timing

Row = dict[str, Any]
Times = dict[str, list[float]]
# Bytes taken before timings, and bytes beyond which allocations fail rather than fill the machine.
READY, MEMORY = 2 * 2**30, 12 * 2**30
# What a competitor that is not timed leaves empty.
BLANK: Row = dict.fromkeys(
    ("median_ms", "p20_ms", "p80_ms", "to_sdpa", "to_best_dense", "best_dense", "saved_mib")
)


def main(
    suites: list[Literal["quick", "main", "full"]] = ["quick", "main"],  # noqa: B006
    device: Literal["cpu", "cuda"] | None = None,
    threads: int = 1,
    rounds: int = 15,
    seconds: float = 20.0,
    only: list[str] | None = None,
    output: Path | None = None,
) -> None:
    """Time top-k attention and dense attention, print tables and write a CSV of each suite.

    Args:
        suites: ``quick`` is one small case, ``main`` the cases that have goals, ``full`` lengths
            of 128 to 8192, k of 4 to 128, both precisions, causal and not.
        device: Where to run; by default the GPU where there is one.
        threads: Threads on a CPU; with more than one, times are wall time.
        rounds: Timings of each competitor, two or more.
        seconds: Time for a case after which no further round begins; there are five at least.
        only: Names of those that are timed beside the dense forms; by default all.
        output: Folder of the CSV files; by default results beside this script.
    """
    unknown = sorted(set(only or ()) - ALL.keys())
    if unknown:
        sys.exit(f"only: {', '.join(unknown)} is none of {', '.join(ALL)}")
    torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    clock = timing.make_clock(device, threads)
    interleave = partial(timing.interleave, clock=clock, rounds=rounds, seconds=seconds)
    for name in [name for name, competitor in ALL.items() if competitor.missing]:
        print(f"{name} is not timed: its package is not installed")
    machine = timing.environment(device, threads)
    machine["copy_gb_s"] = round(timing.copy_bandwidth(device, clock) / 1e9, 1)
    speeds = {
        dtype: timing.peak_flops(getattr(torch, dtype), device, clock) for dtype in TOLERANCES
    }
    wrong = []
    for name in suites:
        stem = f"attention-{device}-{name}" + (f"-{threads}-threads" if threads > 1 else "")
        folder = output or Path(__file__).parent / "results"
        rows: list[Row] = []
        for case in suite(name, device):
            machine["gemm_gflop_s"] = round(speeds[case.dtype] / 1e9, 1)
            timed = {
                name: competitor
                for name, competitor in competitors(case, device).items()
                if only is None or name in DENSE or name.removesuffix(" medium") in only
            }
            found, refused = measure(case, timed, device, machine, interleave)
            show(case, found)
            rows += found
            wrong += refused
            write(folder / f"{stem}.csv", rows)  # after each case, since a suite takes long
        if name == "main":
            write(folder / f"{stem}-goals.csv", compare_with_goals(rows, device))
        print(f"written to {folder / stem}.csv")
    if wrong:
        sys.exit("not timed, since their results are wrong:\n" + "\n".join(wrong))


def measure(
    case: Case,
    timed: Mapping[str, Competitor],
    device: str,
    machine: Row,
    interleave: Callable[..., Times],
) -> tuple[list[Row], list[str]]:
    """Check and time competitors of a case; also name those that are wrong."""
    problem = Step(case, device) if case.mode == "step" else Operation(case, device)
    common = {**machine, **case.columns()}
    floor = problem.floor(1e9 * machine["gemm_gflop_s"], 1e9 * machine["copy_gb_s"])
    common["floor_ms"] = None if floor is None else round(1e3 * floor, 4)
    notes: dict[str, str] = {}
    saved, runs, wrong = {}, {}, []
    for name, competitor in timed.items():
        try:
            slow = case.scores > competitor.most_scores
            notes[name] = f"slow: never above {competitor.most_scores} scores" if slow else ""
            deviation = 0.0 if slow else problem.deviation(competitor)
        except ValueError as error:  # from topk_attention: this implementation cannot serve
            notes[name] = str(error)
            continue
        if not deviation <= 1.0:  # NaN as well
            notes[name] = f"wrong: deviates {deviation:.1f} times as far as is allowed"
            if competitor.precision == "highest":  # on some CPUs "medium" rounds to bfloat16
                wrong.append(f"{case}: {name}")
        if not notes[name]:
            saved[name] = problem.saved_mib(competitor)
            runs[name] = problem.run(competitor)
    with timing.kept_memory(ready=READY, limit=MEMORY):
        times = interleave(runs)
    rows = []
    for name, note in notes.items():
        row = numbers(name, times) | {"saved_mib": saved[name]} if name in times else {}
        rows.append({**common, "implementation": name, **BLANK, **row, "note": note})
    return rows, wrong


def numbers(name: str, times: Times) -> Row:
    """Median and spread in milliseconds, and the median ratios to both baselines."""
    best = min((x for x in DENSE if x in times), key=lambda x: statistics.median(times[x]))
    median, low, high = (round(1e3 * x, 3) for x in timing.spread(times[name]))
    return {
        "median_ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "to_sdpa": round(timing.ratio(times[name], times["sdpa"]), 3),
        "to_best_dense": round(timing.ratio(times[name], times[best]), 3),
        "best_dense": best,
    }


def show(case: Case, rows: list[Row]) -> None:
    """Print the table of a case."""
    floor = rows[0]["floor_ms"]
    print(f"\n{case}" + (f", at least {floor} ms" if floor else ""))
    for row in rows:
        print(f"  {row['implementation']:<16}", end="")
        if row["note"]:
            print(f"not timed: {row['note']}")
            continue
        print(
            f"{row['median_ms']:>10.2f} ms ({row['p20_ms']:.2f} to {row['p80_ms']:.2f})"
            f"{row['to_sdpa']:>8.3f} x SDPA{row['to_best_dense']:>8.3f} x {row['best_dense']}"
            + (f"{row['saved_mib']:>8.1f} MiB saved" if row["saved_mib"] else "")
        )
    sys.stdout.flush()


def compare_with_goals(rows: list[Row], device: str) -> list[Row]:
    """Print and return one line for each goal."""
    lines: list[Row] = []
    layout = "{:<44}{:<14}{:>9}{:>7}{:>15}{:>7}{:>10}{:>11}"
    titles = ("case", "", "to SDPA", "goal", "to best dense", "goal", "to floor", "MiB saved")
    print("\n" + layout.format(*titles))
    for goal in goals(device):
        wanted = {**goal.case.columns(), "implementation": goal.implementation}
        row = next((row for row in rows if wanted.items() <= row.items()), BLANK)
        floored = row["median_ms"] and row["floor_ms"]
        line = {
            "case": str(goal.case),
            "implementation": goal.implementation,
            "to SDPA": row["to_sdpa"],
            "goal": goal.to_sdpa,
            "to best dense": row["to_best_dense"],
            "its goal": goal.to_best_dense,
            "to floor": round(row["median_ms"] / row["floor_ms"], 1) if floored else None,
            "MiB saved": row["saved_mib"],
        }
        lines.append(line)
        print(layout.format(*("" if value is None else value for value in line.values())))
    return lines


def write(path: Path, rows: list[Row]) -> None:
    """Write the rows as CSV."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    auto_cli(main)

"""Times attention operations against dense attention, after checking that they are right.

    python attention.py --sizes '[512, 1024]' --top_k '[8, 16]'

The competitors take turns in one process; a time is process CPU time, so neighbours on a shared
machine disturb little, and wall time on a GPU, after synchronisation. The ratio is to the faster
dense implementation of the same round. An implementation that deviates from the reference is not
timed, and the exit status is 1.
"""

import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from separata_shared.attention import dense_attention, topk_attention
from separata_shared.files import atomic_write
from torch import Tensor

Call = Callable[[], Tensor]
Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the largest number: float32 sums in another order; half precision rounds to 8 bits or more.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
DENSE = ("eager", "sdpa")


def main(
    sizes: list[int] = [512, 1024],  # noqa: B006
    forward_sizes: list[int] = [],  # noqa: B006
    top_k: list[int] = [8],  # noqa: B006
    implementations: list[Literal["reference", "eager", "blocked"]] = ["eager", "blocked"],  # noqa: B006
    batch: int = 1,
    heads: int = 1,
    width: int = 64,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    threads: int = 1,
    rounds: int = 7,
    output: Path | None = None,
) -> None:
    """Time top-k attention and dense attention, print the table and write it as CSV.

    Args:
        sizes: Sequence lengths, timed forward and forward with backward.
        forward_sizes: Further sequence lengths, timed forward only.
        top_k: Numbers of kept keys.
        implementations: Implementations of top-k attention.
        batch: Sentences.
        heads: Heads.
        width: Width of a head.
        dtype: Precision of the inputs.
        device: Where to run, such as cpu; by default the accelerator where there is one.
        threads: Threads on a CPU.
        rounds: Timings of each competitor.
        output: CSV file; by default results/attention-DEVICE-DTYPE.csv beside this script.
    """
    torch.set_num_threads(threads)
    device = device or default_device()
    rows: list[Row] = []
    failed: list[str] = []
    cases = [(n, mode) for n in sizes for mode in ("forward", "backward")]
    cases += [(n, "forward") for n in forward_sizes]
    for n, mode in cases:
        shape = (batch, heads, n, width)
        tensors = [torch.randn(shape, device=device, dtype=DTYPES[dtype]) for _ in range(3)]
        for k in top_k:
            competitors = {f"dense {name}": dense(tensors, name) for name in DENSE}
            for name in implementations:
                call = topk(tensors, name, k)
                deviation = compare(call, topk(tensors, "reference", k), tensors, n <= 2048)
                if deviation <= TOLERANCES[dtype]:
                    competitors[f"topk {name}"] = call
                else:
                    failed.append(f"topk {name} n={n} k={k}: deviates by {deviation:.2g}")
            times = measure(competitors, tensors, mode, rounds, device)
            fixed = {**environment(device, threads), "shape": "x".join(map(str, shape))}
            fixed |= {"dtype": dtype, "k": k, "mode": mode}
            rows += [fixed | row for row in summary(times)]
            for row in rows[-len(times) :]:
                print_row(row)
    path = output or Path(__file__).parent / "results" / f"attention-{device}-{dtype}.csv"
    write(path, rows)
    if failed:
        sys.exit("not timed, since they are wrong:\n" + "\n".join(failed))


def default_device() -> str:
    """The accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def dense(tensors: list[Tensor], name: Any) -> Call:
    """A dense competitor."""
    return lambda: tensor(dense_attention(*tensors, impl=name))


def topk(tensors: list[Tensor], name: Any, k: int) -> Call:
    """A top-k competitor."""
    return lambda: tensor(topk_attention(*tensors, top_k=k, impl=name))


def tensor(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output alone; no competitor returns weights."""
    assert isinstance(output, Tensor)
    return output


def compare(call: Call, reference: Call, tensors: list[Tensor], backward: bool) -> float:
    """Largest deviation of output and gradients, as a share of the largest number."""
    worst = 0.0
    for found, wanted in zip(
        run(call, tensors, backward), run(reference, tensors, backward), strict=True
    ):
        # Where two scores differ by a rounding the selections may differ, in single rows. A wrong
        # implementation is wrong nearly everywhere.
        deviation = (found - wanted).float().abs().flatten(0, -2).amax(-1)
        worst = max(worst, float(deviation.quantile(0.99) / wanted.float().abs().max()))
    return worst


def run(call: Call, tensors: list[Tensor], backward: bool) -> list[Tensor]:
    """The output, and with ``backward`` the gradients of its sum weighted by the query."""
    for x in tensors:
        x.requires_grad_(backward)
    output = call()
    if not backward:
        return [output]
    gradients = torch.autograd.grad(output, tensors, tensors[0].detach())
    return [output.detach(), *gradients]


def measure(
    competitors: dict[str, Call], tensors: list[Tensor], mode: str, rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each competitor in each round; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds + 1):
        for name, call in competitors.items():
            start = clock(device)
            run(call, tensors, mode == "backward")
            times[name].append(clock(device) - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def clock(device: str) -> float:
    """Seconds that count on this device."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def summary(times: dict[str, list[float]]) -> list[Row]:
    """Median and spread in milliseconds, and the median ratio to the best dense competitor."""
    baseline = [min(seconds) for seconds in zip(*(times[f"dense {x}"] for x in DENSE), strict=True)]
    rows = []
    for name, seconds in times.items():
        ratios = [own / best for own, best in zip(seconds, baseline, strict=True)]
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        rows.append(
            {
                "implementation": name,
                "median_ms": round(1e3 * statistics.median(seconds), 3),
                "p20_ms": round(1e3 * fifths[0], 3),
                "p80_ms": round(1e3 * fifths[-1], 3),
                "ratio_to_dense": round(statistics.median(ratios), 3),
            }
        )
    return rows


def environment(device: str, threads: int) -> Row:
    """What the numbers depend on besides the case."""
    name = processor()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, **versions, "threads": threads}


def processor() -> str:
    """The name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def print_row(row: Row) -> None:
    """Print one line of the table."""
    print(
        f"{row['shape']:>16} {row['dtype']} k={row['k']:<4} {row['mode']:<9}"
        f"{row['implementation']:<16}{row['median_ms']:>10.2f} ms"
        f"  ({row['p20_ms']:.2f} to {row['p80_ms']:.2f}){row['ratio_to_dense']:>8.2f} x dense",
        flush=True,
    )


def write(path: Path, rows: list[Row]) -> None:
    """Write the rows as CSV."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path}")


if __name__ == "__main__":
    auto_cli(main)

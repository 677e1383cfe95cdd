"""Times the norms against torch's LayerNorm with gain and bias, after checking that they are right.

    python norms.py --widths '[512, 1024]' --dtype bfloat16

The competitors take turns in one process; a time is process CPU time where one thread computes. A
ratio is the median over the rounds of the time divided by that of the baseline in the same round.
What deviates from the reference in float64 is not timed, and the exit status is 1. The last case is
a whole training step of the 6+6 Transformer with AdaNorm and with LayerNorm in every place.
"""

import csv
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from separata_adanorm.config import ModelConfig
from separata_adanorm.model import build_model
from separata_adanorm.norms import ada_norm, add_ada_norm
from separata_shared.files import atomic_write
from separata_shared.testing import timing
from torch import Tensor, nn
from torch.nn import functional as F

Outputs = tuple[Tensor, ...]
Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the largest number: float32 sums in another order; half precision rounds to 8 bits or more.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
# Largest ratio to the baseline that was promised, by operation and mode, in float32.
GOALS = {
    ("norm", "forward"): 1.0,
    ("norm", "backward"): 0.85,
    ("residual", "forward"): 0.8,
    ("residual", "backward"): 0.8,
    ("step", "backward"): 1.0,
}
SENTENCES, LENGTH, VOCABULARY = 16, 32, 10149


@timing.kept_memory(ready=2**30)
def main(
    rows: int = 8192,
    widths: list[int] = [512, 1024],  # noqa: B006
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    threads: int = 1,
    rounds: int = 21,
    seconds: float = 60.0,
    with_compiled: bool = True,
    with_step: bool = True,
    output: Path | None = None,
) -> None:
    """Time the norms, print the table and write it as CSV.

    Args:
        rows: Rows of a tensor.
        widths: Numbers in a row.
        dtype: Precision of the inputs.
        device: Where to run, such as cpu; by default the accelerator where there is one.
        threads: Threads on a CPU.
        rounds: Timings of each competitor.
        seconds: Time after which a case begins no further round.
        with_compiled: Also time the formula through torch.compile.
        with_step: Also time a training step of a Transformer.
        output: CSV file; by default results/norms-DEVICE-DTYPE.csv beside this script.
    """
    torch.set_num_threads(threads)
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else accelerator.type
    clock = timing.make_clock(device, threads)
    measure = partial(timing.interleave, clock=clock, rounds=rounds, seconds=seconds)
    table: list[Row] = []
    failed: list[str] = []

    def case(operation: str, mode: str, shape: str, calls: Mapping[str, timing.Call]) -> None:
        times = measure(calls)
        fixed = {**timing.environment(device, threads), "dtype": dtype, "shape": shape}
        for name, values in times.items():
            baseline, ours = list(times)[:2]
            goal = GOALS[operation, mode] if name == ours else None
            table.append({**fixed, **numbers(operation, mode, name, values, times[baseline], goal)})
            show(table[-1])

    for width in widths:
        for operation, all_calls in operations(width, device, with_compiled).items():
            tensors = inputs(rows, width, device, DTYPES[dtype])
            calls = {}
            for name, call in all_calls.items():
                deviation = compare(operation, name, call, tensors)
                if deviation <= TOLERANCES[dtype]:
                    calls[name] = call
                else:
                    failed.append(f"{operation} {name} width={width}: deviates by {deviation:.2g}")
            for mode in ("forward", "backward"):
                ready = {n: partial(run, c, tensors, mode == "backward") for n, c in calls.items()}
                case(operation, mode, f"{rows}x{width}", ready)
    if with_step:
        case("step", "backward", f"{SENTENCES}x{LENGTH}", steps(device))
    write(output or Path(__file__).parent / "results" / f"norms-{device}-{dtype}.csv", table)
    if failed:
        sys.exit("not timed, since they are wrong:\n" + "\n".join(failed))


def inputs(rows: int, width: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows, residual, gain, bias and two upstream gradients."""
    torch.manual_seed(0)
    shapes = {n: [rows, width] for n in ("x", "residual", "grad", "grad_total")}
    shapes |= {n: [width] for n in ("weight", "bias")}
    return {
        name: torch.randn(shape, device=device).to(dtype).requires_grad_("grad" not in name)
        for name, shape in shapes.items()
    }


def operations(
    width: int, device: str, with_compiled: bool
) -> dict[str, dict[str, Callable[[dict[str, Tensor]], Outputs]]]:
    """Competitors by operation: the baseline, ours, which has a goal, and others."""
    fast = "native" if device == "cpu" else "triton"

    def layer_norm(t: dict[str, Tensor]) -> Outputs:
        return (F.layer_norm(t["x"], (width,), t["weight"], t["bias"]),)

    def add_layer_norm(t: dict[str, Tensor]) -> Outputs:
        total = t["x"] + t["residual"]
        return total, F.layer_norm(total, (width,), t["weight"], t["bias"])

    def norm(t: dict[str, Tensor], impl: Any) -> Outputs:
        return (ada_norm(t["x"], impl=impl),)

    def add_norm(t: dict[str, Tensor], impl: Any) -> Outputs:
        return add_ada_norm(t["x"], t["residual"], impl=impl)

    compiled = {"ada_norm compiled": torch.compile(partial(norm, impl="reference"))}
    return {
        "norm": {
            "layer_norm": layer_norm,
            f"ada_norm {fast}": partial(norm, impl=fast),
            "layer_norm without affine": lambda t: (F.layer_norm(t["x"], (width,)),),
            "ada_norm reference": partial(norm, impl="reference"),
            **(compiled if with_compiled else {}),
            "ada_norm eager": partial(norm, impl="eager"),
        },
        "residual": {
            "add, layer_norm": add_layer_norm,
            f"add_ada_norm {fast}": partial(add_norm, impl=fast),
            "add_ada_norm eager": partial(add_norm, impl="eager"),
        },
    }


def run(
    call: Callable[[dict[str, Tensor]], Outputs], tensors: dict[str, Tensor], backward: bool
) -> list[Tensor]:
    """The outputs; with ``backward`` also the gradients of whatever they depend on."""
    outputs = call(tensors)
    if not backward:
        return list(outputs)
    upstream = [tensors["grad_total"], tensors["grad"]][-len(outputs) :]
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
    return [t for t in (*outputs, *gradients) if t is not None]


def compare(
    operation: str,
    name: str,
    call: Callable[[dict[str, Tensor]], Outputs],
    tensors: dict[str, Tensor],
) -> float:
    """Largest deviation from the reference in float64, as a share of the largest number."""
    if "ada_norm" not in name:
        return 0.0
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    if operation == "norm":
        wanted = run(lambda t: (ada_norm(t["x"], impl="reference"),), exact, True)
    else:
        wanted = run(lambda t: add_ada_norm(t["x"], t["residual"], impl="reference"), exact, True)
    worst = 0.0
    for found, expected in zip(run(call, tensors, True), wanted, strict=True):
        deviation = (found.detach() - expected.detach()).abs().max() / expected.abs().max()
        worst = max(worst, deviation.item())
    return worst


def steps(device: str) -> dict[str, timing.Call]:
    """A training step of the German-English model with either norm in every place.

    Both models hold the same parameters in memory, since where these lie changes times by more than
    the norms take.
    """
    torch.manual_seed(0)
    baseline, ours = (transformer(norm).to(device) for norm in ("layer_norm", "ada_norm"))
    shared = baseline.state_dict(keep_vars=True)
    ours.load_state_dict({name: shared[name] for name in ours.state_dict()}, assign=True)
    optimizer = torch.optim.Adam(baseline.parameters(), fused=True)
    tokens = torch.randint(4, VOCABULARY, (3, SENTENCES, LENGTH), device=device)

    def step(model: nn.Module) -> None:
        optimizer.zero_grad()
        logits = model(tokens[0], tokens[1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[2].flatten(), label_smoothing=0.1)
        torch.autograd.backward(loss)
        optimizer.step()

    return {"layer_norm": partial(step, baseline), "ada_norm": partial(step, ours)}


def transformer(norm: Any) -> nn.Module:
    """The German-English model with this norm in every place."""
    return build_model(
        ModelConfig(
            hidden_width=1024,
            num_heads=4,
            norm=norm,
            embeddings="joint",
            source_vocabulary_size=VOCABULARY,
            target_vocabulary_size=VOCABULARY,
        )
    )


def numbers(
    operation: str,
    mode: str,
    name: str,
    times: list[float],
    baseline: list[float],
    goal: float | None,
) -> Row:
    """The timings of a competitor as a line of the table."""
    median, low, high = timing.spread(times)
    return {
        "operation": operation,
        "mode": mode,
        "implementation": name,
        "median_ms": round(1e3 * median, 3),
        "p20_ms": round(1e3 * low, 3),
        "p80_ms": round(1e3 * high, 3),
        "ratio": round(timing.ratio(times, baseline), 3),
        "goal": goal,
    }


def show(row: Row) -> None:
    """Print one line of the table."""
    goal = "" if row["goal"] is None else f"  goal {row['goal']}"
    print(
        f"{row['shape']:>10} {row['dtype']} {row['operation']:<9}{row['mode']:<9}"
        f"{row['implementation']:<27}{row['median_ms']:>10.2f} ms"
        f"  ({row['p20_ms']:.2f} to {row['p80_ms']:.2f}){row['ratio']:>8.2f} x{goal}",
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

"""Times the graph layer against the authors' form and torch_geometric, after checking all of them.

    python graph_layer.py --triples subkg_triples.npz

Sizes are those of KBRD's graph: 64,362 nodes, 358,086 edges, 35 relations. Without ``--triples``
(head, relation, tail) a graph of these sizes is made. The competitors take turns in one process; a
time is process CPU time where one thread computes. A ratio is the median over the rounds of the
time divided by that of the baseline in the same round. What deviates from the equations in float64
is not timed, and the exit status is 1. The peak memory is that of a process of its own.
torch_geometric (2.8.1) takes part where it is installed.
"""

import csv
import importlib.util
import multiprocessing
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from separata_kbrd.edges import EdgeIndex, neighbour_sum
from separata_kbrd.graph import edge_list
from separata_kbrd.model import Recommender, RelationalGraphLayer, initialise_uniform
from separata_kbrd.pairs import RecommenderBatch
from separata_kbrd.recommendation import recommendation_step
from separata_kbrd.reference import relational_sum as equations
from separata_kbrd.relational import relational_sum
from separata_shared.files import atomic_write
from separata_shared.testing import timing
from torch import Tensor

NODES, RELATIONS, EDGES = 64362, 35, 358086
WIDTH, BASES = 128, 8
SELF_LOOP, THRESHOLD = 86, 1000  # of KBRD's triples and its filter
# Of the largest number: ours, and of the others, whose float32 sums over all nodes round more.
TOLERANCE, THEIR_TOLERANCE = 1e-5, 1e-4
COLUMNS = 16  # of the vectors that the equations compute at a time
BASELINE, RGCN = "authors' form", "torch_geometric RGCNConv"
# Largest ratio that was promised, by what it is compared with; and the largest peak in MiB.
GOALS = {
    (BASELINE, "native"): 0.16,
    (RGCN, "native"): 0.07,
    (BASELINE, "portable"): 0.6,
}
PEAK_GOAL = 1.5e9 / 2**20
OURS = ("native", "portable")
Row = dict[str, Any]
Weights = dict[str, Tensor]
Layer = Callable[[Weights], Tensor]


def main(
    triples: Path | None = None,
    threads: int = 1,
    rounds: int = 15,
    seconds: float = 240.0,
    with_peak: bool = True,
    output: Path | None = None,
) -> None:
    """Time the layer, print the table and write it as CSV.

    Args:
        triples: File with the array ``triples`` (T, 3) of KBRD's graph; default: a made graph.
        threads: Threads.
        rounds: Timings of each competitor.
        seconds: Time after which a case begins no further round.
        with_peak: Also measure the peak memory.
        output: CSV file; by default results/graph_layer-cpu.csv beside this script.
    """
    torch.set_num_threads(threads)
    edges = read_edges(triples)
    graph = "made" if triples is None else "KBRD"
    fixed = {**timing.environment("cpu", threads), "graph": graph, "edges": len(edges)}
    clock = timing.make_clock("cpu", threads)
    weights, upstream = inputs()
    wanted = exact(edges, weights, upstream)
    table: list[Row] = []
    failed, calls = [], {}
    for name, layer in competitors(edges).items():
        deviation = compare(run(layer, own(name, weights), upstream), wanted)
        if deviation <= (TOLERANCE if name in OURS else THEIR_TOLERANCE):
            calls[name] = (layer, own(name, weights))
        else:
            failed.append(f"{name}: deviates by {deviation:.2g}")
    with timing.kept_memory(ready=2**30):
        for mode in ("forward", "forward + backward"):
            ready = {
                name: partial(run, layer, tensors, upstream if mode != "forward" else None)
                for name, (layer, tensors) in calls.items()
            }
            times = timing.interleave(ready, clock, rounds=rounds, seconds=seconds)
            for name, values in times.items():
                table.append({**fixed, **numbers(mode, name, values, times)})
                show(table[-1])
    if with_peak:
        for name in ("native", "portable", "training step, native"):
            table.append({**fixed, **peak(name, edges, threads)})
            show(table[-1])
    write(output or Path(__file__).parent / "results" / "graph_layer-cpu.csv", table)
    if failed:
        sys.exit("not timed, since they are wrong:\n" + "\n".join(failed))


def read_edges(triples: Path | None) -> Tensor:
    """Edges (E, 3) as source, target and relation, of KBRD's triples or made."""
    if triples is None:
        return made_edges()
    with np.load(triples, allow_pickle=False) as stored:
        rows = stored["triples"]
    edges, _ = edge_list(rows, num_nodes=NODES, self_loop=SELF_LOOP, threshold=THRESHOLD)
    return torch.from_numpy(edges)


def made_edges() -> Tensor:
    """As many edges as KBRD's graph has, both ways, with a few nodes that have very many."""
    random = np.random.default_rng(0)
    count = 2 * EDGES
    heads, relations = (
        random.integers(NODES, size=count),
        random.integers(RELATIONS - 1, size=count),
    )
    tails = (NODES * random.random(count) ** 4).astype(np.int64)
    rows = np.unique(np.stack([heads, tails, relations], axis=1)[heads < tails], axis=0)
    rows = random.permutation(rows)[: (EDGES - NODES) // 2]
    loops = np.arange(NODES)
    loops = np.stack([loops, loops, np.full_like(loops, RELATIONS - 1)], axis=1)
    return torch.from_numpy(np.concatenate([rows, rows[:, [1, 0, 2]], loops]))


def inputs() -> tuple[Weights, Tensor]:
    """The four parameters, the bases of a node side by side, and the gradient of the output."""
    torch.manual_seed(0)
    shapes = {"basis": (NODES, BASES, WIDTH), "att": (RELATIONS, BASES), "root": (NODES, WIDTH)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    return weights | {"bias": torch.randn(WIDTH)}, torch.randn(NODES, WIDTH)


def competitors(edges: Tensor) -> dict[str, Layer]:
    """Layers by name, the baseline first; each takes the weights in the layout of ``own``."""
    index = EdgeIndex(edges, num_nodes=NODES, num_relations=RELATIONS, normaliser=neighbour_sum)
    source, target, relation = edges.unbind(dim=1)

    def authors(w: Weights) -> Tensor:
        mixed = (w["att"] @ w["basis"].view(BASES, -1)).view(-1, WIDTH)
        messages = mixed[relation * NODES + source]
        return torch.zeros(NODES, WIDTH).index_add(0, target, messages) + w["root"] + w["bias"]

    found: dict[str, Layer] = {BASELINE: authors}
    if importlib.util.find_spec("torch_geometric"):
        found[RGCN] = geometric(edges)
    for impl in ("native", "portable"):
        found[impl] = lambda w, impl=impl: relational_sum(  # type: ignore[misc]
            w["basis"], w["att"], w["root"], w["bias"], index, impl=impl
        )
    return found


def geometric(edges: Tensor) -> Layer:
    """The layer of torch_geometric with our weights as its parameters."""
    from torch_geometric.nn import RGCNConv

    with torch.device("meta"):
        conv = RGCNConv(NODES, WIDTH, RELATIONS, num_bases=BASES, aggr="add")
    ends, relation = edges[:, :2].T.contiguous(), edges[:, 2].contiguous()

    def layer(w: Weights) -> Tensor:
        names = {"weight": "basis", "comp": "att", "root": "root", "bias": "bias"}
        parameters = {theirs: w[ours] for theirs, ours in names.items()}
        found: Tensor = torch.func.functional_call(conv, parameters, (None, ends, relation))
        return found

    return layer


def own(name: str, weights: Weights) -> Weights:
    """Weights in a competitor's layout: ours has the bases of a node side by side."""
    basis = weights["basis"] if name in OURS else weights["basis"].transpose(0, 1).contiguous()
    return {n: t.detach().requires_grad_() for n, t in {**weights, "basis": basis}.items()}


def run(layer: Layer, weights: Weights, upstream: Tensor | None) -> list[Tensor]:
    """The output; with an upstream gradient also the gradients of all weights."""
    output = layer(weights)
    if upstream is None:
        return [output]
    return [output, *torch.autograd.grad(output, list(weights.values()), upstream)]


def exact(edges: Tensor, weights: Weights, upstream: Tensor) -> list[Tensor]:
    """Output and gradients of the equations in float64, some columns of the vectors at a time."""
    index = EdgeIndex(edges, num_nodes=NODES, num_relations=RELATIONS)
    parts = []
    for start in range(0, WIDTH, COLUMNS):
        part = slice(start, start + COLUMNS)
        cut = {n: (t if n == "att" else t[..., part]).double() for n, t in weights.items()}
        cut = {n: t.requires_grad_() for n, t in cut.items()}
        layer = lambda w: equations(*w.values(), edges=index.tensors)  # noqa: E731
        parts.append([t.detach() for t in run(layer, cut, upstream[:, part].double())])
    output, basis, att, root, bias = zip(*parts, strict=True)
    return [
        torch.cat(output, 1),
        torch.cat(basis, 2),
        torch.stack(att).sum(0),
        torch.cat(root, 1),
        torch.cat(bias),
    ]


def compare(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest deviation, as a share of the largest number of each tensor."""
    worst = 0.0
    for tensor, expected in zip(found, wanted, strict=True):
        if tensor.shape != expected.shape:
            tensor = tensor.transpose(0, 1)
        # A part at a time: the difference of two large tensors in float64 is large.
        for a, b in zip(tensor.detach().split(4096), expected.split(4096), strict=True):
            worst = max(worst, ((a - b).abs().max() / expected.abs().max()).item())
    return worst


def peak(name: str, edges: Tensor, threads: int) -> Row:
    """Peak memory of a new process that computes a case once, as a line of the table."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, after = pool.apply(_peak, (name, edges.numpy(), threads))
    return {
        "mode": "peak memory",
        "implementation": name,
        "peak_mib": round(after),
        "of_it_before_mib": round(before),
        "goal_mib": round(PEAK_GOAL),
    }


def _peak(name: str, edges: np.ndarray[Any, Any], threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    before = _resident()
    rows = torch.from_numpy(edges)
    index = EdgeIndex(rows, num_nodes=NODES, num_relations=RELATIONS)
    layer = RelationalGraphLayer(
        index,
        width=WIDTH,
        num_bases=BASES,
        initialise=initialise_uniform,
        impl="portable" if name == "portable" else "native",
    )
    if not name.startswith("training"):
        torch.autograd.backward(layer().sum())
        return before, _resident()
    model = Recommender(layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    batch = made_batch()
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(recommendation_step(model, batch).total)
        optimizer.step()
    return before, _resident()


def made_batch(turns: int = 118, instances: int = 160, mentioned: int = 8) -> RecommenderBatch:
    """Instances as 256 turn pairs of ReDial hold them."""
    torch.manual_seed(0)
    return RecommenderBatch(
        nodes=torch.randint(NODES, (turns, mentioned)),
        mask=torch.ones(turns, mentioned, dtype=torch.bool),
        row=torch.randint(turns, (instances,)).sort().values,
        target=torch.randint(NODES, (instances,)),
        turn=torch.ones(instances, dtype=torch.int64),
        context=torch.randint(NODES, (turns, mentioned)),
    )


def _resident() -> float:
    """Largest resident memory of this process so far, in MiB.

    Linux keeps it by address space; what ``getrusage`` says includes the process that started this.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        (line,) = [line for line in lines if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def numbers(mode: str, name: str, values: list[float], times: dict[str, list[float]]) -> Row:
    """The timings of a competitor as a line of the table."""
    median, low, high = timing.spread(values)
    row: Row = {
        "mode": mode,
        "implementation": name,
        "median_ms": round(1e3 * median, 2),
        "p20_ms": round(1e3 * low, 2),
        "p80_ms": round(1e3 * high, 2),
    }
    for column, other in (("ratio", BASELINE), ("ratio_to_rgcnconv", RGCN)):
        if other in times:
            row[column] = round(timing.ratio(values, times[other]), 4)
        if mode != "forward":
            row[column.replace("ratio", "goal")] = GOALS.get((other, name))
    return row


def show(row: Row) -> None:
    """Print one line of the table."""
    if "peak_mib" in row:
        text = f"{row['peak_mib']:>10} MiB  goal {row['goal_mib']}"
    else:
        text = f"{row['median_ms']:>10.1f} ms  ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})"
        text += "".join(
            f"  {key} {row[key]}" for key in ("ratio", "ratio_to_rgcnconv") if key in row
        )
    print(f"{row['mode']:<20}{row['implementation']:<28}{text}", flush=True)


def write(path: Path, rows: list[Row]) -> None:
    """Write the rows as CSV."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path}")


if __name__ == "__main__":
    auto_cli(main)

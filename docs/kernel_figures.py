"""Draws ``kernels.png`` from the timings of ``shared/benchmarks/attention.py``."""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "shared" / "benchmarks" / "results" / "attention-cpu-main.csv"
PANELS = {"forward": "forward", "training": "forward and backward"}
SHOWN = ("native", "blocked", "eager", "reference", "x-transformers", "sparsemax", "entmax15")
Lines = dict[str, dict[int, float]]


def ratios(rows: list[dict[str, str]]) -> Lines:
    """Time of each implementation by sequence length, as a multiple of SDPA's."""
    lines: Lines = defaultdict(dict)
    for row in sorted(rows, key=lambda row: int(row["source"])):
        length = int(row["source"])
        if row["implementation"] in SHOWN and row["to_sdpa"]:
            lines[row["implementation"]][length] = float(row["to_sdpa"])
        if row["implementation"] == row["best_dense"]:
            lines["best dense"][length] = float(row["to_sdpa"])
    return lines


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Draw one panel for each mode: float32, no mask, k = 8."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    wanted = {"dtype": "float32", "causal": "False", "top_k": "8"}
    figure, panels = plt.subplots(
        1, len(PANELS), figsize=(10, 4.5), sharey=True, layout="constrained"
    )
    for panel, (mode, title) in zip(panels, PANELS.items(), strict=True):
        case = {**wanted, "mode": mode}
        square = [row for row in rows if row["target"] == row["source"]]
        lines = ratios([row for row in square if case.items() <= row.items()])
        panel.axhline(1.0, color="black", linewidth=1, label="SDPA")
        for name in ("best dense", *SHOWN):
            style = (
                {"color": "black", "linestyle": "--"} if name == "best dense" else {"marker": "."}
            )
            panel.plot(lines[name].keys(), lines[name].values(), label=name, **style)
        panel.set(title=title, xscale="log", yscale="log", xlabel="keys S = queries T")
        panel.set_xticks(sorted(lines["best dense"]))
        panel.minorticks_off()
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(ScalarFormatter())
        panel.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time / time of SDPA")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the timings and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file of the timings")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "kernels.png")
    arguments = parser.parse_args()
    with arguments.results.open(newline="", encoding="utf-8") as file:
        draw(list(csv.DictReader(file)), arguments.output)


if __name__ == "__main__":
    main()

"""Pictures: curves of training, the scaling of AdaNorm, what norms do to gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from separata_shared.files import atomic_write
from separata_shared.training import Run

from .monitor import record_normalised
from .probe import probe_run

_PARTS = {"train": "training", "evaluate": "validation"}


def plot_curves(
    *,
    runs: list[Path] | None = None,
    metric: str = "loss",
    output: Path = Path("runs/curves.png"),
) -> None:
    """Draw training and validation curves of several runs, a line for each.

    Args:
        runs: Run directories; default: ``runs/tiny``.
        metric: Number of ``metrics.jsonl`` to draw.
        output: Picture to write.

    Raises:
        ValueError: A run has no such number, or matplotlib is missing.
    """
    runs = runs or [Path("runs/tiny")]
    curves = {run: _curves(run, metric) for run in runs}
    kinds = [kind for kind in _PARTS if any(kind in found for found in curves.values())]
    with figure(output, columns=len(kinds), size=(5.0 * len(kinds), 3.8)) as axes:
        for axis, kind in zip(axes, kinds, strict=True):
            for number, (run, found) in enumerate(curves.items()):
                if kind in found:
                    style = "-" if kind == "train" else "o-"
                    label = _label(run, runs)
                    axis.plot(*found[kind], style, ms=3, color=f"C{number}", label=label)
            axis.set_title(_PARTS[kind])
            axis.set_xlabel("step")
            axis.set_ylabel(metric.replace("_", " "))
            axis.legend()
    print(output)


def plot_phi(
    *,
    C: float = 1.0,
    k: float = 0.1,
    values: Path | None = None,
    run: Path | None = None,
    output: Path = Path("runs/phi.png"),
) -> None:
    """Draw AdaNorm's output over y, its peak, and the zone in which the sign flips.

    Args:
        C: Mean of the scaling.
        k: Slope of the scaling.
        values: Array file (``.npy``) with the input (..., H) of a norm; the histogram of its y is
            drawn too.
        run: Run directory of any training verb, whose norms give the histogram on a batch instead.
        output: Picture to write.

    Raises:
        ValueError: ``values`` is not such a file, the run cannot be read, k is not positive, or
            matplotlib is missing.
    """
    if k <= 0:
        raise ValueError(f"k: must be positive for a peak to exist, got {k}")
    if values is not None and run is not None:
        raise ValueError("values and run: give one of the two")
    y = None if values is None else _standardised(values)
    draw_phi(output, C=C, k=k, y=y if run is None else _features(run))
    print(output)


def draw_phi(
    output: Path, *, C: float = 1.0, k: float = 0.1, y: NDArray[np.floating] | None = None
) -> None:
    """Write the picture of ``plot_phi`` for normalised features that are at hand.

    Args:
        output: Picture to write.
        C: Mean of the scaling.
        k: Slope of the scaling.
        y: Normalised features, of any shape.

    Raises:
        ValueError: Matplotlib is missing.
    """
    peak, flip = 0.5 / k, 1 / k
    largest = 0.0 if y is None or not y.size else float(np.abs(y).max())
    low, high = -max(flip, largest) * 0.6, max(1.3 * flip, 1.05 * largest)
    grid = np.linspace(low, high, 500)
    with figure(output, columns=1, size=(7.0, 4.2)) as (axis,):
        axis.axvspan(flip, high, color="tab:red", alpha=0.12, label=f"y > {flip:g}: sign flipped")
        axis.axvline(peak, color="tab:gray", linestyle=":")
        axis.plot(grid, C * grid, color="tab:gray", lw=1, label="LayerNorm-simple, times C")
        axis.plot(grid, C * (1 - k * grid) * grid, color="tab:blue", label="AdaNorm")
        axis.plot([peak], [0.5 * peak * C], "o", color="tab:blue", label=f"peak at y = {peak:g}")
        axis.axhline(0, color="black", lw=0.5)
        axis.set_xlim(low, high)
        axis.set_xlabel("normalised feature y")
        axis.set_ylabel("output z")
        axis.legend(loc="lower center", fontsize=8)
        if y is not None:
            counts = axis.twinx()
            counts.hist(y.ravel(), bins=100, range=(low, high), color="tab:green", alpha=0.35)
            counts.set_yscale("log")
            counts.set_ylabel("features of the batch, log scale")
            axis.set_zorder(counts.get_zorder() + 1)  # the curves before the bars
            axis.patch.set_visible(False)


@contextmanager
def figure(
    path: Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float]
) -> Iterator[list[Any]]:
    """Axes to draw on; the picture is written when the block ends, whole or not at all.

    Args:
        path: PNG to write.
        rows: Rows of axes.
        columns: Columns of axes.
        size: Width and height in inches.

    Yields:
        The axes, row by row.

    Raises:
        ValueError: Matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'separata-adanorm[plot]'") from None
    drawing = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawing)
    yield list(drawing.subplots(rows, columns, squeeze=False).flat)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        drawing.savefig(file, format="png", dpi=130)


def _curves(run: Path, metric: str) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values by the kind of the record."""
    records = Run(run).records()
    found: dict[str, tuple[list[float], list[float]]] = {}
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{Run(run).metrics}: line {number} is not the record of a step")
        if record.get("kind") in list(_PARTS) and isinstance(record.get(metric), float | int):
            steps, values = found.setdefault(record["kind"], ([], []))
            steps.append(record["step"])
            values.append(record[metric])
    if not found:
        known = sorted({name for record in records for name in record} - {"kind", "step", "epoch"})
        raise ValueError(
            f"{Run(run).metrics}: has no {metric!r}; there are {', '.join(known) or 'no records'}"
        )
    return found


def _label(run: Path, runs: Sequence[Path]) -> str:
    """Name of a run, with its directory where the names alone are equal."""
    same = [other for other in runs if other.name == run.name]
    return run.name if len(same) == 1 else str(run)


def _features(run: Path) -> NDArray[np.floating]:
    """What all norms of a run normalise in a batch."""
    model, loss = probe_run(run)
    with torch.no_grad(), record_normalised(model) as features:
        loss()
    return torch.cat([y.flatten() for y in features]).double().cpu().numpy()


def _standardised(path: Path) -> NDArray[np.floating]:
    """Normalised rows of the array in ``path``."""
    try:
        x = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy file ({error})") from None
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f" or x.ndim < 1 or not x.size:
        raise ValueError(f"{path}: must hold floating-point features (..., H)")
    x = x.astype(np.float64)
    y: NDArray[np.floating] = x - x.mean(axis=-1, keepdims=True)
    y /= np.maximum(x.std(axis=-1, keepdims=True), 1e-12)
    return y

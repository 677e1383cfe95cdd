"""Pictures: quality over latency, and the actions of a sentence."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from separata_shared.files import atomic_write, read_json

from .fast import Precision

MODES = {"one pass": "one_length", "greedy": "beam"}
"""Way to decode in the scores, by search in the timings; others: ``beam`` or ``rescored``."""


def plot_latency(
    *,
    bench: Path = Path("runs/tiny/bench.json"),
    scores: dict[str, Path],
    batch: int = 1,
    precision: Precision = "float32",
    metric: str = "bleu_detokenised",
    output: Path = Path("runs/tiny/latency.png"),
) -> None:
    """Draw quality over latency, a point for each system that was timed and scored.

    A system's beam and greedy search share the score that ``evaluate`` gave its run, since it
    scores with the run's own beam; greedy points are drawn hollow. ``evaluate`` runs in float32, so
    in another precision the times are right and the quality may be lower.

    Args:
        bench: JSON file that ``bench`` wrote.
        scores: ``scores.json`` of each system, by its name in that file, such as ``{"NAT":
            "runs/tiny/learner/scores.json", "AT 2-2": "runs/tiny/teacher/scores.json"}``.
        batch: Size of the batch whose times are drawn.
        precision: Of the systems whose times are drawn.
        metric: Score of the raw translations.
        output: Picture to write.

    Raises:
        ValueError: A file is missing or holds something else, nothing is both timed and scored, or
            matplotlib is missing.
    """
    rows = _rows(bench, batch)
    points: dict[str, list[tuple[float, float, bool, str]]] = {}
    for system, path in scores.items():
        found = _translations(path)
        for row in rows:
            mode = mode_of(row["search"], found)
            if (row["system"], row["precision"]) != (system, precision) or mode is None:
                continue
            value = _value(path, found, mode, metric)
            hollow = row["search"] == "greedy"
            points.setdefault(f"{system}, {row['engine']}", []).append(
                (row["median_ms"], value, hollow, row["search"])
            )
    if not points:
        names = sorted({row["system"] for row in rows})
        raise ValueError(
            f"scores: none is of a system in {bench} in {precision}; those are {', '.join(names)}"
        )
    with figure(output, size=(9.0, 5.0)) as axes:
        for number, (name, found_points) in enumerate(points.items()):
            for time, value, hollow, label in found_points:
                axes.scatter(
                    [time],
                    [value],
                    facecolors="none" if hollow else f"C{number}",
                    edgecolors=f"C{number}",
                )
                near = {"xytext": (3, 5), "textcoords": "offset points", "rotation": 30}
                axes.annotate(label, (time, value), fontsize=7, **near)
            axes.scatter([], [], color=f"C{number}", label=name)
        axes.set_xscale("log")
        for part in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            part("{x:g}")
        axes.margins(0.12)
        axes.set_xlabel(f"milliseconds for a batch of {batch}, {precision}")
        axes.set_ylabel(metric.replace("_", " "))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # where it hides no point
    print(output)


def mode_of(search: str, translations: Mapping[str, Any]) -> str | None:
    """The scored way to decode that a timed search stands for; None where it was not scored."""
    name = "beam" if search.startswith("beam") else MODES.get(search, "rescored")
    return name if name in translations else None


def draw_actions(report: Mapping[str, Any], output: Path) -> None:
    """Draw the actions of a sentence in both models, and their agreement in every layer.

    Args:
        report: What ``explain`` found.
        output: Picture to write.

    Raises:
        ValueError: Matplotlib is missing.
    """
    sentence: Sequence[Mapping[str, Any]] = report["sentence"]
    numbers = [found["layer"] for found in report["layers"]]
    size = (max(6.0, 0.7 * len(sentence) + 2.0), 1.1 * len(numbers) + 2.5)
    with figure(output, size=size) as axes:
        same = [
            [
                float(row["demonstrator"]["action"][n] == row["learner"]["action"][n])
                for row in sentence
            ]
            for n in range(len(numbers))
        ]
        axes.imshow(same, cmap="RdYlGn", vmin=-0.5, vmax=1.5, aspect="auto", alpha=0.6)
        for place, row in enumerate(sentence):
            for n in range(len(numbers)):
                actions = [row[name]["action"][n] for name in ("demonstrator", "learner")]
                axes.text(place, n, "{}\n{}".format(*actions), ha="center", va="center", fontsize=7)
        axes.set_xticks(
            range(len(sentence)),
            [f"{row['reference']}\n{row['learner_word']}" for row in sentence],
            rotation=40,
            fontsize=7,
        )
        axes.set_yticks(
            range(len(numbers)),
            [
                f"layer {found['layer']}\nsame {100 * found['same_action']:.0f} %"
                for found in report["layers"]
            ],
        )
        axes.set_title("most likely action: demonstrator above, learner below", fontsize=9)


@contextmanager
def figure(path: Path, *, size: tuple[float, float]) -> Iterator[Any]:
    """One pair of axes; the picture is written when the block ends, whole or not at all.

    Args:
        path: PNG to write.
        size: Width and height in inches.

    Yields:
        The axes.

    Raises:
        ValueError: Matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "pictures need matplotlib: pip install 'separata-imitation-nat[plot]'"
        ) from None
    drawing = Figure(figsize=size, layout="constrained")
    canvas = FigureCanvasAgg(drawing)
    yield drawing.add_subplot()
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        canvas.print_figure(file, format="png", dpi=120)


def _rows(path: Path, batch: int) -> list[dict[str, Any]]:
    """Timed rows of one batch size; of the first table that has it."""
    content = read_json(path)
    names = {"system", "search", "engine", "precision", "batch", "target_length", "median_ms"}
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and names <= r.keys() for r in rows
    ):
        raise ValueError(f"{path}: is not what bench writes")
    here = [row for row in rows if row["batch"] == batch]
    if not here:
        sizes = sorted({row["batch"] for row in rows})
        raise ValueError(f"batch: {path} has no batch of {batch}; there are {sizes}")
    return [row for row in here if row["target_length"] == here[0]["target_length"]]


def _translations(path: Path) -> dict[str, Any]:
    content = read_json(path)
    found = content.get("translations") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is not what evaluate writes (no translations)")
    return found


def _value(path: Path, translations: Mapping[str, Any], mode: str, metric: str) -> float:
    try:
        return float(translations[mode]["raw"][metric]["value"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: has no number translations.{mode}.raw.{metric}.value") from None

"""Pictures of what attentions look at: the verbs ``plot-attention`` and ``plot-span``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from separata_shared.data.vocabulary import EOS
from separata_shared.files import atomic_write, write_json
from separata_shared.nn import Transformer, record_attention
from separata_shared.training import Run
from separata_shared.translation.search import encode_line
from torch import Tensor

from .data import Split, load
from .generate import TrainedModel, load_run, translate

Maps = dict[str, NDArray[np.float32]]
"""Attention weights (H,T,S) of one sentence pair, by module name."""


def plot_attention(
    *,
    run: Path = Path("runs/tiny"),
    sentence: str | None = None,
    output: Path | None = None,
    weights: Path | None = None,
    head: int | None = None,
    word: int | None = None,
) -> dict[str, Any]:
    """Draw the attention of a trained model for one sentence, dense beside sparse.

    Three pictures are written. ``attention.png`` has the context attention of the first and the
    last decoder layer, once as the model attends and once with the selection taken away (the same
    weights, all keys kept). ``word.png`` has the same for one target word. ``support.png`` has the
    number of keys that carry weight, the entropy and the dense probability kept, for each layer
    and head. ``attention.json`` has their numbers.

    Args:
        run: Run directory of ``train``.
        sentence: Source sentence; default: the first test sentence of 8 to 20 tokens.
        output: Directory for the files; default: the run directory.
        weights: Weights file; default: the best of the run.
        head: Head to draw; default: the mean over the heads.
        word: Position of the target word in ``word.png``, from 0; default: the middle one.

    Returns:
        The numbers of ``attention.json``.

    Raises:
        ValueError: The run cannot be read, the head or the word does not exist, the sentence is too
            long, or matplotlib is missing.
    """
    pyplot()  # missing, it should be missed before anything is written
    trained = load_run(run, weights=weights)
    num_heads = trained.model.num_heads
    if head is not None and not 0 <= head < num_heads:
        raise ValueError(f"head: {head} does not exist, the model has heads 0 to {num_heads - 1}")
    every_key = replace(trained.model, attention=replace(trained.model.attention, sites=[]))
    source, target = _pair(trained, sentence)
    place = (len(target) - 1) // 2 if word is None else word
    if not 0 <= place < len(target):
        raise ValueError(f"word: {place} does not exist, the target has {len(target)} tokens")
    sparse = attention_maps(trained.network, source, target)
    dense = attention_maps(
        load_run(run, weights=trained.weights, model=every_key).network, source, target
    )
    report = {
        "source": _pieces(trained.source_vocabulary.pieces, source),
        "target": _pieces(trained.target_vocabulary.pieces, target),
        "attentions": {name: _statistics(sparse[name], dense[name]) for name in sparse},
    }
    directory = output or run
    write_json(directory / "attention.json", report)
    _draw_maps(sparse, dense, report, head, directory / "attention.png")
    _draw_word(sparse, dense, report, head, place, directory / "word.png")
    _draw_statistics(report, directory / "support.png")
    for name in ("attention", "word", "support"):
        print(directory / f"{name}.png")
    return report


def plot_span(*, runs: list[Path] | None = None, output: Path = Path("runs/span.png")) -> None:
    """Draw the span that language models need for their bits per character, a line for each run.

    The points of a line are the evaluations made while the model was trained.

    Args:
        runs: Run directories of ``train-lm``; default: ``runs/tiny-lm``.
        output: Picture to write.

    Raises:
        ValueError: A run has no evaluation of a language model, or matplotlib is missing.
    """
    names = ("average_span", "bits_per_character")
    figure, axis = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for run in runs or [Path("runs/tiny-lm")]:
        records = [record for record in Run(run).records() if record.keys() >= set(names)]
        if not records:
            raise ValueError(f"{Run(run).metrics}: has no evaluation of a language model")
        axis.plot(*([record[name] for record in records] for name in names), "o-", label=run.name)
    axis.set_xlabel("average span (characters)")
    axis.set_ylabel("bits per character of the validation part")
    axis.legend()
    save_figure(figure, output)
    print(output)


@torch.no_grad()
def attention_maps(model: Transformer, source: Tensor, target: Tensor) -> Maps:
    """Attention weights of one sentence pair.

    Args:
        model: The model, in evaluation mode.
        source: Source tokens (S).
        target: Decoder input (T).

    Returns:
        Module name to weights (H,T,S).
    """
    device = next(model.parameters()).device
    with record_attention(model) as weights:
        model(source[None].to(device), target[None].to(device))
    return {name: weight[0].float().cpu().numpy() for name, weight in weights.items()}


def _pair(trained: TrainedModel, sentence: str | None) -> tuple[Tensor, Tensor]:
    """Source tokens, and the decoder input that is the model's own translation."""
    if sentence is None:
        sentence = _example(load(trained.data).test)
    source = encode_line(trained, sentence, name="sentence")
    hypothesis = translate(trained, [source])[0][0]
    return source, torch.cat([torch.tensor([EOS]), hypothesis.tokens[:-1]])


def _example(split: Split) -> str:
    """The first sentence of a length that is easy to look at."""
    lengths = split.source.lengths
    fitting = np.flatnonzero((lengths >= 8) & (lengths <= 20))
    return split.source_lines[int(fitting[0]) if len(fitting) else 0]


def _pieces(pieces: tuple[str, ...], tokens: Tensor) -> list[str]:
    return [pieces[token].replace("\u2581", "_") for token in tokens.tolist()]


def _statistics(sparse: NDArray[np.float32], dense: NDArray[np.float32]) -> dict[str, list[float]]:
    """Means over the queries, one number per head."""
    safe = np.where(sparse > 0, sparse, 1.0)
    return {
        "support": (sparse > 0).sum(-1).mean(-1).tolist(),
        "entropy_nats": (-(sparse * np.log(safe)).sum(-1)).mean(-1).tolist(),
        "dense_mass_kept": (dense * (sparse > 0)).sum(-1).mean(-1).tolist(),
    }


def pyplot() -> Any:
    """Matplotlib, drawing to files only.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "pictures need matplotlib: pip install 'separata-explicit-sparse-transformer[plot]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically, and forget it."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        figure.savefig(file, format="png", dpi=130)
    pyplot().close(figure)


def _draw_maps(
    sparse: Maps, dense: Maps, report: dict[str, Any], head: int | None, path: Path
) -> None:
    """Context attention of the first and last decoder layer: dense left, as trained right."""
    names = [name for name in sparse if "cross" in name]
    names = names[:1] + names[-1:] if len(names) > 1 else names
    rows, columns = len(report["target"]), len(report["source"])
    figure, axes = pyplot().subplots(
        len(names),
        2,
        figsize=(3 + 0.55 * columns, (1.2 + 0.28 * rows) * len(names)),
        squeeze=False,
        layout="constrained",
    )
    for row, name in zip(axes, names, strict=True):
        for axis, maps, title in zip(
            row, (dense, sparse), ("every key", "as trained"), strict=True
        ):
            weights = maps[name].mean(0) if head is None else maps[name][head]
            image = axis.imshow(weights, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            axis.set_title(f"{_short(name)}, {title}", fontsize=9)
            axis.set_xticks(range(columns), report["source"], rotation=60, ha="right", fontsize=7)
            # The row of a query is labelled with the token that it predicts.
            axis.set_yticks(range(rows), [*report["target"][1:], "</s>"], fontsize=7)
        figure.colorbar(image, ax=row, label="attention weight")
    save_figure(figure, path)


def _draw_word(
    sparse: Maps, dense: Maps, report: dict[str, Any], head: int | None, place: int, path: Path
) -> None:
    """Context attention of one target word in the last decoder layer, as bars."""
    name = [name for name in sparse if "cross" in name][-1]
    columns = np.arange(len(report["source"]))
    figure, axis = pyplot().subplots(figsize=(2 + 0.45 * len(columns), 3.2), layout="constrained")
    for shift, maps, label in ((-0.2, dense, "every key"), (0.2, sparse, "as trained")):
        weights = maps[name].mean(0) if head is None else maps[name][head]
        axis.bar(columns + shift, weights[place], width=0.4, label=label)
    axis.set_title(
        f"{_short(name)}: writing {[*report['target'][1:], '</s>'][place]!r}", fontsize=9
    )
    axis.set_xticks(columns, report["source"], rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("attention weight")
    axis.legend()
    save_figure(figure, path)


def _draw_statistics(report: dict[str, Any], path: Path) -> None:
    """Support size, entropy and dense mass kept: one row per attention, one column per head."""
    titles = {
        "support": "keys with weight",
        "entropy_nats": "entropy (nats)",
        "dense_mass_kept": "dense probability kept",
    }
    names = list(report["attentions"])
    figure, axes = pyplot().subplots(
        1, len(titles), figsize=(12, 1.5 + 0.3 * len(names)), layout="constrained"
    )
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        values = np.array([report["attentions"][name][key] for name in names])
        image = axis.imshow(values, cmap="viridis", aspect="auto", vmin=0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("head")
        axis.set_xticks(range(values.shape[1]))
        axis.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=7)
        figure.colorbar(image, ax=axis)
    save_figure(figure, path)


def _short(name: str) -> str:
    """``decoder.layers.0.cross_attention`` as ``decoder 1 cross``."""
    stack, _, layer, kind = name.split(".")[:4]
    return f"{stack} {int(layer) + 1} {kind.removesuffix('_attention')}"

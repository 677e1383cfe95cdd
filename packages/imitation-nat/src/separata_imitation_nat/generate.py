"""Translation with a trained model of any kind: the verbs ``translate`` and ``score``.

A run directory says by its configuration what was trained in it, so every verb takes any run.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from separata_shared import translation
from separata_shared.cli import from_yaml
from separata_shared.data import TokenBuckets, pad
from separata_shared.data.vocabulary import PAD
from separata_shared.files import read_lines, read_text, write_text
from separata_shared.training import Run
from separata_shared.translation import Corpus, Split, TrainedModel
from separata_shared.translation.search import encode_line, standard_input
from torch import Tensor
from tqdm import tqdm

from .actions import ActionTrace
from .build import build_demonstrator, build_learner, build_mask_predictor, build_teacher
from .cmlm import mask_predict
from .config import ModelConfig, ParallelDecodeConfig
from .decode import ParallelTranslation, configured, longest_output, teacher_scores
from .length import length_mask
from .quality import ActionUse, collapse, length_accuracy

load_teacher = partial(translation.load_run, ModelConfig, build_teacher)
"""Read a trained teacher: ``load_teacher(run, weights=...)``."""

load_demonstrator = partial(translation.load_run, ModelConfig, build_demonstrator)
"""Read a trained demonstrator: ``load_demonstrator(run, weights=...)``."""

load_learner = partial(translation.load_run, ModelConfig, build_learner)
"""Read a trained learner: ``load_learner(run, weights=...)``."""

load_mask_predictor = partial(translation.load_run, ModelConfig, build_mask_predictor)
"""Read a trained mask-predict model: ``load_mask_predictor(run, weights=...)``."""

Kind = Literal["teacher", "demonstrator", "learner", "mask predictor"]
Translate = Callable[[Sequence[Tensor]], list[list[int]]]
"""From source tokens of each sentence to the words of its translation, without end mark."""


@dataclass(frozen=True)
class Translator:
    """A trained model and the ways to translate with it."""

    kind: Kind
    trained: TrainedModel[ModelConfig]
    modes: Mapping[str, Translate]
    """By name; the last one is how the run wants to be used."""
    scorer: Path | None = None
    """Weights of the other model that chooses among a learner's lengths, where one does."""


def kind_of(run: Path) -> Kind:
    """What was trained in a run directory.

    Raises:
        ValueError: It is no run directory.
    """
    config = Run(run).config
    if not config.exists():
        raise ValueError(f"{run}: not a run directory; train one first")
    groups = {line.split(":")[0] for line in read_text(config).splitlines()}
    if "parallel" in groups:
        return "learner"
    if "iterations" in groups:
        return "mask predictor"
    return "demonstrator" if "objective" in groups else "teacher"


def open_run(
    run: Path,
    *,
    weights: Path | None = None,
    scorer: Path | None = None,
    parallel: ParallelDecodeConfig | None = None,
) -> Translator:
    """Read a run of any kind.

    Args:
        run: Run directory of any verb that trains.
        weights: Weights file; default: the best of the run.
        scorer: Run directory of the model that chooses among a learner's lengths.
        parallel: How a learner decodes; default: the run's.

    Raises:
        ValueError: The run or the scorer cannot be read.
    """
    kind = kind_of(run)
    if kind == "learner":
        return _open_learner(load_learner(run, weights=weights), scorer, parallel)
    if kind == "mask predictor":
        trained = load_mask_predictor(run, weights=weights)
        passes = from_yaml(Run(run).config, {"iterations": int})["iterations"]
        longest = partial(_longest, most=trained.model.max_length)
        decode = partial(mask_predict, iterations=passes, longest=longest)
        return Translator(kind, trained, {f"passes_{passes}": partial(_in_one_go, trained, decode)})
    load = load_teacher if kind == "teacher" else load_demonstrator
    trained = load(run, weights=weights)
    return Translator(kind, trained, {"beam": partial(_searched, trained)})


def _open_learner(
    trained: TrainedModel[ModelConfig], scorer: Path | None, parallel: ParallelDecodeConfig | None
) -> Translator:
    kept = from_yaml(Run(trained.run).config, {"parallel": ParallelDecodeConfig})["parallel"]
    chosen: ParallelDecodeConfig = parallel or kept
    most = trained.model.max_length
    one = configured(replace(chosen, scorer="none"), max_length=most)
    modes = {"one_length": partial(_in_one_go, trained, one)}
    judge, weights = None, None
    if chosen.scorer == "teacher":
        read = read_scorer(scorer, trained)
        judge, weights = read.network, read.weights
    if chosen.scorer != "none":
        several = configured(chosen, teacher=judge, max_length=most)
        widest = chosen.max_tokens // chosen.candidates
        modes["rescored"] = partial(_in_one_go, trained, several, max_tokens=widest)
    return Translator("learner", trained, modes, weights)


def read_scorer(run: Path | None, trained: TrainedModel[ModelConfig]) -> TrainedModel[ModelConfig]:
    """The teacher or demonstrator that chooses among the translations of ``trained``.

    Raises:
        ValueError: There is none, it is of another kind, or it has another vocabulary.
    """
    if run is None:
        raise ValueError("parallel.scorer: teacher needs the run directory of a teacher")
    kind = kind_of(run)
    if kind not in ("teacher", "demonstrator"):
        raise ValueError(f"{run}: is a {kind}; only a teacher or a demonstrator can score")
    scorer = (load_teacher if kind == "teacher" else load_demonstrator)(run)
    check_vocabularies(scorer, trained)
    return scorer


def check_vocabularies(
    trained: TrainedModel[ModelConfig], other: TrainedModel[ModelConfig] | Corpus
) -> None:
    """Raise a ``ValueError`` that names the run unless both number the same tokens."""
    for side in ("source_vocabulary", "target_vocabulary"):
        getattr(trained, side).check(getattr(other, side).fingerprint, trained.run)


def check_actions(demonstrator: TrainedModel[ModelConfig], learner: ModelConfig) -> None:
    """Raise a ``ValueError`` unless a learner has the actions of a demonstrator, layer by layer."""
    theirs, own = (
        f"{model.num_actions} actions in layers {model.layers_with_actions}"
        for model in (demonstrator.model, learner)
    )
    if theirs != own:
        raise ValueError(
            f"{demonstrator.run}: has {theirs}, the learner {own}; "
            "see model.num_actions and model.action_layers"
        )


def _searched(trained: TrainedModel[ModelConfig], sources: Sequence[Tensor]) -> list[list[int]]:
    found = translation.translate(trained, sources)
    return [hypotheses[0].tokens[:-1].tolist() for hypotheses in found]


def _in_one_go(
    trained: TrainedModel[ModelConfig],
    decode: Callable[..., ParallelTranslation],
    sources: Sequence[Tensor],
    *,
    max_tokens: int = 4000,
) -> list[list[int]]:
    """Translate in batches of similar length with a function of the network and the source."""
    device = next(trained.network.parameters()).device
    rows: list[list[int]] = [[] for _ in sources]
    for indices, batch in batches(sources, max_tokens):
        tokens = decode(trained.network, batch.to(device)).tokens.cpu()
        for index, row in zip(indices, tokens, strict=True):
            rows[index] = row[row.ne(PAD)][:-1].tolist()
    return rows


def batches(sources: Sequence[Tensor], max_tokens: int) -> list[tuple[list[int], Tensor]]:
    """Sentences in batches of similar length: their numbers, and their tokens ``(B, S)``."""
    if not sources:
        return []
    lengths = [len(source) for source in sources]
    buckets = TokenBuckets(lengths, max_tokens=max(max_tokens, *lengths)).in_order()
    shown = tqdm(buckets, desc="translating", unit="batch", delay=2, disable=None)
    return [(list(chosen), pad([sources[n] for n in chosen], PAD)) for chosen in shown]


def _longest(source_lengths: Tensor, most: int) -> Tensor:
    return longest_output(source_lengths).clamp(max=most)


def sources_of(part: Split) -> list[Tensor]:
    """Source tokens of every sentence of a split."""
    return [torch.from_numpy(part.source[n].astype("int64")) for n in range(len(part))]


@torch.inference_mode()
def length_report(
    trained: TrainedModel[ModelConfig], sources: Sequence[Tensor], lengths: Sequence[int]
) -> dict[str, Any]:
    """How well a learner guesses lengths, and how it uses its actions at the lengths it guesses.

    Args:
        trained: The learner.
        sources: Source tokens of each sentence.
        lengths: True target length of each, end mark included.

    Returns:
        ``length``: accuracy, exact and within 4; ``actions``: for each layer that has them.
    """
    network, use = trained.network, ActionUse()
    predicted = [0] * len(sources)
    device = next(network.parameters()).device
    for indices, batch in batches(sources, 4000):
        encoding = network.encode(batch.to(device))
        found = network.length.lengths(
            network.predict_length(encoding).argmax(dim=1), encoding.mask.sum(dim=1)
        ).clamp(min=1)
        decoded = found.clamp(max=trained.model.max_length)
        mask = length_mask(decoded, int(decoded.max()))
        trace = ActionTrace()
        network.decode(encoding, mask, trace)
        if trained.model.layers_with_actions:
            use.add(trace.log_pi.exp(), mask)
        for index, length in zip(indices, found.tolist(), strict=True):
            predicted[index] = length
    accuracy = {"exact": 0, "within 4": 4}
    return {
        "length": {
            n: length_accuracy(predicted, lengths, k).as_dict() for n, k in accuracy.items()
        },
        "actions": use.result(),
    }


def generate(
    *,
    run: Path = Path("runs/tiny/learner"),
    input: Path | None = None,
    output: Path | None = None,
    weights: Path | None = None,
    scorer: Path = Path("runs/tiny/teacher"),
    radius: int | None = None,
    clean: bool = False,
    limit: int | None = None,
) -> list[str]:
    """Translate text, one sentence per line, with a run of any kind.

    Args:
        run: Run directory of any verb that trains.
        input: Source text; default: standard input.
        output: Where the translations go; default: standard output.
        weights: Weights file; default: the best of the run.
        scorer: Run directory of the teacher, or of a demonstrator, that chooses among a learner's
            lengths.
        radius: Half width of a learner's window of lengths; 0 decodes its centre without a scorer;
            default: the run's.
        clean: Remove words that repeat the one before.
        limit: Translate only so many lines; default: all.

    Returns:
        One translation per line of the input; an empty line gives an empty line.

    Raises:
        ValueError: The run or the input cannot be read, or a sentence is too long.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: must be at least 1, got {limit}")
    translator = open_run(run, weights=weights, scorer=scorer, parallel=_parallel_of(run, radius))
    trained = translator.trained
    name = str(input or "standard input")
    lines = (read_lines(input) if input else standard_input())[:limit]
    filled = [number for number, line in enumerate(lines) if line.strip()]
    sources = [encode_line(trained, lines[n], name=f"{name}: line {n + 1}") for n in filled]
    *_, translate = translator.modes.values()
    translations = [""] * len(lines)
    for number, row in zip(filled, translate(sources), strict=True):
        words = collapse(row) if clean else row
        translations[number] = trained.target_vocabulary.decode(words)
    text = "".join(f"{line}\n" for line in translations)
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(output, text)
    return translations


def _parallel_of(run: Path, radius: int | None) -> ParallelDecodeConfig | None:
    """The run's own way to decode with another window, where one is wanted."""
    if radius is None:
        return None
    if (kind := kind_of(run)) != "learner":
        raise ValueError(f"radius: {run} is a {kind}; only a learner decodes several lengths")
    kept: ParallelDecodeConfig = from_yaml(Run(run).config, {"parallel": ParallelDecodeConfig})[
        "parallel"
    ]
    if radius and kept.scorer == "none":
        raise ValueError(f"radius: {run} has parallel.scorer none, so only 0 is possible")
    scorer = kept.scorer if radius else "none"
    lengths: Literal["window", "source"] = "source" if kept.lengths == "source" else "window"
    return replace(kept, lengths=lengths, radius=radius, scorer=scorer)


@torch.inference_mode()
def score(
    *,
    run: Path = Path("runs/tiny/teacher"),
    source: Path,
    target: Path,
    weights: Path | None = None,
) -> list[float]:
    """Print how likely translations are: the mean log-probability of their tokens, a line each.

    The scores that choose among a learner's lengths are these.

    Args:
        run: Run directory of a teacher or a demonstrator.
        source: Source text, one sentence per line.
        target: A translation of each line.
        weights: Weights file; default: the best of the run.

    Returns:
        Nats per token, the end mark counted, for each line.

    Raises:
        ValueError: The run is of another kind, a file cannot be read, the two differ in their
            number of lines, or a sentence is too long.
    """
    kind = kind_of(run)
    if kind not in ("teacher", "demonstrator"):
        raise ValueError(f"{run}: is a {kind}; only a teacher or a demonstrator can score")
    load = load_teacher if kind == "teacher" else load_demonstrator
    trained: TrainedModel[ModelConfig] = load(run, weights=weights)
    lines = read_lines(source), read_lines(target)
    if len(lines[0]) != len(lines[1]):
        raise ValueError(f"{target}: has {len(lines[1])} lines, {source} has {len(lines[0])}")
    sources = [
        encode_line(trained, line, name=f"{source}: line {number}")
        for number, line in enumerate(lines[0], start=1)
    ]
    change = str.lower if trained.data.lowercase else str
    targets = [
        torch.from_numpy(trained.target_vocabulary.encode(change(line))).long() for line in lines[1]
    ]
    longest = max(map(len, targets))
    if longest > trained.model.max_length:
        raise ValueError(
            f"{target}: a line has {longest} tokens, more than the {trained.model.max_length} "
            "positions of the model"
        )
    device = next(trained.network.parameters()).device
    scores = [0.0] * len(sources)
    for indices, batch in batches(sources, 4000):
        words = pad([targets[n] for n in indices], PAD)
        found = teacher_scores(trained.network, batch.to(device), words.to(device))
        for index, value in zip(indices, found.tolist(), strict=True):
            scores[index] = value
    sys.stdout.write("".join(f"{value:.6f}\n" for value in scores))
    return scores

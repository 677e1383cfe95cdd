"""Translation with a trained model: reading a run directory, beam search, whole files."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from separata_shared.cli import from_yaml
from separata_shared.data import TokenBuckets, pad
from separata_shared.data.vocabulary import EOS, PAD, Vocabulary
from separata_shared.decoding import Hypothesis, beam_search, gnmt_penalty, power_penalty
from separata_shared.decoding.beam import LengthPenalty
from separata_shared.files import read_lines, write_text
from separata_shared.nn import Transformer
from separata_shared.training import Run, load_weights
from separata_shared.translation.config import DataConfig, DecodeConfig, TransformerConfig

ConfigT = TypeVar("ConfigT", bound=TransformerConfig)


@dataclass(frozen=True, kw_only=True)
class TrainedModel(Generic[ConfigT]):
    """A model with its trained weights, and what is needed to translate with it."""

    run: Path
    """Run directory."""
    weights: Path
    """File that the parameters came from."""
    network: Any
    """The model, in evaluation mode; a ``Transformer``, or what the package built instead."""
    model: ConfigT
    """Its sizes and wiring."""
    data: DataConfig
    """The corpus it was trained on."""
    decode: DecodeConfig
    """How it is searched."""
    source_vocabulary: Vocabulary
    """From source text to tokens."""
    target_vocabulary: Vocabulary
    """From tokens to target text."""


def load_run(
    config: type[ConfigT],
    build: Callable[[ConfigT], nn.Module],
    run: Path,
    *,
    weights: Path | None = None,
    model: ConfigT | None = None,
) -> TrainedModel[ConfigT]:
    """Read a trained model; a package gives the first two arguments for its users.

    Args:
        config: Type of the run's group ``model``.
        build: Makes the network that such a group describes.
        run: Run directory that ``train`` wrote.
        weights: Weights file; default: the best of the run.
        model: Wiring to use instead of the run's, with the same parameters.

    Raises:
        ValueError: The directory is no run, or the weights do not fit; the message names the file.
    """
    directory = Run(run)
    if not directory.config.exists():
        raise ValueError(f"{run}: not a run directory; train one first")
    groups = from_yaml(
        directory.config, {"model": config, "data": DataConfig, "decode": DecodeConfig}
    )
    vocabularies = {side: Vocabulary.load(run / f"{side}.vocabulary") for side in _SIDES}
    for side, vocabulary in vocabularies.items():
        if len(vocabulary) != getattr(groups["model"], f"{side}_vocabulary_size"):
            raise ValueError(
                f"{run / f'{side}.vocabulary'}: has {len(vocabulary)} types, the model of this run "
                "has another number"
            )
    weights = weights or directory.best_weights()
    groups["model"] = model or groups["model"]
    network = build(groups["model"])
    load_weights(network, weights)
    network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return TrainedModel(
        run=run,
        weights=weights,
        network=network,
        source_vocabulary=vocabularies["source"],
        target_vocabulary=vocabularies["target"],
        **groups,
    )


_SIDES = ("source", "target")

Load = Callable[..., TrainedModel[Any]]
"""Reads a run, called as ``load(run, weights=weights)``."""


def generate(
    load: Load,
    *,
    run: Path = Path("runs/tiny"),
    input: Path | None = None,
    output: Path | None = None,
    weights: Path | None = None,
    beam: int | None = None,
    alpha: float | None = None,
    limit: int | None = None,
) -> list[str]:
    """Translate text, one sentence per line.

    Args:
        load: The package's ``load_run``.
        run: Run directory of ``train``.
        input: Source text; default: standard input.
        output: Where the translations go; default: standard output.
        weights: Weights file; default: the best of the run.
        beam: Beam size; default: the run's.
        alpha: Exponent of the length penalty; default: the run's.
        limit: Translate only so many lines; default: all.

    Returns:
        One translation per line of the input; an empty line gives an empty line.

    Raises:
        ValueError: The run or the input cannot be read, or a sentence is too long.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: must be at least 1, got {limit}")
    trained = with_search(load(run, weights=weights), beam=beam, alpha=alpha)
    name = str(input or "standard input")
    lines = (read_lines(input) if input else standard_input())[:limit]
    translations = translate_lines(trained, lines, name=name)
    text = "".join(f"{line}\n" for line in translations)
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(output, text)
    return translations


def with_search(
    trained: TrainedModel[ConfigT], *, beam: int | None, alpha: float | None
) -> TrainedModel[ConfigT]:
    """Another beam size or length penalty, where given."""
    decode = trained.decode
    if beam is not None:
        decode = replace(decode, beam=beam)
    if alpha is not None:
        decode = replace(decode, alpha=alpha)
    return replace(trained, decode=decode)


def translate_lines(
    trained: TrainedModel[Any], lines: Sequence[str], *, name: str = "input"
) -> list[str]:
    """Translate lines of text; empty lines stay empty.

    Raises:
        ValueError: A line has more tokens than the model has positions; the message names it.
    """
    filled = [number for number, line in enumerate(lines) if line.strip()]
    sources = [
        encode_line(trained, lines[number], name=f"{name}: line {number + 1}") for number in filled
    ]
    translations = [""] * len(lines)
    for number, hypotheses in zip(filled, translate(trained, sources), strict=True):
        translations[number] = trained.target_vocabulary.decode(hypotheses[0].tokens.tolist())
    return translations


def encode_line(trained: TrainedModel[Any], line: str, *, name: str) -> Tensor:
    """Source tokens (S) of a line of text.

    Raises:
        ValueError: It has more tokens than the model has positions; the message begins with
            ``name``.
    """
    tokens = trained.source_vocabulary.encode(line.lower() if trained.data.lowercased else line)
    if len(tokens) > trained.model.max_length:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, more than the {trained.model.max_length} positions "
            "of the model; split the sentence"
        )
    return torch.from_numpy(tokens).long()


@torch.inference_mode()
def translate(trained: TrainedModel[Any], sources: Sequence[Tensor]) -> list[list[Hypothesis]]:
    """Search the best translations of token sequences.

    Args:
        trained: The model.
        sources: Source tokens (S) of each sentence, ``EOS`` at the end.

    Returns:
        Hypotheses of each sentence, best first, in the order of ``sources``.
    """
    if not sources:
        return []
    decode, device = trained.decode, next(trained.network.parameters()).device
    lengths = [len(source) for source in sources]
    most = max(decode.max_tokens // decode.beam, max(lengths))
    found: list[list[Hypothesis]] = [[] for _ in sources]
    with tqdm(total=len(sources), desc="translating", unit="sentence", disable=None) as bar:
        for indices in TokenBuckets(lengths, max_tokens=most).in_order():
            chosen = [sources[index] for index in indices]
            batch = pad(chosen, PAD).to(device)
            results = search(trained.network, batch, decode, max_length=trained.model.max_length)
            for index, hypotheses in zip(indices, results, strict=True):
                found[index] = hypotheses
            bar.update(len(indices))
    return found


def search(
    network: Transformer, source: Tensor, decode: DecodeConfig, *, max_length: int
) -> list[list[Hypothesis]]:
    """Beam search on one batch.

    The longest output of a sentence is ``factor * S + constant``, with its own S, so that a
    translation does not depend on the batch it was made in.

    Args:
        network: The model.
        source: Source tokens (B,S), padded.
        decode: Settings of the search.
        max_length: Longest output whatever the source.
    """
    lengths = source.ne(PAD).sum(dim=1).tolist()
    longest = [
        min(int(decode.max_length_factor * n) + decode.max_length_constant, max_length - 1)
        for n in lengths
    ]
    first = source.new_full((len(source),), EOS)
    return beam_search(
        network.step,
        network.start(source),
        first,
        beam_size=decode.beam,
        max_lengths=longest,
        eos_index=EOS,
        padding_index=PAD,
        length_penalty=length_penalty(decode),
    )


def length_penalty(decode: DecodeConfig) -> LengthPenalty:
    """The function of a hypothesis' length that divides its score."""
    return {"power": power_penalty, "gnmt": gnmt_penalty}[decode.length_penalty](decode.alpha)


def standard_input() -> list[str]:
    """Lines of standard input.

    Raises:
        ValueError: There are none, or one is not valid UTF-8.
    """
    lines: Iterable[bytes] = sys.stdin.buffer
    decoded: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            decoded.append(line.decode("utf-8" if decoded else "utf-8-sig").rstrip("\r\n"))
        except UnicodeDecodeError:
            raise ValueError(f"standard input: line {number} is not valid UTF-8") from None
    if not decoded:
        raise ValueError("standard input: is empty")
    return decoded

"""Scoring a trained model: both published BLEU protocols, perplexity, the copied source."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from separata_shared.files import write_json, write_text
from separata_shared.metrics import Score, bleu, perplexity
from separata_shared.metrics.bleu import Protocol
from separata_shared.translation.data import load as load_corpus
from separata_shared.translation.search import Load, translate_lines, with_search
from separata_shared.translation.train import validation_loss

SCORES = {"test": "scores.json", "valid": "scores.valid.json"}
"""File of a run directory that has the scores of a part."""

PROTOCOLS: tuple[Protocol, ...] = ("detokenised", "fairseq", "tensor2tensor")


def evaluate(
    load: Load,
    *,
    run: Path = Path("runs/tiny"),
    split: Literal["valid", "test"] = "test",
    weights: Path | None = None,
    beam: int | None = None,
    alpha: float | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Translate a split and score it.

    BLEU is computed in three protocols: ``detokenised`` as sacrebleu does by default, ``fairseq``
    on the given tokens as the paper's De-En, ``tensor2tensor`` on international tokenisation in
    lower case as the paper's En-Vi. The source itself is scored as a translation, too.

    Args:
        load: The package's ``load_run``.
        run: Run directory of ``train``.
        split: Part of the corpus.
        weights: Weights file; default: the best of the run.
        beam: Beam size; default: the run's.
        alpha: Exponent of the length penalty; default: the run's.
        output: File for the scores; default: ``scores.json`` in the run directory for the test
            part, ``scores.valid.json`` for the other. The translations stand beside it, as
            ``.txt``.

    Returns:
        What was written to the file.

    Raises:
        ValueError: The run or its data cannot be read.
    """
    trained = with_search(load(run, weights=weights), beam=beam, alpha=alpha)
    corpus = load_corpus(trained.data)
    trained.source_vocabulary.check(corpus.source_vocabulary.fingerprint, run)
    trained.target_vocabulary.check(corpus.target_vocabulary.fingerprint, run)
    part = getattr(corpus, split)
    began = time.perf_counter()
    hypotheses = translate_lines(trained, part.source_lines, name=f"{split} part")
    seconds = time.perf_counter() - began
    losses = validation_loss(trained.network, part, trained.data.max_tokens)
    tokens = len(part.target.tokens)
    metrics = {
        **score(hypotheses, part.target_lines),
        "perplexity": perplexity([(losses["loss"] * tokens, tokens)]).as_dict(),
        "exact_match": _exact(hypotheses, part.target_lines).as_dict(),
    }
    copied = score(part.source_lines, part.target_lines)
    scores = {
        "split": split,
        "weights": trained.weights.name,
        "beam": trained.decode.beam,
        "sentences": len(hypotheses),
        "seconds": round(seconds, 2),
        "metrics": metrics,
        "copy_of_the_source": copied,
    }
    path = output or run / SCORES[split]
    write_text(path.with_suffix(".txt"), "".join(f"{line}\n" for line in hypotheses))
    write_json(path, scores)
    for name, value in metrics.items():
        print(f"{name}: {value['value']:.2f} {value['unit']} ({value['signature']})")
    print(f"copy of the source: {copied['bleu_detokenised']['value']:.2f}")
    print(path)
    return scores


def score(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU in every protocol, with the signatures."""
    return {
        f"bleu_{protocol}": bleu(hypotheses, references, protocol=protocol).as_dict()
        for protocol in PROTOCOLS
    }


def _exact(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    same = sum(a == b for a, b in zip(hypotheses, references, strict=True))
    return Score(100 * same / len(references), "percent", "sentences equal", len(references))

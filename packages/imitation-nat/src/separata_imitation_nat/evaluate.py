"""Scores of a trained model of any kind: the verb ``evaluate``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from separata_shared.files import sha256, write_json, write_text
from separata_shared.metrics import bleu
from separata_shared.translation.scoring import SCORES
from torch import Tensor

from .data import Split, load
from .generate import Translator, check_vocabularies, length_report, open_run, sources_of
from .quality import bleu_by_length, collapse, repeated_tokens


def evaluate(
    *,
    run: Path = Path("runs/tiny/learner"),
    split: Literal["valid", "test"] = "test",
    weights: Path | None = None,
    scorer: Path = Path("runs/tiny/teacher"),
    output: Path | None = None,
) -> dict[str, Any]:
    """Translate a split in every way the model can, and score it; nothing is timed.

    A learner is decoded at its most likely length and, unless its configuration says otherwise,
    with several lengths among which a scorer chooses. Each text is scored as it is (``raw``) and
    without repeated tokens (``collapsed``), in two protocols: ``bleu_tokenised`` on the tokens of
    the corpus as multi-bleu does, ``bleu_detokenised`` as sacrebleu does.

    Args:
        run: Run directory of any verb that trains.
        split: Part of the corpus.
        weights: Weights file; default: the best of the run.
        scorer: Run directory of the teacher, or of a demonstrator, that chooses among lengths.
        output: File for the scores; default: ``scores.json`` in the run directory for the test
            part, ``scores.valid.json`` for the other. The translations stand beside it, one
            ``.txt`` for each way to decode.

    Returns:
        What was written to the file.

    Raises:
        ValueError: The run, its scorer or its data cannot be read.
    """
    translator = open_run(run, weights=weights, scorer=scorer)
    trained = translator.trained
    corpus = load(trained.data)
    check_vocabularies(trained, corpus)
    part: Split = getattr(corpus, split)
    sources = sources_of(part)
    path = output or run / SCORES[split]
    translations = {}
    for mode, translate in translator.modes.items():
        rows = translate(sources)
        raw = [trained.target_vocabulary.decode(row) for row in rows]
        shorter = [trained.target_vocabulary.decode(collapse(row)) for row in rows]
        translations[mode] = {
            "raw": _text_scores(raw, part) | {"repeated_tokens": repeated_tokens(rows).as_dict()},
            "collapsed": _text_scores(shorter, part),
            "bleu_by_source_length": bleu_by_length(
                raw, part.target_lines, part.source.lengths.tolist()
            ),
        }
        write_text(text_of(path.parent, mode, path.stem), "".join(f"{line}\n" for line in raw))
    scores: dict[str, Any] = {
        "split": split,
        "weights": sha256(trained.weights),
        "scorer": translator.scorer and sha256(translator.scorer),
        "kind": translator.kind,
        "sentences": len(part),
        "translations": translations,
        "copy_of_the_source": _text_scores(part.source_lines, part),
        **_learner_scores(translator, part, sources),
    }
    write_json(path, scores)
    print("\n".join(as_text(scores)))
    print(path)
    return scores


def text_of(run: Path, mode: str, stem: str = "scores") -> Path:
    """File of the translations of one way to decode."""
    return run / f"{stem}.{mode}.txt"


def _text_scores(hypotheses: Sequence[str], part: Split) -> dict[str, Any]:
    """BLEU in both protocols."""
    return {
        "bleu_tokenised": bleu(hypotheses, part.target_lines, protocol="fairseq").as_dict(),
        "bleu_detokenised": bleu(hypotheses, part.target_lines).as_dict(),
    }


def _learner_scores(
    translator: Translator, part: Split, sources: Sequence[Tensor]
) -> dict[str, Any]:
    """Accuracy of the length head and use of the actions, where the model has them."""
    if translator.kind != "learner":
        return {}
    return length_report(translator.trained, sources, part.target.lengths.tolist())


def as_text(scores: dict[str, Any]) -> list[str]:
    """The scores for a reader, a line each."""
    lines = []
    for mode, found in scores["translations"].items():
        for form in ("raw", "collapsed"):
            for name in ("bleu_detokenised", "bleu_tokenised"):
                score = found[form][name]
                lines.append(f"{mode}, {form}: {score['value']:.2f} ({score['signature']})")
        buckets = found["bleu_by_source_length"].items()
        by_length = "  ".join(f"{name}: {score['value']:.2f}" for name, score in buckets)
        lines.append(f"{mode}: BLEU by source tokens  {by_length}")
        lines.append(f"{mode}: repeated tokens {found['raw']['repeated_tokens']['value']:.2f} %")
    for name, score in scores.get("length", {}).items():
        lines.append(f"length {name}: {score['value']:.2f} %")
    for number, use in enumerate(scores.get("actions", ())):
        lines.append(
            f"layer {number}: action perplexity {use['perplexity']:.1f}, "
            f"{use['used']} of {use['actions']} actions used"
        )
    copied = scores["copy_of_the_source"]["bleu_detokenised"]["value"]
    return [*lines, f"copy of the source: {copied:.2f}"]

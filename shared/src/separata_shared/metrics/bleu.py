"""BLEU by sacrebleu, in the protocols that published numbers were made with."""

from collections.abc import Sequence
from typing import Any, Literal

from separata_shared.metrics.score import Score

Protocol = Literal["detokenised", "fairseq", "tensor2tensor"]

_SETTINGS: dict[Protocol, dict[str, Any]] = {
    # sacrebleu's default: plain text in, mteval-v13a tokenisation.
    "detokenised": {"tokenize": "13a", "smooth_method": "exp"},
    # fairseq-generate: BLEU-4 on the given tokens, no smoothing.
    "fairseq": {"tokenize": "none", "smooth_method": "none", "force": True},
    # t2t-bleu, uncased: mteval-v14 international tokenisation.
    "tensor2tensor": {"tokenize": "intl", "smooth_method": "exp", "lowercase": True},
}


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    protocol: Protocol = "detokenised",
) -> Score:
    """Corpus BLEU (Papineni et al. 2002) with one reference for each sentence, in percent.

    Args:
        hypotheses: One translation for each sentence; for ``fairseq`` tokens joined by spaces.
        references: The reference of each sentence, in the same form.
        protocol: ``detokenised`` (sacrebleu's default), ``fairseq`` (given tokens, no smoothing) or
            ``tensor2tensor`` (international tokenisation, lower-cased).

    Returns:
        BLEU in percent, with sacrebleu's signature; n is the number of sentences.

    Raises:
        ValueError: Nothing to score, different numbers of lines, an unknown protocol, or sacrebleu
            is not installed.
    """
    if protocol not in _SETTINGS:
        raise ValueError(f"protocol: {protocol!r} is none of {', '.join(_SETTINGS)}")
    if len(hypotheses) != len(references):
        raise ValueError(f"BLEU: {len(hypotheses)} hypotheses but {len(references)} references")
    if not hypotheses:
        raise ValueError("BLEU: nothing to score")
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ValueError("BLEU needs: pip install 'separata-shared[text]'") from None
    metric = BLEU(**_SETTINGS[protocol])
    result = metric.corpus_score(list(hypotheses), [list(references)])
    return Score(result.score, "percent", f"BLEU|{metric.get_signature()}", len(hypotheses))

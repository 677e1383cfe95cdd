import math
import sys

import pytest
from separata_shared.metrics import bleu
from separata_shared.metrics.bleu import Protocol

# One wrong last word of seven: precisions 6/7, 5/6, 4/5, 3/4; no brevity penalty.
# BLEU = (6/7 * 5/6 * 4/5 * 3/4) ** (1/4) = (3/7) ** (1/4)
HYPOTHESIS, REFERENCE = "a b c d e f g", "a b c d e f h"


@pytest.mark.parametrize("protocol", ["detokenised", "fairseq", "tensor2tensor"])
def test_worked_example(protocol: Protocol) -> None:
    score = bleu([HYPOTHESIS], [REFERENCE], protocol=protocol)
    assert score.value == pytest.approx(100 * (3 / 7) ** 0.25, abs=1e-9)
    assert (score.unit, score.n) == ("percent", 1)


def test_brevity_penalty_of_a_short_output() -> None:
    # Five of seven words, all right: precisions 1, penalty exp(1 - 7/5).
    score = bleu(["a b c d e"], ["a b c d e f g"], protocol="fairseq")
    assert score.value == pytest.approx(100 * math.exp(1 - 7 / 5), abs=1e-9)


def test_protocols_differ_where_they_should() -> None:
    cased = (["The cat sat on the mat"], ["the cat sat on the mat"])
    assert bleu(*cased, protocol="tensor2tensor").value == pytest.approx(100)
    assert bleu(*cased, protocol="fairseq").value < 100
    # Only the given tokens count for fairseq: "mat." is one of them, for the others two.
    point = (["the cat sat on mat."], ["the cat sat on mat ."])
    assert bleu(*point, protocol="detokenised").value == pytest.approx(100)
    assert bleu(*point, protocol="fairseq").value < 100
    # Without any common 4-gram fairseq's product is zero; exponential smoothing halves a count.
    short = (["a b c x"], ["a b c y"])
    assert bleu(*short, protocol="fairseq").value == 0
    # precisions 3/4, 2/3, 1/2 and (1/2)/1
    smoothed = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert bleu(*short, protocol="tensor2tensor").value == pytest.approx(smoothed, abs=1e-9)


def test_the_corpus_is_scored_not_the_mean_of_sentences() -> None:
    # Counts add up: precisions (6+4)/(7+4), (5+3)/(6+3), (4+2)/(5+2), (3+1)/(4+1).
    score = bleu([HYPOTHESIS, "p q r s"], [REFERENCE, "p q r s"], protocol="fairseq")
    product = 10 / 11 * 8 / 9 * 6 / 7 * 4 / 5
    assert score.value == pytest.approx(100 * product**0.25, abs=1e-9)


@pytest.mark.parametrize(
    ("protocol", "parts"),
    [
        ("fairseq", ["case:mixed", "tok:none", "smooth:none"]),
        ("tensor2tensor", ["case:lc", "tok:intl", "smooth:exp"]),
        ("detokenised", ["case:mixed", "tok:13a", "smooth:exp"]),
    ],
)
def test_the_signature_says_how(protocol: Protocol, parts: list[str]) -> None:
    signature = bleu([HYPOTHESIS], [REFERENCE], protocol=protocol).signature.split("|")
    assert signature[0] == "BLEU"
    assert set(parts) <= set(signature)
    assert any(part.startswith("version:") for part in signature)


@pytest.mark.parametrize(
    ("hypotheses", "references", "protocol", "problem"),
    [
        ([], [], "fairseq", "nothing to score"),
        (["a"], ["a", "b"], "fairseq", "1 hypotheses but 2 references"),
        (["a"], ["a"], "moses", "'moses' is none of"),
    ],
)
def test_wrong_use_is_one_line(
    hypotheses: list[str], references: list[str], protocol: Protocol, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        bleu(hypotheses, references, protocol=protocol)


def test_missing_sacrebleu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ValueError, match=r"pip install 'separata-shared\[text\]'"):
        bleu(["a"], ["a"])

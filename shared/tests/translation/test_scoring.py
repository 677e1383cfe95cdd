import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics.bleu import BLEU
from separata_shared import translation
from separata_shared.nn import Transformer
from separata_shared.translation import (
    TransformerConfig,
    build_transformer,
    load,
    translate_lines,
    validation_loss,
)
from separata_shared.translation.scoring import PROTOCOLS, score

load_run = partial(
    translation.load_run, TransformerConfig, partial(build_transformer, kind=Transformer)
)
evaluate = partial(translation.evaluate, load_run)


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def test_scores_are_those_of_the_translations_beside_them(run: Path) -> None:
    scores = evaluate(run=run)
    assert json.loads((run / "scores.json").read_text()) == scores
    trained = load_run(run)
    test = load(trained.data).test
    written = (run / "scores.txt").read_text().splitlines()
    assert written == translate_lines(trained, test.source_lines)
    assert scores["sentences"] == len(written) == 15
    assert scores["split"] == "test"
    assert scores["weights"] == trained.weights.name
    assert scores["beam"] == 3
    assert scores["metrics"].items() >= score(written, test.target_lines).items()
    exact = sum(map(str.__eq__, written, test.target_lines))
    assert scores["metrics"]["exact_match"]["value"] == pytest.approx(100 * exact / 15)
    loss = validation_loss(trained.network, test, 160)["loss"]
    assert scores["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(loss))
    assert scores["metrics"]["perplexity"]["n"] == len(test.target.tokens)


def test_every_number_has_a_signature_and_a_count(run: Path) -> None:
    scores = evaluate(run=run, beam=1)
    assert set(scores["metrics"]) == {
        "bleu_detokenised", "bleu_fairseq", "bleu_tensor2tensor", "perplexity", "exact_match",
    }  # fmt: skip
    assert scores["beam"] == 1
    for group in ("metrics", "copy_of_the_source"):
        for value in scores[group].values():
            assert value["signature"]
            assert value["n"] >= 1
            assert value["unit"]
    tokenizers = {name: value["signature"] for name, value in scores["metrics"].items()}
    assert "tok:13a" in tokenizers["bleu_detokenised"]
    assert "tok:none" in tokenizers["bleu_fairseq"]
    assert "smooth:none" in tokenizers["bleu_fairseq"]
    assert "tok:intl" in tokenizers["bleu_tensor2tensor"]
    assert "case:lc" in tokenizers["bleu_tensor2tensor"]


def test_both_published_protocols_are_computed_as_published() -> None:
    hypotheses, references = (
        ["A cat -sat on the mat .", "b c d e"],
        ["a cat - sat on the mat .", "b c d e"],
    )
    found = score(hypotheses, references)
    assert set(found) == {f"bleu_{protocol}" for protocol in PROTOCOLS}
    fairseq = BLEU(tokenize="none", smooth_method="none", force=True)
    tensor2tensor = BLEU(tokenize="intl", lowercase=True)
    for name, metric in (("fairseq", fairseq), ("tensor2tensor", tensor2tensor)):
        expected = metric.corpus_score(hypotheses, [references]).score
        assert found[f"bleu_{name}"]["value"] == expected
    assert found["bleu_tensor2tensor"]["value"] == pytest.approx(100)
    assert found["bleu_fairseq"]["value"] < 90


def test_the_source_is_scored_as_a_translation(run: Path) -> None:
    test = load(load_run(run).data).test
    assert evaluate(run=run)["copy_of_the_source"] == score(test.source_lines, test.target_lines)


def test_split_weights_and_output_can_be_chosen(run: Path, tmp_path: Path) -> None:
    weights = sorted((run / "weights").iterdir())[0]
    output = tmp_path / "elsewhere" / "valid.json"
    scores = evaluate(run=run, split="valid", weights=weights, output=output, alpha=0.5)
    assert json.loads(output.read_text()) == scores
    assert {path.name for path in output.parent.iterdir()} == {"valid.json", "valid.txt"}
    assert not (run / "scores.json").exists()
    assert scores["weights"] == weights.name
    assert scores["split"] == "valid"


def test_evaluating_twice_gives_the_same_numbers(run: Path) -> None:
    first, second = evaluate(run=run), evaluate(run=run)
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam"),
        ({"weights": Path("nowhere")}, "nowhere: no such file"),
    ],
)
def test_nothing_is_written_when_it_cannot_be_scored(
    run: Path, options: dict[str, Any], message: str
) -> None:
    before = set(run.rglob("*"))
    with pytest.raises(ValueError, match=message):
        evaluate(run=run, **options)
    assert set(run.rglob("*")) == before


def test_data_with_another_vocabulary_is_refused(run: Path) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    assert "tiny_symbols: 6" in text
    config.write_text(text.replace("tiny_symbols: 6", "tiny_symbols: 7"))
    with pytest.raises(ValueError, match="run: was made with another vocabulary"):
        evaluate(run=run)
    assert not (run / "scores.json").exists()

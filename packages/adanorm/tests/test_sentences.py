from dataclasses import replace
from pathlib import Path

import pytest
import torch
from separata_adanorm.build import NormKind
from separata_adanorm.classify import evaluate_sentences, train_sentences
from separata_adanorm.norms import AdaNorm
from separata_adanorm.probe import probe_run
from separata_adanorm.sentences import (
    Labelled,
    SentenceConfig,
    SentencePart,
    build_sentence_classifier,
    load_sentences,
    make_vocabulary,
)
from separata_shared.data.vocabulary import PAD
from separata_shared.training import TrainConfig
from torch import nn

CONFIG = SentenceConfig(
    vocabulary_size=40, max_tokens=400, width=16, num_heads=2, hidden_width=32, num_layers=2,
    dropout=0.0, tiny_sentences=1500,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=250, lr=5e-3, evaluate_every=25, monitor="accuracy", monitor_mode="max", device="cpu"
)


def test_rt_has_the_paper_sizes_and_no_sentence_twice(tmp_path: Path) -> None:
    for side in ("neg", "pos"):
        lines = "".join(f"{side} {number}\n" for number in range(5331))
        (tmp_path / f"rt-polarity.{side}").write_text(lines)
    config = replace(CONFIG, dataset="rt", raw=str(tmp_path))
    parts = load_sentences(config)
    assert [len(part) for part in parts] == [8608, 964, 1089]
    texts = [sentence.text for part in parts for sentence in part]
    assert len(set(texts)) == len(texts) == 10661
    assert all(s.label == s.text.startswith("pos") for part in parts for s in part)
    assert 0.4 < sum(s.label for s in parts.test) / len(parts.test) < 0.6
    assert load_sentences(config) == parts
    assert load_sentences(replace(config, split_seed=2)).test != parts.test
    (tmp_path / "rt-polarity.pos").write_text("too few\n")
    with pytest.raises(ValueError, match="5332 sentences, 10661 are needed"):
        load_sentences(config)


def test_sst5_lines_are_a_class_and_a_sentence(tmp_path: Path) -> None:
    for part in ("train", "dev", "test"):
        (tmp_path / f"stsa.fine.{part}").write_text(f"4 a {part} film\n0 no good\n")
    config = replace(CONFIG, dataset="sst5", raw=str(tmp_path))
    assert load_sentences(config).valid == [Labelled("a dev film", 4), Labelled("no good", 0)]
    (tmp_path / "stsa.fine.dev").write_text("4 good\n5 better\n")
    with pytest.raises(ValueError, match=r"stsa\.fine\.dev: line 2 does not begin with a class"):
        load_sentences(config)
    (tmp_path / "stsa.fine.dev").unlink()
    with pytest.raises(ValueError, match=r"stsa\.fine\.dev: no such file"):
        load_sentences(config)


def test_batches_hold_every_sentence_with_its_label() -> None:
    parts = load_sentences(CONFIG)
    vocabulary = make_vocabulary(CONFIG, parts.train)
    part = SentencePart(parts.train, vocabulary)
    for batches in (part.batches(400, seed=1)(0), part.in_order(400)):
        assert all(batch.tokens.numel() <= 400 for batch in batches)
        found = [
            (vocabulary.decode(row.tolist()), int(label))
            for batch in batches
            for row, label in zip(batch.tokens, batch.labels, strict=True)
        ]
        assert sorted(found) == sorted((s.text, s.label) for s in parts.train)


def test_every_norm_of_the_encoder_is_the_one_asked_for() -> None:
    model = build_sentence_classifier(SentenceConfig(C=1.5), 50)
    norms = [module for module in model.modules() if isinstance(module, AdaNorm)]
    # Two in each of four layers, and the one at the end.
    assert len(norms) == 9
    assert {norm.C for norm in norms} == {1.5}
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = build_sentence_classifier(CONFIG, 40).eval()
    tokens = torch.randint(4, 40, (3, 6))
    right = torch.cat([tokens, torch.full((3, 4), PAD)], dim=1)
    left = torch.cat([torch.full((3, 4), PAD), tokens], dim=1)
    for padded in (right, left):
        torch.testing.assert_close(model(padded), model(tokens), atol=1e-5, rtol=0)


NORMS: tuple[NormKind, ...] = ("no_norm", "ada_norm")


@pytest.mark.parametrize("kind", NORMS)
def test_made_reviews_are_learned(kind: NormKind, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_sentences(sentences=replace(CONFIG, norm=kind), train=TRAIN, run=run)
    found = evaluate_sentences(run=run)["metrics"]["accuracy"]
    test = load_sentences(CONFIG).test
    assert found["n"] == len(test) == 150
    # Who knows that good words are good, but not what "not" does, is right less often.
    votes = [sentence.text.count("good") - sentence.text.count("bad") for sentence in test]
    right = sum((vote > 0) == (s.label == 1) for vote, s in zip(votes, test, strict=True))
    assert found["value"] > max(80, 100 * right / len(test))


def test_a_run_keeps_its_vocabulary_and_its_norm(tmp_path: Path) -> None:
    run, short = tmp_path / "run", replace(TRAIN, steps=2)
    train_sentences(sentences=CONFIG, train=short, run=run)
    with pytest.raises(ValueError, match=r"vocabulary\.txt: was made with another vocabulary"):
        train_sentences(sentences=replace(CONFIG, vocabulary_size=12), train=short, run=run)
    with pytest.raises(ValueError, match="sentences is not what this command asks for"):
        train_sentences(sentences=replace(CONFIG, norm="layer_norm"), train=short, run=run)
    with pytest.raises(ValueError, match="nowhere: not a run directory"):
        evaluate_sentences(run=tmp_path / "nowhere")


def test_a_vocabulary_that_is_not_that_of_the_run_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_sentences(sentences=CONFIG, train=replace(TRAIN, steps=2), run=run)
    before = evaluate_sentences(run=run)
    (run / "scores.json").unlink()
    path = run / "vocabulary.txt"
    head, *words = path.read_text().splitlines()
    for others in (words[:-1], words[::-1], [*words, "more"], ["other", *words[1:]]):
        path.write_text("\n".join([head, *others]) + "\n")
        for read in (lambda: evaluate_sentences(run=run), lambda: probe_run(run)):
            with pytest.raises(ValueError, match=r"run/vocabulary\.txt: .* another vocabulary"):
                read()
    assert not (run / "scores.json").exists()
    path.write_text("\n".join([head, *words]) + "\n")
    assert evaluate_sentences(run=run) == before


def test_bad_settings_are_named() -> None:
    for name, value in (("num_heads", 5), ("dropout", 1.0), ("vocabulary_size", 4), ("width", 0)):
        with pytest.raises(ValueError, match=rf"sentences\.{name}"):
            SentenceConfig(**{name: value})  # type: ignore[arg-type]

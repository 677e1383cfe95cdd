import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from separata_adanorm.norms import AdaNorm
from separata_adanorm.parser import (
    NUM_FEATURES,
    Trees,
    attachment,
    derive,
    parse_encoded,
    parse_sentences,
    state_features,
)
from separata_adanorm.parsing import (
    ParserConfig,
    build_parser,
    evaluate_parser,
    keep_lexicon,
    load_parser,
    load_treebank,
    parse,
    parse_text,
    scored_tags,
    to_conllu,
    train_parser,
)
from separata_adanorm.transitions import States
from separata_adanorm.treebank import Lexicon, Sentence, tiny
from separata_shared.training import Run, TrainConfig

CONFIG = ParserConfig(
    tiny_sentences=300, min_count=1, batch_size=256, embedding_width=12, hidden_width=48
)
TRAIN = TrainConfig(
    steps=160, lr=1e-2, evaluate_every=40, monitor="uas", monitor_mode="max", device="cpu"
)
CROSSED = Sentence(("noun0", "verb0", "noun1", "noun2"), ("NOUN",) * 4, (3, 0, 2, 1), ("obj",) * 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("parser") / "run"
    train_parser(parser=CONFIG, train=TRAIN, run=run)
    return run


def test_a_parser_learns_the_made_trees(trained: Path) -> None:
    scores = evaluate_parser(run=trained)
    assert json.loads((trained / "scores.json").read_text()) == scores
    test = load_treebank(CONFIG).test
    words = sum(map(len, test))
    to_the_left = sum(head == word for sentence in test for word, head in enumerate(sentence.heads))
    assert scores["metrics"]["uas"]["n"] == words
    # Better than hanging every word onto the one before it, and almost without error.
    assert scores["metrics"]["uas"]["value"] > 95 > 100 * to_the_left / words
    assert scores["metrics"]["las"]["value"] <= scores["metrics"]["uas"]["value"]
    assert json.loads((trained / "training.json").read_text())["left out"] == 0


def test_a_refused_run_stays_as_it_is(trained: Path) -> None:
    scores = evaluate_parser(run=trained)
    files = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"config\.yaml: parser is not what this command asks"):
        train_parser(parser=replace(CONFIG, min_count=9), train=TRAIN, run=trained)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == files
    assert evaluate_parser(run=trained) == scores


def test_a_run_keeps_its_lexicon(tmp_path: Path) -> None:
    sentences = tiny(20).train
    keep_lexicon(Lexicon.of(sentences, min_count=1), tmp_path)
    kept = (tmp_path / "lexicon.json").read_bytes()
    keep_lexicon(Lexicon.of(sentences, min_count=1), tmp_path)
    with pytest.raises(ValueError, match=r"lexicon\.json: is of another treebank or parser\.min_c"):
        keep_lexicon(Lexicon.of(sentences, min_count=9), tmp_path)
    assert (tmp_path / "lexicon.json").read_bytes() == kept


def test_uas_of_the_files_written_is_the_one_reported(trained: Path) -> None:
    parser = load_parser(trained)
    test = list(load_treebank(CONFIG).test)
    found = parse_sentences(parser.network, test, parser.lexicon, batch=7)
    assert [sentence.words for sentence in found] == [sentence.words for sentence in test]
    heads, expected = ([head for s in trees for head in s.heads] for trees in (found, test))
    uas = 100 * sum(a == b for a, b in zip(heads, expected, strict=True)) / len(heads)
    assert uas == pytest.approx(evaluate_parser(run=trained)["metrics"]["uas"]["value"])
    for sentence in found:
        assert sentence.heads.count(0) == 1


def test_a_sentence_is_parsed_the_same_alone_and_among_others(trained: Path) -> None:
    parser = load_parser(trained)
    sentences = list(load_treebank(CONFIG).test[:10])
    together = parse_sentences(parser.network, sentences, parser.lexicon)
    alone = [parse_sentences(parser.network, [s], parser.lexicon)[0] for s in sentences]
    assert together == alone


def test_words_are_parsed_without_tags_and_written_as_conllu(trained: Path) -> None:
    text = parse_text(load_parser(trained), "det0 noun1 verb2\n\ndet1 strange verb0\n", source="")
    sentences = [block.split("\n") for block in text.strip().split("\n\n")]
    assert [len(rows) for rows in sentences] == [3, 3]
    rows = [row.split("\t") for row in sentences[0]]
    assert all(len(row) == 10 for row in rows)
    assert [row[1] for row in rows] == ["det0", "noun1", "verb2"]
    assert [row[3] for row in rows] == ["DET", "NOUN", "VERB"]
    assert [row[6] for row in rows] == ["2", "3", "0"]
    assert [row[7] for row in rows] == ["det", "nsubj", "root"]


def test_conllu_keeps_everything_but_heads_and_labels(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("conllu", reason="CoNLL-U needs the extra treebank")
    given = (
        "# sent_id = 7\n"
        "1-2\tdet0noun1\t_\t_\t_\t_\t_\t_\t_\t_\n"
        "1\tdet0\ta\tDET\tX\tCase=Nom\t0\troot\t0:root\tNote=1\n"
        "2\tnoun1\tb\tNOUN\t_\t_\t1\tdep\t_\t_\n"
        "3\tverb2\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No\n\n"
    )
    (tmp_path / "in.conllu").write_text(given)
    parse(run=trained, input=tmp_path / "in.conllu", output=tmp_path / "out.conllu")
    rows = (tmp_path / "out.conllu").read_text().split("\n")
    assert rows[:2] == given.split("\n")[:2]
    assert rows[2] == "1\tdet0\ta\tDET\tX\tCase=Nom\t2\tdet\t_\tNote=1"
    assert rows[3] == "2\tnoun1\tb\tNOUN\t_\t_\t3\tnsubj\t_\t_"
    # The word without a tag gets its usual one.
    assert rows[4] == "3\tverb2\t_\tVERB\t_\t_\t0\troot\t_\tSpaceAfter=No"


def test_blocks_without_words_and_columns_that_are_missing(trained: Path) -> None:
    pytest.importorskip("conllu", reason="CoNLL-U needs the extra treebank")
    given = "# text = none\n\n1-2\tab\t_\n\n1\tdet0\ta\n2\tnoun1\tb\n3\tverb2\tc\n\n"
    found = parse_text(load_parser(trained), given, source="")
    assert found == (
        "1\tdet0\ta\tDET\t_\t_\t2\tdet\t_\t_\n"
        "2\tnoun1\tb\tNOUN\t_\t_\t3\tnsubj\t_\t_\n"
        "3\tverb2\tc\tVERB\t_\t_\t0\troot\t_\t_\n\n"
    )


def test_standard_input_must_be_utf_8(trained: Path, command: Callable[..., Any]) -> None:
    refused = command("parse", "--run", trained, stdin=b"det0 noun1\nd\xe9t0\n")
    refused.refused("standard input: line 2 is not valid UTF-8")


def test_sentences_with_crossing_arcs_are_left_out_and_counted() -> None:
    sentences = [*tiny(20).train, CROSSED]
    lexicon = Lexicon.of(sentences, min_count=1)
    derivations = derive(lexicon.encode(sentences), lexicon)
    assert (derivations.sentences, derivations.left_out) == (20, 1)
    assert len(derivations.transitions) == 2 * sum(map(len, sentences[:-1]))
    assert derivations.features.shape == (len(derivations.transitions), NUM_FEATURES)


def test_a_validation_part_without_derivations_has_a_score_and_no_loss(tmp_path: Path) -> None:
    pytest.importorskip("conllu", reason="CoNLL-U needs the extra treebank")
    straight, crossed = (to_conllu(tree, tags="upos") for tree in (tiny(20).train[0], CROSSED))
    config = replace(CONFIG, dataset="conllu", raw=str(tmp_path))
    for part, text in (("train", straight), ("dev", crossed), ("test", crossed)):
        (tmp_path / f"{part}.conllu").write_text(text)
    train = replace(TRAIN, steps=1, evaluate_every=1)
    train_parser(parser=config, train=train, run=tmp_path / "run")
    (judged,) = [r for r in Run(tmp_path / "run").records() if r["kind"] == "evaluate"]
    assert judged.keys() & {"loss", "accuracy", "uas", "las"} == {"uas", "las"}
    (tmp_path / "train.conllu").write_text(crossed)
    with pytest.raises(ValueError, match=r"no sentence of the training part has a projective"):
        train_parser(parser=config, train=train, run=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_features_are_words_tags_and_labels_of_one_table() -> None:
    sentences = tiny(20).train
    lexicon = Lexicon.of(sentences, min_count=1)
    encoded = lexicon.encode(sentences)
    features = state_features(States(encoded.lengths), encoded, lexicon)
    words, tags, labels = np.split(features, [18, 36], axis=1)
    # At the start the root is on the stack, and the first three words are ahead.
    assert (words[:, 0] == lexicon.words.index("<root>")).all()
    assert np.array_equal(words[:, 3:6], encoded.words[:, 1:4])
    assert np.array_equal(tags[:, 3:6], encoded.tags[:, 1:4])
    assert ((words < lexicon.first_tag) & (tags >= lexicon.first_tag)).all()
    assert (labels == lexicon.first_label).all()
    derived = derive(encoded, lexicon).features
    assert int(derived.max()) == lexicon.size - 1
    found = derived[:, 36:].unique().tolist()
    # Every label becomes a feature but that of the root, which is attached last.
    assert len(found) == len(lexicon.labels)


def test_attachment_counts_scored_words_only() -> None:
    sentence = Sentence(("a", "b", "."), ("X", "Y", "."), (2, 0, 2), ("l", "r", "p"))
    lexicon = Lexicon.of([sentence], min_count=1)
    encoded = lexicon.encode([sentence])
    trees = Trees(encoded.heads.copy(), encoded.labels.copy())
    trees.heads[0, 3] = 1  # the full stop
    trees.labels[0, 1] = lexicon.labels.index("p")
    everything = attachment(trees, encoded, scored_tags(CONFIG, lexicon))
    assert (everything.words, everything.heads, everything.labelled) == (3, 2, 1)
    config = replace(CONFIG, unscored_tags=["."])
    without = attachment(trees, encoded, scored_tags(config, lexicon))
    assert (without.words, without.uas, without.las) == (2, 100.0, 50.0)
    with pytest.raises(ValueError, match=r"parser\.unscored_tags: '!' is no tag"):
        scored_tags(replace(CONFIG, unscored_tags=["!"]), lexicon)
    with pytest.raises(ValueError, match=r"parser\.unscored_tags: holds every tag"):
        scored_tags(replace(CONFIG, unscored_tags=["X", "Y", "."]), lexicon)


def test_the_norm_stands_before_the_activation_and_has_no_parameters() -> None:
    lexicon = Lexicon.of(tiny(20).train, min_count=1)
    model = build_parser(replace(CONFIG, C=2.0), lexicon)
    assert isinstance(model.norm, AdaNorm)
    assert model.norm.C == 2.0
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = derive(lexicon.encode(tiny(20).train), lexicon).features[:5]
    scores = model.eval()(features)
    torch.testing.assert_close(scores, model.output(seen[0].relu()))


def test_every_tree_of_an_untrained_parser_is_complete() -> None:
    sentences = tiny(20).train
    lexicon = Lexicon.of(sentences, min_count=1)
    torch.manual_seed(0)
    encoded = lexicon.encode(sentences)
    trees = parse_encoded(build_parser(CONFIG, lexicon).eval(), encoded, lexicon)
    assert np.array_equal(trees.heads >= 0, encoded.heads >= 0)
    assert ((trees.heads == 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize("sentences", [0, 2])
def test_a_file_too_small_for_three_parts_is_named(tmp_path: Path, sentences: int) -> None:
    path = tmp_path / "small.dp"
    path.write_text("\n" + "Yes\tUH\t0\n\n" * sentences)
    with pytest.raises(ValueError, match=rf"small\.dp: .* need 3 sentences, not {sentences}"):
        load_treebank(ParserConfig(dataset="ptb_sample", raw=str(path)))


def test_a_treebank_of_files(tmp_path: Path) -> None:
    pytest.importorskip("conllu", reason="CoNLL-U needs the extra treebank")
    row = "1\t{}\t_\tX\tY\t_\t0\troot\t_\t_\n\n"
    for part in ("train", "dev", "test"):
        (tmp_path / f"xx-ud-{part}.conllu").write_text(row.format(part))
    config = ParserConfig(dataset="conllu", raw=str(tmp_path), tags="xpos")
    trees = load_treebank(config)
    assert [part[0].words for part in (trees.train, trees.valid, trees.test)] == [
        ("train",), ("dev",), ("test",)
    ]  # fmt: skip
    assert trees.train[0].tags == ("Y",)
    (tmp_path / "xx-ud-dev.conllu").unlink()
    with pytest.raises(ValueError, match=r"needs one file \*dev\.conllu, has 0"):
        load_treebank(config)


def test_bad_settings_are_named(tmp_path: Path) -> None:
    for name, value in (("min_count", 0), ("dropout", 1.0), ("hidden_width", 0)):
        with pytest.raises(ValueError, match=rf"parser\.{name}"):
            ParserConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nowhere: not a run directory"):
        evaluate_parser(run=tmp_path / "nowhere")

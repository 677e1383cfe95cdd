from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.data.vocabulary import (
    BOS,
    EOS,
    PAD,
    SPECIALS,
    UNK,
    Vocabulary,
    frequent_words,
    train_subwords,
    word_vocabulary,
)

LINES = ["der Hund läuft über die Straße", "ein Mann spielt Gitarre", "zwei Hunde spielen"] * 4


@pytest.fixture(scope="module")
def subwords() -> Vocabulary:
    return train_subwords(LINES, 50)


@pytest.fixture(params=["words", "subwords"])
def vocabulary(request: pytest.FixtureRequest, subwords: Vocabulary) -> Vocabulary:
    return subwords if request.param == "subwords" else frequent_words(LINES, 50)


def test_special_tokens_have_fairseqs_numbers(vocabulary: Vocabulary) -> None:
    assert (BOS, PAD, EOS, UNK) == (0, 1, 2, 3)
    assert vocabulary.pieces[:4] == SPECIALS
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.unk) == (0, 1, 2, 3)


def test_training_text_comes_back_from_its_tokens(vocabulary: Vocabulary) -> None:
    for line in LINES:
        ids = vocabulary.encode(line)
        assert ids.dtype == np.int32
        assert ids[-1] == EOS
        assert not set(ids[:-1].tolist()) & {BOS, PAD, EOS, UNK}
        assert ids.max() < len(vocabulary)
        assert vocabulary.decode(ids) == line


@given(st.lists(st.text(sorted(set("".join(LINES)) - {" "}), min_size=1), max_size=6))
def test_subwords_give_back_any_text_of_known_characters(words: list[str]) -> None:
    line = "  ".join(words)
    assert _SUBWORDS.decode(_SUBWORDS.encode(line)) == " ".join(words)


_SUBWORDS = train_subwords(LINES, 32, kind="unigram")


def test_decoding_ends_at_eos_and_skips_bos_and_pad(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("ein Mann spielt Gitarre").tolist()
    assert vocabulary.decode([BOS, PAD, *ids, *ids]) == "ein Mann spielt Gitarre"
    assert vocabulary.decode([]) == vocabulary.decode([EOS]) == ""


def test_an_empty_line_is_eos_alone(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode("").tolist() == vocabulary.encode("  ").tolist() == [EOS]


def test_the_unknown_becomes_unk_and_is_shown(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("漢")
    assert UNK in ids
    assert "<unk>" in vocabulary.decode(ids)


def test_special_tokens_cannot_be_written_in_text(vocabulary: Vocabulary) -> None:
    for special in SPECIALS:
        assert not set(vocabulary.encode(special)[:-1].tolist()) & {BOS, PAD, EOS}


@pytest.mark.parametrize("token", [-1, 10_000])
def test_a_number_outside_is_refused(vocabulary: Vocabulary, token: int) -> None:
    with pytest.raises(ValueError, match=f"token {token} lies outside"):
        vocabulary.decode([token])


def test_saved_is_loaded_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "vocabulary")
    again = Vocabulary.load(tmp_path / "vocabulary")
    assert again.fingerprint == vocabulary.fingerprint
    assert again.pieces == vocabulary.pieces
    assert again.encode(LINES[0]).tolist() == vocabulary.encode(LINES[0]).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary"]


def test_learning_twice_gives_the_same_bytes(subwords: Vocabulary) -> None:
    assert train_subwords(iter(LINES), 50).fingerprint == subwords.fingerprint
    assert train_subwords(LINES, 49).fingerprint != subwords.fingerprint


def test_another_vocabulary_is_an_error_that_names_the_owner(subwords: Vocabulary) -> None:
    subwords.check(subwords.fingerprint, "runs/a")
    with pytest.raises(ValueError, match="runs/a: was made with another vocabulary"):
        subwords.check(word_vocabulary(["a"]).fingerprint, "runs/a")


def test_words_are_taken_by_frequency_then_order() -> None:
    vocabulary = frequent_words(["b a c", "c b", "d c <unk>"], 4 + 3)
    assert vocabulary.pieces[4:] == ("c", "b", "a")
    assert vocabulary.encode("a d c").tolist() == [6, UNK, 4, EOS]


@pytest.mark.parametrize("words", [[], ["a", "a"], ["a b"], [""], ["</s>"]])
def test_unusable_word_lists_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="word"):
        word_vocabulary(words)


@pytest.mark.parametrize(
    ("size", "problem"), [(5000, "too large .* at most"), (6, "too small"), (0, "size 0")]
)
def test_an_impossible_size_is_one_clear_line(size: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as raised:
        train_subwords(LINES, size)
    assert "\n" not in str(raised.value)


def test_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be learned"):
        train_subwords([], 50)


def test_damaged_and_missing_files_are_named(subwords: Vocabulary, tmp_path: Path) -> None:
    subwords.save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:100])
    (tmp_path / "words").write_bytes(b"words\na\na\n")
    for name in ("cut", "words", "none"):
        with pytest.raises(ValueError, match=str(tmp_path / name)):
            Vocabulary.load(tmp_path / name)


def test_a_model_with_other_special_numbers_is_refused(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=50,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"foreign\.model: not a usable vocabulary .*bos, pad"):
        Vocabulary.load(tmp_path / "foreign.model")

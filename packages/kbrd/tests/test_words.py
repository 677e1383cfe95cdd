"""Words of a text and the vocabulary."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from separata_kbrd.words import (
    END,
    NULL,
    SLOT,
    SPECIALS,
    START,
    UNK,
    Vocabulary,
    join_words,
    learn_vocabulary,
    split_words,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I can't; you cannot.", "i ca n't ; you can not ."),
        ("Good one. Bye", "good one . bye"),  # a full stop inside the text ends a sentence
        ("See Mr. Bean vs. J. Doe etc. now.", "see mr. bean vs. j. doe etc. now ."),
        ("It has 2. and (this.) too", "it has 2. and ( this . ) too"),
        ("wait... what?!", "wait ... what ? !"),
        ("one\ntwo", "one two"),  # a line break gives no token
        (f"did you see {SLOT}? or {SLOT}.", f"did you see {SLOT} ? or {SLOT} ."),
        ("", ""),
        ("\U0001f600 ok \u4e2d\u6587", "\U0001f600 ok \u4e2d\u6587"),
    ],
)
def test_words_of_a_text(text, words):
    assert split_words(text) == words.split()


def test_quotation_marks_are_those_of_the_treebank():
    assert split_words('say "hi" now') == ["say", "``", "hi", "''", "now"]


@given(st.text())
def test_any_text_gives_words_without_spaces(text):
    for word in split_words(text):
        assert word.split() == [word]


@pytest.mark.parametrize("piece", ["a.' ", "'", '"', "x", ". ", "gimme ", "\U0001f600", "(", "$"])
def test_ten_thousand_characters_take_no_time(piece):
    split_words("warm up")
    start = time.process_time()
    split_words(piece * (10_000 // len(piece)))
    assert time.process_time() - start < 1  # a quadratic rule takes several seconds


def test_joined_words_read_well():
    assert (
        join_words(split_words("Don't you like it? It's good.")) == "don't you like it? it's good."
    )


def test_the_vocabulary_is_ordered_by_count_and_then_by_word():
    texts = [["b", "a", "c"], ["c", SLOT, "b"], [SLOT, "__unk__"]]
    vocabulary = learn_vocabulary(texts, slots="separate")
    assert vocabulary.pieces == (*SPECIALS, SLOT, "b", "c", "a")
    shared = learn_vocabulary(texts, slots="shared")
    assert shared.pieces == (*SPECIALS, "b", "c", "a")


def test_the_slot_and_the_unknown_word_are_two_tokens_unless_shared():
    separate = Vocabulary(["see"], slots="separate")
    assert separate.encode(f"see {SLOT} now") == [5, 4, UNK]
    assert separate.slot == 4
    shared = Vocabulary(["see"], slots="shared")
    assert shared.encode(f"see {SLOT} now") == [4, UNK, UNK]
    assert shared.slot == UNK


def test_marks_that_somebody_types_are_unknown_words():
    vocabulary = Vocabulary(["see"])
    assert vocabulary.encode("__null__ __start__ __end__ __unk__") == [UNK] * 4


def test_decoding_stops_at_the_end_and_leaves_out_padding():
    vocabulary = Vocabulary(["see", "it"])
    assert vocabulary.decode([START, 5, NULL, 4, 6, END, 5]) == ["see", SLOT, "it"]
    with pytest.raises(ValueError, match="token 7 lies outside a vocabulary of 7"):
        vocabulary.decode([7])


def test_a_vocabulary_comes_back_from_its_file(tmp_path):
    vocabulary = Vocabulary(["\u00e9t\u00e9", "it", "'s"], slots="shared")
    vocabulary.save(tmp_path / "v.txt")
    read = Vocabulary.load(tmp_path / "v.txt")
    assert (read.pieces, read.slots) == (vocabulary.pieces, "shared")
    assert read.fingerprint == vocabulary.fingerprint
    assert read.fingerprint != Vocabulary(vocabulary.words).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words\na\n", "not a vocabulary of KBRD"),
        ("slots: separate\na\nb", "not a vocabulary of KBRD"),  # cut off
        ("slots: separate\na\na\n", "'a' cannot be a word"),
        ("slots: separate\n", "at least one word"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path, content, message):
    (tmp_path / "v.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"v\.txt: .*{message}"):
        Vocabulary.load(tmp_path / "v.txt")

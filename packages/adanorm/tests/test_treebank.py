from pathlib import Path

import numpy as np
import pytest
from separata_adanorm.treebank import (
    NONE,
    ROOT,
    SPECIALS,
    UNKNOWN,
    Lexicon,
    Sentence,
    read_conllu,
    read_dp,
    split_in_order,
    tiny,
)

# The example of a token of two words and of an empty node in the description of CoNLL-U.
CONLLU = """\
# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\tV\tMood=Imp\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tP\tCase=Acc\t1\tobj\t_\t_
2.1\tvamos\tir\tVERB\t_\t_\t_\t_\t1:conj\t_
3\tal\tal\tADP\t_\t_\t4\tcase\t_\t_
4\tmar\tmar\tNOUN\tN\t_\t1\tobl:arg\t_\tSpaceAfter=No

1\tSí\tsí\tINTJ\tI\t_\t0\troot\t_\t_

"""


def read(text: str) -> list[Sentence]:
    pytest.importorskip("conllu", reason="CoNLL-U needs the extra treebank")
    return read_conllu(text, tags="upos", source="text")


def test_trees_of_conllu_are_over_words() -> None:
    first, second = read(CONLLU)
    assert first.words == ("vamos", "nos", "al", "mar")
    assert first.tags == ("VERB", "PRON", "ADP", "NOUN")
    assert first.heads == (0, 1, 4, 1)
    assert first.labels == ("root", "obj", "case", "obl:arg")
    assert second == Sentence(("Sí",), ("INTJ",), (0,), ("root",))


def test_the_other_column_of_tags_can_be_read_and_may_have_gaps() -> None:
    pytest.importorskip("conllu", reason="CoNLL-U needs the extra treebank")
    first, _ = read_conllu(CONLLU, tags="xpos", source="text")
    assert first.tags == ("V", "P", "_", "N")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\t1\tobj", "\t9\tobj", "sentence 1: word 2 has the head 9"),
        ("\t1\tobj", "\t2\tobj", "sentence 1: word 2 has the head 2"),
        ("4\tcase", "_\tcase", "text: sentence 1: word 3 has no head"),
        (CONLLU, "\n", "holds no sentence"),
        ("1\tvamos\t", "x\tvamos\t", "text: not CoNLL-U"),
    ],
)
def test_bad_conllu_is_named(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(CONLLU.replace(old, new))


def test_columns_of_word_tag_and_head(tmp_path: Path) -> None:
    path = tmp_path / "sample.dp"
    path.write_text("Mr.\tNNP\t2\nVinken\tNNP\t3\nis\tVBZ\t0\n\nYes\tUH\t0\n")
    first, second = read_dp(path)
    assert first == Sentence(("Mr.", "Vinken", "is"), ("NNP", "NNP", "VBZ"), (2, 3, 0), ("_",) * 3)
    assert second.words == ("Yes",)
    path.write_text("Mr.\tNNP\nVinken\tNNP\t3\n")
    with pytest.raises(ValueError, match=r"sample\.dp: line 1 is not word, tag and head"):
        read_dp(path)
    path.write_text("Mr.\tNNP\t²\n")
    with pytest.raises(ValueError, match=r"sample\.dp: line 1 is not word, tag and head"):
        read_dp(path)
    path.write_text("Mr.\tNNP\t4\nVinken\tNNP\t0\n")
    with pytest.raises(
        ValueError, match=r"sample\.dp: sentence before line 3: word 1 has the head"
    ):
        read_dp(path)


def test_the_last_tenths_are_held_out() -> None:
    sentences = [Sentence((str(number),), ("X",), (0,), ("_",)) for number in range(43)]
    parts = split_in_order(sentences)
    assert [len(part) for part in (parts.train, parts.valid, parts.test)] == [35, 4, 4]
    assert [*parts.train, *parts.valid, *parts.test] == sentences


def test_a_lexicon_knows_what_is_frequent_and_the_usual_tags(tmp_path: Path) -> None:
    one = Sentence(
        ("a", "run", "a", "odd"), ("D", "V", "D", "N"), (2, 0, 4, 2), ("d", "r", "d", "o")
    )
    two = Sentence(("run", "run"), ("N", "N"), (2, 0), ("c", "r"))
    lexicon = Lexicon.of([one, two], min_count=2)
    assert set(lexicon.words) == {*SPECIALS, "a", "run"}
    assert set(lexicon.tags) == {*SPECIALS, "D", "V", "N"}
    assert sorted(lexicon.labels) == ["c", "d", "o", "r"]
    assert lexicon.size == len(lexicon.words) + len(lexicon.tags) + 1 + len(lexicon.labels)
    assert [lexicon.usual_tag(word) for word in ("a", "run", "odd", "new")] == ["D", "N", "N", "N"]
    lexicon.save(tmp_path / "lexicon.json")
    again = Lexicon.load(tmp_path / "lexicon.json")
    assert vars(again) == vars(lexicon)
    (tmp_path / "lexicon.json").write_text('{"words": []}')
    with pytest.raises(ValueError, match=r"lexicon\.json: not a lexicon"):
        Lexicon.load(tmp_path / "lexicon.json")


def test_sentences_become_arrays_from_long_to_short() -> None:
    long = Sentence(("a", "b", "new"), ("X", "Y", "X"), (2, 0, 2), ("l", "r", "l"))
    short = Sentence(("b",), ("Y",), (0,), ("r",))
    lexicon = Lexicon.of([short, long], min_count=1)
    other = Sentence(("unseen", "b"), ("Z", "Y"), (2, 0), ("strange", "r"))
    encoded = lexicon.encode([short, long, other])
    assert encoded.order.tolist() == [1, 2, 0]
    assert encoded.lengths.tolist() == [3, 2, 1]
    b, y = lexicon.words.index("b"), lexicon.first_tag + lexicon.tags.index("Y")
    assert encoded.words[1].tolist() == [ROOT, UNKNOWN, b, NONE, NONE]
    assert encoded.tags[1].tolist() == [
        lexicon.first_tag + number for number in (ROOT, UNKNOWN, y - lexicon.first_tag, NONE, NONE)
    ]
    assert encoded.heads[1].tolist() == [-1, 2, 0, -1, -1]
    assert encoded.labels[1].tolist() == [-1, -1, lexicon.labels.index("r"), -1, -1]
    assert np.array_equal(encoded.heads[0], [-1, 2, 0, 2, -1])


def test_made_trees_are_different_and_repeatable() -> None:
    trees = tiny(50)
    assert [len(part) for part in (trees.train, trees.valid, trees.test)] == [50, 5, 5]
    assert tiny(50) == trees
    assert tiny(50, seed=2) != trees
    assert all(sentence.heads.count(0) == 1 for sentence in trees.train)

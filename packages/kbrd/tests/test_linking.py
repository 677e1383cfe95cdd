"""Titles in unseen text."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from separata_kbrd.graph import Catalogue
from separata_kbrd.linking import TitleLinker

CHINESE, RUSSIAN = "\u9ed1\u5ba2\u5e1d\u56fd", "\u041b\u0435\u0432\u0438\u0430\u0444\u0430\u043d"
NAMES = [
    "Heat (1995)",
    "Heat (1986)",
    "It (2017)",
    "It (1990)",
    "The Matrix (1999)",
    "Up (2009)",
    "Matrix (1993)",
    "Star Wars: The Last Jedi (2017)",
    "Star Wars",
    "Am\u00e9lie (2001)",
    "Ocean's Eleven (2001)",
    "Blade Runner (1982)",
    "Blade Runner 2049 (2017)",
    "Rocky II (1979)",
    "Usual Suspects, The (1995)",
    "Thelma & Louise (1991)",
    "1917 (2019)",
    f"{CHINESE} (1999)",
    "Wonder Woman (2017)",
    "The One (2001)",
    f"{RUSSIAN} (2014)",
    "...",
    "Seven (Se7en) (1995)",
]


@pytest.fixture(scope="module")
def linker():
    return TitleLinker(
        Catalogue(
            ids=tuple(str(100 + n) for n in range(len(NAMES))),
            nodes=np.arange(len(NAMES)),
            names=tuple(NAMES),
            mentions=np.array([len(NAMES) - n for n in range(len(NAMES))]),
        )
    )


def found(linker, text):
    """Names of the candidates of each mention."""
    return [[NAMES[n] for n in mention.candidates] for mention in linker.find(text)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("i liked blade runner a lot", [["Blade Runner (1982)"]]),
        ("i liked BLADE RUNNER 2049!", [["Blade Runner 2049 (2017)"]]),  # the longest match
        ("up to blade runner, rocky ii", [["Blade Runner (1982)"], ["Rocky II (1979)"]]),
        ("amelie or Am\u00e9lie?", [["Am\u00e9lie (2001)"]] * 2),
        ("oceans eleven, ocean\u2019s eleven", [["Ocean's Eleven (2001)"]] * 2),
        ("rocky 2", [["Rocky II (1979)"]]),
        ("The usual suspects", [["Usual Suspects, The (1995)"]]),
        ("thelma and louise", [["Thelma & Louise (1991)"]]),
        ("star wars: the last jedi", [["Star Wars: The Last Jedi (2017)"]]),
        ("star wars", [["Star Wars"]]),  # a name of its own counts more than an alias
        ("i like seven", [["Seven (Se7en) (1995)"]]),
        (f"\u6211\u559c\u6b22{CHINESE}\uff01", [[f"{CHINESE} (1999)"]]),
        (
            f"\u043d\u0440\u0430\u0432\u0438\u0442\u0441\u044f {RUSSIAN.lower()}",
            [[f"{RUSSIAN} (2014)"]],
        ),
        ("\U0001f600amelie\U0001f600", [["Am\u00e9lie (2001)"]]),
        ("see @104 and @999", [["The Matrix (1999)"]]),
        ("nothing here", []),
        ("", []),
        ("...", []),
    ],
)
def test_titles_in_a_text(linker, text, names):
    assert found(linker, text) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("heat", [["Heat (1995)", "Heat (1986)"]]),  # the most mentioned first
        ("Heat (1986)", [["Heat (1986)"]]),
        ("heat 1986 please", [["Heat (1986)"]]),
        ("the 1995 heat", [["Heat (1995)"]]),
        ("heat from 1986", [["Heat (1986)"]]),
        ("heat, 1986", [["Heat (1986)"]]),
        ("it (1990) or It 2017", [["It (1990)"], ["It (2017)"]]),
        ("matrix 1993", [["Matrix (1993)"]]),
        ("the matrix (1999)", [["The Matrix (1999)"]]),
        ("1917 (2019)", [["1917 (2019)"]]),
        ("i saw heat in 2005", [["Heat (1995)", "Heat (1986)"]]),  # the year of something else
    ],
)
def test_a_year_chooses_among_items_of_one_title(linker, text, names):
    assert found(linker, text) == names


@pytest.mark.parametrize("text", ["Heat (2007)", "wonder woman 1984"])
def test_a_year_of_no_item_says_that_the_item_is_unknown(linker, text):
    (mention,) = linker.find(text)
    assert str(mention.other_year) in text
    assert mention.text == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("it is up to me", 0),
        ("the one i saw", 0),
        ("i saw 1917 films", 0),
        ("i saw It yesterday", 1),
        ('i saw "up"', 1),
        ("\u201cIt\u201d was great", 1),
        ("it", 1),
        ("Up!", 1),
        (
            "It is raining. It is cold. Up",
            0,
        ),  # at the beginning of a sentence capitals mean nothing
        ("WHAT IS UP", 0),  # all in capitals: they mean nothing
    ],
)
def test_an_ordinary_word_needs_a_sign_that_it_is_a_title(linker, text, count):
    assert len(linker.find(text)) == count


@given(st.text())
def test_mentions_lie_in_the_text_in_order_and_do_not_overlap(linker, text):
    check(linker, text)


@given(st.lists(st.sampled_from([*NAMES, "(1995)", "the", "@104", "\U0001f600", "1986"])))
def test_mentions_of_many_titles_do_not_overlap(linker, parts):
    check(linker, " ".join(parts))


def check(linker, text):
    end = 0
    for mention in linker.find(text):
        assert end <= mention.start < mention.end <= len(text)
        assert mention.text == text[mention.start : mention.end]
        assert mention.candidates
        end = mention.end


@pytest.mark.parametrize("piece", ["it ", "star wars ", "1995 ", CHINESE[0], "\U0001f600", "'"])
def test_time_is_linear_in_the_text(linker, piece):
    def seconds(characters: int) -> float:
        text = piece * (characters // len(piece))
        times = []
        for _ in range(3):  # the least of three: other programs disturb
            start = time.process_time()
            linker.find(text)
            times.append(time.process_time() - start)
        return min(times)

    short = seconds(10_000)
    assert short < 0.5
    # Five times the text takes at most 15 times as long (and not 25).
    assert seconds(50_000) < 15 * max(short, 0.01)


def test_every_title_of_a_catalogue_is_found_by_its_whole_name(linker):
    for number, name in enumerate(NAMES):
        if name != "...":  # nothing but signs
            assert number in linker.find(f"hello: {name}")[0].candidates

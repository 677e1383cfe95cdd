"""Names in running text: words in the form in which names are compared, and a trie of names.

Finding names takes time linear in the text: names are paths of words in the trie, and a text is
read from left to right.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

MAX_WORDS = 32
"""Words of the longest name that is looked for."""
_COMMON = """
a about after all am an and any are as at back be because been before being best big bye can could
day did do does done down for from fun get go going good got great had happy has have he hello
help her here hi him his home how i if in into is it its just know let life like little look lot
love made man many may me more most movie movies much must my need never new next nice no not now
of off oh ok on once one only or other our out over own people please read really right said same
saw say see seen she should show so some something soon sorry still such super take thank thanks
that the their them then there these they thing things think this time to too try two under up us
very want was watch we welcome well went were what when where which while who why will with would
yes yet you your
"""
COMMON = frozenset(_COMMON.split())
"""Words that a name may not consist of without a sign that it is one."""


# Scripts without spaces give a word for each character, others for each run of letters or digits.
_SINGLE = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(f"[{_SINGLE}]|[^\\W_{_SINGLE}]+|&")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_LETTER_APOSTROPHE = "\u02bc"  # a letter to regular expressions, and as long as the sign
_QUOTES = frozenset("\"'*\u201c\u2018\u00ab\u201d\u2019\u00bb\u300a\u300b\u300c\u300d")


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a text in the form in which names are compared, and its place."""

    form: str
    start: int
    end: int


class Text:
    """A text and its words.

    Args:
        text: The text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = words_of(text)

    @cached_property
    def _shouts(self) -> bool:
        return self.text.upper() == self.text

    def between(self, place: int) -> str:
        """What stands between a word and the one before it."""
        before = self.words[place - 1].end if place else 0
        return self.text[before : self.words[place].start]

    def is_meant(self, place: int, after: int) -> bool:
        """Whether the words from ``place`` to before ``after`` are meant as a name.

        A name that is also an ordinary word or phrase ("It", "Up", "The One") needs a sign:
        quotation marks, a capital letter inside a sentence, or nothing else in the text.
        """
        words = self.words[place:after]
        if not is_ordinary([word.form for word in words]):
            return True
        start, end = words[0].start, words[-1].end
        if start and self.text[start - 1] in _QUOTES and self.text[end : end + 1] in _QUOTES:
            return True
        if place == 0 and after == len(self.words):
            return True
        inside = place and not set(".!?:\n") & set(self.between(place))
        capital = all(self.text[word.start].isupper() for word in words)
        return bool(inside) and capital and not self._shouts and words[0].form != "i"


def words_of(text: str) -> list[Word]:
    """Words without case, accents and apostrophes, and where they stand.

    >>> [word.form for word in words_of("Am\u00e9lie & the Ocean's 11")]
    ['amelie', 'and', 'the', 'oceans', '11']
    """
    found = _WORD.finditer(_APOSTROPHE.sub(_LETTER_APOSTROPHE, text))
    return [Word(_form(one[0]), one.start(), one.end()) for one in found]


def _form(word: str) -> str:
    if word.isascii():
        return "and" if word == "&" else word.lower()
    plain = unicodedata.normalize("NFKD", word.replace(_LETTER_APOSTROPHE, "").casefold())
    return "".join(letter for letter in plain if not unicodedata.combining(letter))


def is_ordinary(forms: Sequence[str]) -> bool:
    """Whether a name consists of nothing but common words, numbers and single letters."""
    return all(
        form in COMMON or form.isdigit() or (len(form) < 2 and form.isascii()) for form in forms
    )


class Names:
    """Names of things, found in a text by their words."""

    def __init__(self) -> None:
        # The trie: a branch is a number, 0 the root; names end at branches.
        self._following: dict[tuple[int, str], int] = {}
        self._meant: dict[int, list[int]] = {}
        self._aliases: dict[int, list[int]] = {}

    def add(self, name: str, thing: int, *, alias: bool) -> None:
        """Note a name of a thing; an alias counts only where no name of its own is the same."""
        words = words_of(name)
        if not 0 < len(words) <= MAX_WORDS:
            return  # nothing but signs, or more words than anyone types
        branch = 0
        for word in words:
            branch = self._following.setdefault((branch, word.form), len(self._following) + 1)
        things = (self._aliases if alias else self._meant).setdefault(branch, [])
        if thing not in things:
            things.append(thing)

    def longest_first(self, words: Sequence[Word], start: int) -> list[tuple[int, list[int]]]:
        """Names that begin at a word, the longest first: number of words, and what they name."""
        found = []
        branch = 0
        for count, word in enumerate(words[start : start + MAX_WORDS], start=1):
            following = self._following.get((branch, word.form))
            if following is None:
                break
            branch = following
            things = self._meant.get(branch) or self._aliases.get(branch)
            if things:
                found.append((count, things))
        return found[::-1]

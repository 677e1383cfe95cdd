"""Items of the catalogue in unseen text, by title and year."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .graph import Catalogue
from .names import Names, Text, words_of

_YEAR = re.compile(r"(?:18|19|20)[0-9]{2}")
_TITLE_YEAR = re.compile(r"\s*\(((?:18|19|20)[0-9]{2})\)\s*$")
_INVERTED = re.compile(r"(.+), (the|a|an)$", flags=re.IGNORECASE)
_ARTICLES = ("the", "a", "an")
_ROMAN = {"ii": "2", "iii": "3", "iv": "4", "v": "5", "vi": "6", "vii": "7", "viii": "8", "ix": "9"}
_ARABIC = {arabic: roman for roman, arabic in _ROMAN.items()}


@dataclass(frozen=True, kw_only=True)
class Mention:
    """A place in a text that names an item."""

    start: int
    end: int
    text: str
    candidates: tuple[int, ...]
    """Numbers of the items in the catalogue that may be meant, the most mentioned first."""
    other_year: int | None = None
    """The year that the text gives, where no candidate is from that year: the item is unknown."""


class TitleLinker:
    """Finds the items of a catalogue in text, the longest titles first.

    Titles are compared without case, accents, signs, years and leading articles; the part before a
    colon or a parenthesis and the other way to number a sequel are aliases.

    Args:
        catalogue: The items.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._names = Names()
        self._number = {item: number for number, item in enumerate(catalogue.ids)}
        self._mentions = catalogue.mentions.tolist()
        self._years: list[int | None] = []
        for number, name in enumerate(catalogue.names):
            title, year = split_title(name)
            self._years.append(year)
            self._names.add(title, number, alias=False)
            for alias in _aliases(title):
                self._names.add(alias, number, alias=True)

    def find(self, text: str) -> list[Mention]:
        """Mentions in the order of the text; they do not overlap.

        A year beside a title ("Heat (1995)", "the 1995 Heat") chooses among items of that title.
        ``@`` and an identifier names an item as in ReDial.
        """
        read = Text(text)
        mentions = []
        place = 0
        while place < len(read.words):
            mention, place = self._mention(read, place)
            if mention is not None:
                mentions.append(mention)
        return mentions

    def _mention(self, read: Text, place: int) -> tuple[Mention | None, int]:
        """The mention that begins at a word, if any, and the word after it."""
        word = read.words[place]
        if read.between(place).endswith("@") and word.form in self._number:
            return self._choose(
                read, word.start - 1, word.end, [self._number[word.form]]
            ), place + 1
        for count, things in self._names.longest_first(read.words, place):
            after = place + count
            start, end = word.start, read.words[after - 1].end
            beside = _year_after(read, after)
            if beside is not None:
                year, year_end, sure = beside
                right = [thing for thing in things if self._years[thing] == year]
                if right:
                    return self._choose(read, start, year_end, right), after + 1 + (not sure)
                if sure and read.is_meant(place, after):
                    return self._choose(read, start, year_end, things, year), after + 1
            before = _year_before(read, place)
            right = [thing for thing in things if before and self._years[thing] == before]
            if right or read.is_meant(place, after):
                return self._choose(read, start, end, right or things), after
        return None, place + 1

    def _choose(
        self, read: Text, start: int, end: int, things: list[int], other_year: int | None = None
    ) -> Mention:
        ranked = sorted(things, key=lambda thing: -self._mentions[thing])
        return Mention(
            start=start,
            end=end,
            text=read.text[start:end],
            candidates=tuple(ranked),
            other_year=other_year,
        )


def split_title(name: str) -> tuple[str, int | None]:
    """Title and year of a name.

    >>> split_title("Heat  (1995)")
    ('Heat', 1995)
    """
    found = _TITLE_YEAR.search(name)
    return (name[: found.start()].strip(), int(found[1])) if found else (name.strip(), None)


def _aliases(title: str) -> Iterable[str]:
    """Other ways to write a title."""
    inverted = _INVERTED.match(title)
    if inverted:
        yield f"{inverted[2]} {inverted[1]}"
        yield inverted[1]
    forms = [word.form for word in words_of(title)]
    if len(forms) > 1:
        if forms[0] in _ARTICLES:
            yield " ".join(forms[1:])
        sequel = _ROMAN.get(forms[-1]) or _ARABIC.get(forms[-1])
        if sequel:
            yield " ".join([*forms[:-1], sequel])
    for mark in (":", "(", " - "):
        before, _, after = title.partition(mark)
        if after and before.strip():
            yield before


def _year_after(read: Text, after: int) -> tuple[int, int, bool] | None:
    """A year after a title, where its mark ends, and whether it surely belongs to the title.

    "Heat (1995)" and "Heat 1995" do, "Heat in 1995" and "Heat from 1995" need not.
    """
    words = read.words[after : after + 2]
    sure = not words or words[0].form not in ("from", "of", "in")
    place = after if sure else after + 1
    if place >= len(read.words) or not _YEAR.fullmatch(read.words[place].form):
        return None
    if read.between(place).strip() not in ("", "(", "[", ","):
        return None
    if not sure and read.between(after).strip() not in ("", "(", ","):
        return None
    end = read.words[place].end
    return int(read.words[place].form), end + (read.text[end : end + 1] in tuple(")]")), sure


def _year_before(read: Text, place: int) -> int | None:
    """The year in "the 1995 Heat"."""
    if place and _YEAR.fullmatch(read.words[place - 1].form) and not read.between(place).strip():
        return int(read.words[place - 1].form)
    return None

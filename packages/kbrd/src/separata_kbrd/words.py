"""From text to token numbers and back: the words of KBRD without data to download.

The authors split text with NLTK: first into sentences by a downloaded Punkt model, then into words
by the Treebank rules. The rules are used as they are. Of the sentences only their full stops
matter to the rules, because a full stop is a token of its own at the end of a sentence alone; which
ones end a sentence is decided here by a rule instead of the model.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from separata_shared.files import read_lines, read_text, write_text

NULL, START, END, UNK = range(4)
SPECIALS = ("__null__", "__start__", "__end__", "__unk__")
SLOT = "__item__"
"""Stands for an item in a text."""

Slots = Literal["separate", "shared"]

_FULL_STOP = re.compile(r"""(?<!\S)(\S*[^.\s])\.[\])}>"'\u00bb\u201d\u2019]*(?=\s)""")
# Words whose full stop does not end a sentence, beside single letters and numbers.
_ABBREVIATIONS = """
a.k.a a.m approx capt co col corp dept dr e.g est etc fig gen gov i.e inc jr lt ltd mr mrs ms p.m
prof rep sen sgt sr st u.k u.s u.s.a vol vs
"""
_KEEP_THE_STOP = frozenset(_ABBREVIATIONS.split())


def split_words(text: str) -> list[str]:
    """Lower-case tokens of a text by the Treebank rules; line breaks give none.

    >>> split_words("Don't you like @12? It's good. Bye.")
    ['do', "n't", 'you', 'like', '@', '12', '?', 'it', "'s", 'good', '.', 'bye', '.']
    """
    split = _treebank().tokenize
    return [word for sentence in _sentences(text.lower()) for word in split(sentence)]


def join_words(words: Sequence[str]) -> str:
    """Text of tokens, with the blanks and quotation marks that people expect.

    >>> join_words(["do", "n't", "you", "like", "it", "?"])
    "don't you like it?"
    """
    return str(_detokenizer().detokenize(words))


def _sentences(text: str) -> Iterable[str]:
    start = 0
    for stop in _FULL_STOP.finditer(text):
        word = stop[1].lstrip("([{<\"'\u00ab\u201c\u2018")
        if len(word) > 1 and not word.isdigit() and word not in _KEEP_THE_STOP:
            yield text[start : stop.end()]
            start = stop.end()
    yield text[start:]


@cache
def _treebank() -> Any:
    from nltk.tokenize.treebank import TreebankWordTokenizer  # takes a second

    return TreebankWordTokenizer()


@cache
def _detokenizer() -> Any:
    from nltk.tokenize.treebank import TreebankWordDetokenizer

    return TreebankWordDetokenizer()


class Vocabulary:
    """Tokens with numbers: padding 0, start 1, end 2, unknown word 3, the item slot, then words.

    Args:
        words: The words, most frequent first.
        slots: ``"separate"`` gives the item slot the number 4. ``"shared"`` is the authors' way,
            whose item slot is the unknown word.

    Raises:
        ValueError: There is no word, or one is double, reserved or has a space.
    """

    def __init__(self, words: Iterable[str], *, slots: Slots = "separate") -> None:
        self.words = tuple(words)
        self.slots = slots
        self.slot = UNK if slots == "shared" else len(SPECIALS)
        marks = SPECIALS if slots == "shared" else (*SPECIALS, SLOT)
        self.pieces = (*marks, *self.words)
        self._first = len(marks)
        if not self.words:
            raise ValueError("a vocabulary needs at least one word")
        for word, count in Counter(self.pieces).items():
            if count > 1 or word.split() != [word]:
                raise ValueError(f"{word!r} cannot be a word: it is double, reserved or has spaces")

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def _number(self) -> dict[str, int]:
        numbers = {word: index for index, word in enumerate(self.words, start=self._first)}
        return {**numbers, SLOT: self.slot}

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without an end; other words become the unknown word."""
        return self.numbers(split_words(text))

    def numbers(self, words: Iterable[str]) -> list[int]:
        """Numbers of lower-case tokens; other words become the unknown word."""
        number = self._number
        return [number.get(word, UNK) for word in words]

    def decode(self, tokens: Iterable[int]) -> list[str]:
        """Tokens up to the first end, without padding and start.

        Raises:
            ValueError: A number lies outside the vocabulary.
        """
        found: list[str] = []
        for token in map(int, tokens):
            if token == END:
                break
            if not 0 <= token < len(self):
                raise ValueError(f"token {token} lies outside a vocabulary of {len(self)}")
            if token not in (NULL, START):
                found.append(self.pieces[token])
        return found

    def _content(self) -> str:
        return "".join(f"{word}\n" for word in (f"slots: {self.slots}", *self.words))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary's file: equal if and only if the vocabularies are equal."""
        return hashlib.sha256(self._content().encode("utf-8")).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write the vocabulary's file atomically."""
        write_text(path, self._content())

    @classmethod
    def load(cls, path: Path | str) -> "Vocabulary":
        """Read a vocabulary that ``save`` wrote.

        Raises:
            ValueError: The file is missing or damaged; the message names it.
        """
        first, *words = read_text(path).split("\n")
        slots = first.removeprefix("slots: ")
        if slots not in ("separate", "shared") or words[-1:] != [""]:
            raise ValueError(f"{path}: not a vocabulary of KBRD")
        try:
            return cls(words[:-1], slots=slots)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{path}: not a usable vocabulary ({error})") from None


def learn_vocabulary(texts: Iterable[Sequence[str]], *, slots: Slots) -> Vocabulary:
    """The vocabulary of training texts: every word, by falling count, ties in their order.

    Args:
        texts: Words of each text, as ``split_words`` gives them.
        slots: Whether an item and an unknown word are two tokens or one.

    Raises:
        ValueError: The texts have no word.
    """
    counts = Counter(word for words in texts for word in words)
    for mark in (*SPECIALS, SLOT):
        del counts[mark]
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return Vocabulary(ranked, slots=slots)


def read_dictionary(path: Path, *, slots: Slots) -> Vocabulary:
    """The vocabulary of a dictionary that ParlAI wrote: lines of a token, a tab and its count.

    Args:
        path: The file, ``.dict`` beside a checkpoint.
        slots: Whether an item and an unknown word are two tokens or one; in ParlAI's, one.

    Raises:
        ValueError: The file is missing or something else; the message names it.
    """
    words = []
    for number, line in enumerate(read_lines(path), start=1):
        word, _, count = line.rpartition("\t")
        if not word or not count.isdecimal():
            raise ValueError(f"{path}: line {number} is not a token, a tab and its count")
        words.append(word)
    if tuple(words[: len(SPECIALS)]) != SPECIALS:
        raise ValueError(f"{path}: does not begin with the tokens {', '.join(SPECIALS)}")
    try:
        return Vocabulary(words[len(SPECIALS) :], slots=slots)
    except ValueError as error:
        raise ValueError(f"{path}: not a usable dictionary ({error})") from None

"""Dependency treebanks: sentences from files, and their words, tags and labels as numbers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from separata_shared.files import read_json, read_lines, write_json

from .transitions import Ints

NONE, ROOT, UNKNOWN = 0, 1, 2
SPECIALS = ("<none>", "<root>", "<unknown>")
_UNLABELLED = "_"


@dataclass(frozen=True)
class Sentence:
    """A sentence and its dependency tree; word 1 is the first one, head 0 the root."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    heads: tuple[int, ...] = ()
    """Head of each word; empty where the tree is not known."""
    labels: tuple[str, ...] = ()
    """Label of the arc to each word."""

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class Treebank:
    """The three parts of a treebank."""

    train: tuple[Sentence, ...]
    valid: tuple[Sentence, ...]
    test: tuple[Sentence, ...]


def read_conllu(text: str, *, tags: Literal["upos", "xpos"], source: object) -> list[Sentence]:
    """Sentences of a text in CoNLL-U or CoNLL-X, whose columns 1 to 8 agree.

    Tokens of several words and empty nodes are left out: trees are over words.

    Args:
        text: The text.
        tags: Column of the part-of-speech tags.
        source: What error messages call the text.

    Raises:
        ValueError: The text is not CoNLL-U, a head is missing or outside its sentence.
    """
    sentences = []
    for number, tokens in enumerate(parse_conllu(text, source=source), start=1):
        words = words_of(tokens)
        heads = tuple(token.get("head") for token in words)
        if not words:
            continue
        if None in heads:
            word = heads.index(None) + 1
            raise ValueError(f"{source}: sentence {number}: word {word} has no head")
        sentence = Sentence(
            words=tuple(str(token["form"]) for token in words),
            tags=tuple(str(token.get(tags) or _UNLABELLED) for token in words),
            heads=heads,
            labels=tuple(str(token.get("deprel") or _UNLABELLED) for token in words),
        )
        check_heads(sentence, f"{source}: sentence {number}")
        sentences.append(sentence)
    if not sentences:
        raise ValueError(f"{source}: holds no sentence")
    return sentences


def parse_conllu(text: str, *, source: object) -> Iterator[Any]:
    """The sentences of a CoNLL-U text as the package ``conllu`` gives them.

    Columns that a line lacks at its end are there and None.

    Raises:
        ValueError: The package is missing, or the text is not CoNLL-U.
    """
    try:
        import conllu
        from conllu.exceptions import ParseException
        from conllu.parser import DEFAULT_FIELDS
    except ImportError:
        raise ValueError("CoNLL-U needs: pip install 'separata-adanorm[treebank]'") from None
    try:
        for tokens in conllu.parse(text):
            for token in tokens:
                for column in DEFAULT_FIELDS:
                    token.setdefault(column, None)
            yield tokens
    except ParseException as error:
        raise ValueError(f"{source}: not CoNLL-U ({error})") from None


def words_of(tokens: Iterable[Any]) -> list[Any]:
    """The tokens of a sentence of ``parse_conllu`` that are words."""
    return [token for token in tokens if isinstance(token["id"], int)]


def read_dp(path: Path) -> list[Sentence]:
    """Sentences of a file with the columns word, tag and head, as NLTK's treebank sample has.

    Raises:
        ValueError: The file cannot be read, or a line or head is wrong.
    """
    sentences: list[Sentence] = []
    rows: list[list[str]] = []
    for number, line in enumerate([*read_lines(path), ""], start=1):
        if line.strip():
            columns = line.split("\t")
            if len(columns) < 3 or not columns[2].strip().isdecimal():
                raise ValueError(f"{path}: line {number} is not word, tag and head")
            rows.append(columns)
        elif rows:
            words, tags, heads = zip(*(row[:3] for row in rows), strict=True)
            labels = (_UNLABELLED,) * len(rows)
            sentence = Sentence(words, tags, tuple(map(int, heads)), labels)
            check_heads(sentence, f"{path}: sentence before line {number}")
            sentences.append(sentence)
            rows = []
    return sentences


def check_heads(sentence: Sentence, place: str) -> None:
    """Check that every head is the root or another word of the sentence.

    Raises:
        ValueError: One is not; the message begins with ``place``.
    """
    for word, head in enumerate(sentence.heads, start=1):
        if head == word or not 0 <= head <= len(sentence):
            raise ValueError(f"{place}: word {word} has the head {head}")


def split_in_order(sentences: Sequence[Sentence]) -> Treebank:
    """The last tenth as test part, the tenth before it as validation part."""
    tenth = max(len(sentences) // 10, 1)
    first, second = len(sentences) - 2 * tenth, len(sentences) - tenth
    parts = sentences[:first], sentences[first:second], sentences[second:]
    return Treebank(*(tuple(part) for part in parts))


def tiny(sentences: int, *, seed: int = 1) -> Treebank:
    """Made sentences: noun phrases around a verb, with adjectives and nested prepositions.

    A preposition behind the object belongs to it or to the verb: its own spelling decides.

    Args:
        sentences: Training sentences; the other parts have a tenth each.
        seed: Seed of the generator.
    """
    random = np.random.default_rng(seed)
    made = [_tiny_sentence(random) for _ in range(sentences + 2 * max(sentences // 10, 1))]
    held_out = max(sentences // 10, 1)
    return Treebank(
        tuple(made[:sentences]),
        tuple(made[sentences : sentences + held_out]),
        tuple(made[sentences + held_out :]),
    )


def _tiny_sentence(random: np.random.Generator) -> Sentence:
    rows: list[list[Any]] = []

    def add(tag: str, head: int, label: str, kinds: int = 8) -> int:
        rows.append([f"{tag.lower()}{random.integers(kinds)}", tag, head, label])
        return len(rows)

    def noun_phrase(head: int, label: str) -> int:
        modifiers = [add("DET", 0, "det", 2)]
        modifiers += [add("ADJ", 0, "amod") for _ in range(random.integers(3))]
        noun = add("NOUN", head, label)
        for modifier in modifiers:
            rows[modifier - 1][2] = noun
        return noun

    subject = noun_phrase(0, "nsubj")
    verb = add("VERB", 0, "root")
    rows[subject - 1][2] = verb
    owner = noun_phrase(verb, "obj")
    for _ in range(random.integers(3)):
        preposition = add("ADP", 0, "case", 4)
        to_noun = rows[preposition - 1][0] in ("adp0", "adp1")
        owner = noun_phrase(owner if to_noun else verb, "nmod" if to_noun else "obl")
        rows[preposition - 1][2] = owner
    words, tags, heads, labels = zip(*rows, strict=True)
    return Sentence(words, tags, heads, labels)


class Lexicon:
    """Numbers of words, tags and labels, and the usual tag of each word.

    Words and tags share one table with the labels that features mention: first the words, then the
    tags, then the labels. ``NONE`` stands where there is no word, ``ROOT`` for the root.

    Args:
        words: Known words, special ones first.
        tags: Tags, special ones first.
        labels: Labels of arcs.
        usual_tags: For each word the tag it has most often.
    """

    def __init__(
        self,
        *,
        words: Sequence[str],
        tags: Sequence[str],
        labels: Sequence[str],
        usual_tags: Mapping[str, str],
    ) -> None:
        self.words, self.tags, self.labels = list(words), list(tags), list(labels)
        self.usual_tags = dict(usual_tags)
        self._word_numbers = {word: number for number, word in enumerate(words)}
        self._tag_numbers = {tag: number for number, tag in enumerate(tags)}
        self._label_numbers = {label: number for number, label in enumerate(labels)}
        self.first_tag = len(words)
        self.first_label = self.first_tag + len(tags)
        self.size = self.first_label + 1 + len(labels)
        """Rows of the common table; a missing label has one, too."""

    @classmethod
    def of(cls, sentences: Iterable[Sentence], *, min_count: int) -> "Lexicon":
        """The lexicon of training sentences; rarer words than ``min_count`` are unknown ones."""
        pairs, labels = Counter[tuple[str, str]](), Counter[str]()
        for sentence in sentences:
            pairs.update(zip(sentence.words, sentence.tags, strict=True))
            labels.update(sentence.labels)
        words, tags = Counter[str](), Counter[str]()
        usual: dict[str, str] = {}
        for (word, tag), count in pairs.most_common():
            usual.setdefault(word, tag)
            words[word] += count
            tags[tag] += count
        known = [word for word, count in words.most_common() if count >= min_count]
        # What an unknown word most often is: the tag of the words that are rare.
        rare = Counter(usual[word] for word, count in words.items() if count == 1)
        usual[SPECIALS[UNKNOWN]] = max(rare or tags, key=(rare or tags).__getitem__)
        return cls(
            words=[*SPECIALS, *(word for word in known if word not in SPECIALS)],
            tags=[*SPECIALS, *(tag for tag, _ in tags.most_common())],
            labels=[label for label, _ in labels.most_common()],
            usual_tags=usual,
        )

    def save(self, path: Path) -> None:
        """Write the lexicon as JSON."""
        names = ("words", "tags", "labels", "usual_tags")
        write_json(path, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, path: Path) -> "Lexicon":
        """Read what ``save`` wrote.

        Raises:
            ValueError: The file is missing or is no lexicon; the message names it.
        """
        content = read_json(path)
        try:
            return cls(**content)
        except TypeError:
            raise ValueError(f"{path}: not a lexicon") from None

    def usual_tag(self, word: str) -> str:
        """The tag that ``word`` has most often, for text without tags."""
        return self.usual_tags.get(word, self.usual_tags[SPECIALS[UNKNOWN]])

    def encode(self, sentences: Sequence[Sentence]) -> "Encoded":
        """Sentences, sorted by falling length, as arrays of numbers.

        Labels that training never saw have the number -1.
        """
        order = np.argsort([-len(sentence) for sentence in sentences], kind="stable")
        lengths = np.array([len(sentences[place]) for place in order], dtype=np.int32)
        shape = len(sentences), int(lengths.max(initial=0)) + 2
        words, tags = (np.full(shape, NONE, dtype=np.int32) for _ in range(2))
        heads, labels = (np.full(shape, -1, dtype=np.int32) for _ in range(2))
        words[:, 0] = tags[:, 0] = ROOT
        for row, place in enumerate(order):
            sentence = sentences[place]
            own = slice(1, len(sentence) + 1)
            words[row, own] = [self._word_numbers.get(w, UNKNOWN) for w in sentence.words]
            tags[row, own] = [self._tag_numbers.get(t, UNKNOWN) for t in sentence.tags]
            if sentence.heads:
                heads[row, own] = sentence.heads
                labels[row, own] = [self._label_numbers.get(x, -1) for x in sentence.labels]
        return Encoded(order, lengths, words, tags + self.first_tag, heads, labels)


@dataclass(frozen=True)
class Encoded:
    """Sentences as numbers; columns are root, words, and nobody behind the longest sentence."""

    order: NDArray[np.int64]
    """Place of each in the list they came from (B,)."""
    lengths: Ints
    """Words of each (B,)."""
    words: Ints
    """Numbers of the words (B,W)."""
    tags: Ints
    """Numbers of the tags in the common table (B,W)."""
    heads: Ints
    """True heads, -1 beside words (B,W)."""
    labels: Ints
    """True labels, -1 where unknown (B,W)."""

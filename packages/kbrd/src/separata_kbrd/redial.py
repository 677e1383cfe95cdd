"""ReDial's dialogs and films as they are published, and the turn pairs that KBRD makes of them.

A dialog is one line of JSON; the *seeker* began it (``initiatorWorkerId``), the *recommender*
answers (``respondentWorkerId``). A film in a message is ``@`` and its identifier. Any catalogue
can be written in this format.
"""

import csv
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from separata_shared.files import find_file, read_bytes

from .words import SLOT

Speaker = Literal["seeker", "recommender"]
Link = Callable[[str], Sequence[int]]
"""Nodes that a message speaks of, in order; an item written as ``@id`` is not among them."""

ARCHIVE = "redial_dataset.zip"
TABLE_HEAD = ["movieId", "movieName", "nbMentions"]

_ITEM = re.compile("@([0-9]+)")


@dataclass(frozen=True)
class Message:
    """What one of the two wrote."""

    speaker: Speaker
    text: str


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a worker said afterwards about a film."""

    suggested: int
    """1 if the recommender brought it up, else 0."""
    seen: int
    """1 if the seeker has seen it, 0 if not, 2 if that was not said."""
    liked: int
    """1 if the seeker liked it, 0 if not, 2 if that was not said."""


@dataclass(frozen=True, kw_only=True)
class Dialog:
    """A dialog of ReDial."""

    id: str
    messages: tuple[Message, ...]
    names: Mapping[str, str]
    """Name of each film mentioned, by its identifier."""
    seeker_answers: Mapping[str, Answers]
    """Answers about each film; empty where the form was not filled in."""
    recommender_answers: Mapping[str, Answers]


@dataclass(frozen=True, kw_only=True)
class TurnPair:
    """The seeker's consecutive messages and the recommender's that follow.

    Nodes are in the order in which they were mentioned, with repeats.
    """

    opens: bool
    """Whether a dialog begins here."""
    turn: int
    """Number of the pair in its dialog, from 1."""
    text: str
    """The seeker's messages; empty where the recommender opened the dialog."""
    label: str
    """The recommender's messages."""
    items: tuple[int, ...]
    """Items in ``text``."""
    entities: tuple[int, ...]
    """Linked nodes of ``text``."""
    targets: tuple[int, ...]
    """Items in ``label``."""
    label_entities: tuple[int, ...]
    """Linked nodes of ``label``."""
    context_items: tuple[int, ...]
    """Items of all earlier pairs, both speakers, and of ``text``."""
    context_entities: tuple[int, ...]
    """Linked nodes of all earlier pairs, both speakers, and of ``text``."""

    @property
    def distinct_targets(self) -> tuple[int, ...]:
        """Items in ``label``, each once: one instance of the recommender for each."""
        return tuple(dict.fromkeys(self.targets))


def turn_pairs(
    dialog: Dialog, node_of_item: Mapping[str, int], link: Link, *, slot: str = SLOT
) -> Iterator[TurnPair]:
    """Cut a dialog into turn pairs by the rule of the authors' code.

    Messages are joined by line breaks, empty ones left out. A last pair without text of the
    recommender is left out.

    Args:
        dialog: The dialog.
        node_of_item: Node of each item of the catalogue.
        link: Finds the nodes that a message speaks of.
        slot: What replaces an item in the texts. An identifier that is not in the catalogue
            vanishes.

    Yields:
        The pairs in order.
    """
    before_items: list[int] = []
    before_entities: list[int] = []
    pairs = list(_pairs(dialog.messages))
    for number, (asked, answered) in enumerate(pairs, start=1):
        if number == len(pairs) and not answered:
            break
        text, items = _replace_items("\n".join(asked), node_of_item, slot)
        label, targets = _replace_items("\n".join(answered), node_of_item, slot)
        entities = [node for message in asked for node in link(message)]
        label_entities = [node for message in answered for node in link(message)]
        yield TurnPair(
            opens=number == 1,
            turn=number,
            text=text,
            label=label,
            items=tuple(items),
            entities=tuple(entities),
            targets=tuple(targets),
            label_entities=tuple(label_entities),
            context_items=(*before_items, *items),
            context_entities=(*before_entities, *entities),
        )
        before_items += items + targets
        before_entities += entities + label_entities


def _pairs(messages: Sequence[Message]) -> Iterator[tuple[list[str], list[str]]]:
    """The seeker's texts and the recommender's, for each pair of turns."""
    asked: list[str] | None = None
    for speaker, turn in groupby(messages, key=lambda message: message.speaker):
        texts = [message.text for message in turn if message.text]
        if speaker == "seeker":
            asked = texts
        else:
            yield asked or [], texts
            asked = None
    if asked is not None:
        yield asked, []


def _replace_items(text: str, node_of_item: Mapping[str, int], slot: str) -> tuple[str, list[int]]:
    """Put ``slot`` in the place of each known item and nothing in the place of others."""
    nodes: list[int] = []

    def replace(found: re.Match[str]) -> str:
        node = node_of_item.get(_identifier(found[1]))
        if node is None:
            return ""
        nodes.append(node)
        return slot

    return _ITEM.sub(replace, text), nodes


def _identifier(digits: str) -> str:
    """The identifier that digits after ``@`` mean: a number, as in the authors' code."""
    return digits.lstrip("0") or "0"


def unknown_mentions(dialogs: Iterable[Dialog], known: Collection[str]) -> Counter[str]:
    """How often dialogs mention each item that is not known; ``turn_pairs`` leaves those out.

    Args:
        dialogs: The dialogs.
        known: Identifiers of the catalogue.
    """
    texts = (message.text for dialog in dialogs for message in dialog.messages)
    found = (_identifier(digits) for text in texts for digits in _ITEM.findall(text))
    return Counter(item for item in found if item not in known)


def read_dialogs(raw: Path, name: str) -> tuple[list[Dialog], Path]:
    """Dialogs of a file and where they were found.

    Args:
        raw: Directory of the files.
        name: Name of the file in it, plain or compressed (``.gz``, ``.xz``), or in the archive
            ``redial_dataset.zip`` that ReDial is published as.

    Raises:
        ValueError: The file is missing, empty or damaged, or a line is not a dialog; the message
            names file and line.
    """
    content, path = _read(raw, name)
    shown = path if path.name != ARCHIVE else f"{path}: {name}"
    dialogs = []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            dialogs.append(parse_dialog(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{shown}: line {number} is not a dialog ({error})") from None
    return dialogs, path


def _read(raw: Path, name: str) -> tuple[bytes, Path]:
    path = find_file(raw, name)
    archive = raw / ARCHIVE
    if path is not None:
        return read_bytes(path), path
    if not archive.is_file():
        raise ValueError(f"{raw / name}: no such file (nor {name}.gz, {name}.xz or {ARCHIVE})")
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [one for one in opened.namelist() if Path(one).name == name]
            if len(members) != 1:
                raise ValueError(f"{archive}: holds {len(members)} files named {name}, not one")
            return opened.read(members[0]), archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive}: not a readable archive ({error})") from None


def parse_dialog(value: Any) -> Dialog:
    """A dialog from its JSON value.

    Raises:
        ValueError: A field is missing or of another kind.
    """
    seeker, recommender = (
        _field(value, name, (int, str)) for name in ("initiatorWorkerId", "respondentWorkerId")
    )
    messages = []
    for number, message in enumerate(_field(value, "messages", (list,)), start=1):
        sender, text = (
            _field(message, "senderWorkerId", (int, str)),
            _field(message, "text", (str,)),
        )
        if sender not in (seeker, recommender):
            raise ValueError(f"message {number} is from {sender!r}, who is neither of the two")
        if not text.isascii():
            # JSON can hold halves of characters, which no file of text can.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        messages.append(Message("seeker" if sender == seeker else "recommender", text))
    names = _mapping(value, "movieMentions")
    return Dialog(
        id=str(_field(value, "conversationId", (int, str))),
        messages=tuple(messages),
        names={item: str(name) for item, name in names.items() if name is not None},
        seeker_answers=_answers(value, "initiatorQuestions"),
        recommender_answers=_answers(value, "respondentQuestions"),
    )


def _field(value: Any, name: str, kinds: tuple[type, ...]) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise ValueError(f"lacks {name!r}")
    if not isinstance(value[name], kinds) or isinstance(value[name], bool):
        raise ValueError(f"{name!r} is {type(value[name]).__name__}")
    return value[name]


def _mapping(value: Any, name: str) -> dict[str, Any]:
    """A field that is a mapping, or an empty list where nothing was filled in."""
    found = _field(value, name, (dict, list))
    if isinstance(found, list):
        if found:
            raise ValueError(f"{name!r} is a list that is not empty")
        return {}
    return dict(found)


def _answers(value: Any, name: str) -> dict[str, Answers]:
    kinds = ("suggested", "seen", "liked")
    return {
        item: Answers(**{kind: _field(form, kind, (int,)) for kind in kinds})
        for item, form in _mapping(value, name).items()
    }


def read_item_table(path: Path) -> dict[str, tuple[str, int]]:
    """Name and number of mentions of each film, by its identifier, in the order of the table.

    Args:
        path: ``movies_with_mentions.csv``. Names hold commas and quotation marks.

    Raises:
        ValueError: The file cannot be read or is not that table; the message names it.
    """
    try:
        text = read_bytes(path).decode("utf-8")
        rows = list(csv.reader(StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a table of films ({error})") from None
    if not rows or rows[0] != TABLE_HEAD:
        raise ValueError(f"{path}: does not begin with {','.join(TABLE_HEAD)}")
    table: dict[str, tuple[str, int]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 3 or not (row[0].isdecimal() and row[2].isdecimal()):
            raise ValueError(f"{path}: row {number} is not identifier, name and mentions")
        if row[0] in table:
            raise ValueError(f"{path}: row {number} repeats the film {row[0]}")
        table[row[0]] = (row[1], int(row[2]))
    if not table:
        raise ValueError(f"{path}: holds no film")
    return table


def split_dialogs(
    dialogs: Sequence[Dialog], *, train_share: float, seed: int
) -> tuple[list[Dialog], list[Dialog]]:
    """Cut dialogs into a training and a validation part; equal seeds give equal parts.

    The authors' script shuffles without a seed and writes over its input. Here the parts keep the
    order of the input, which is only read.

    Args:
        dialogs: All of them.
        train_share: Share of the training part, rounded down to whole dialogs.
        seed: Seed of the choice.

    Raises:
        ValueError: A part would be empty.
    """
    count = int(len(dialogs) * train_share)
    if not 0 < count < len(dialogs):
        raise ValueError(f"{len(dialogs)} dialogs are too few for a training and a validation part")
    chosen = np.zeros(len(dialogs), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(dialogs))[:count]] = True
    train = [dialog for dialog, mine in zip(dialogs, chosen, strict=True) if mine]
    valid = [dialog for dialog, mine in zip(dialogs, chosen, strict=True) if not mine]
    return train, valid

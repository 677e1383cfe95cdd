"""MovieLens-100k and its knowledge graph, read from inside the pip package ``recbole`` 1.2.1.

The ratings are real and so is the graph (Freebase, by its identifiers); the dialogs are not: they
are phrased here from the ratings. A user's liked films, in the order of the ratings, are cut into
pieces of five; the seeker names the first two and asks for the genre of the third, the recommender
names the third, and so on. Nobody's ratings are in two parts.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from numpy.random import Generator
from separata_shared.files import read_lines

from .corpus import Source
from .entities import NameLinker
from .graph_files import catalogue_of, number_triples
from .redial import Dialog, Message, Speaker

VERSION = "1.2.1"
INSTALL = f"pip install --no-deps recbole=={VERSION}"
LIKED = 4  # stars of five

_FOLDER = "recbole/dataset_example/ml-100k"
_PIECE = 5
_INVERTED = re.compile(r"(.+), (The|A|An|Il|La|Le|Les|Der|Die|Das|El)( \(.*\))?$")
_NO_GENRE = "unknown"

_GREETINGS = ("hello!", "hi, i need a movie for tonight", "hi there", "good evening.")
_QUESTIONS = ("hello, what do you like?", "hi! which movies do you like?", "hi, tell me more")
_TASTES = (
    "i loved {one} and {two}",
    "my favorites are {one} and {two} .",
    "i have seen {one} , and {two} was great too",
)
_WISHES = (
    "do you know a good {genre} film?",
    "can you recommend a {genre} movie?",
    "i am in the mood for {genre} movies",
)
_ANSWERS = (
    "have you seen {item} ?",
    "you could watch {item} , people liked it",
    "i would suggest {item}",
    "{item} is a good {genre} movie.",
)
_REACTIONS = ("i liked that one.", "yes, that was great!", "i gave it {stars} stars.")
_THANKS = ("thank you, bye!", "thanks, that is all.", "sounds good, thanks.")
_GOODBYES = ("you are welcome!", "enjoy the movie. bye!")


def sample(*, dialogs: int, seed: int) -> Source:
    """The sample: graph, films and dialogs.

    Args:
        dialogs: Most dialogs, all parts together.
        seed: Seed of the phrases and of the choice of people for each part.

    Raises:
        ValueError: The package is missing, has another version or lacks a file.
    """
    paths = {ending: _find(f"ml-100k.{ending}") for ending in ("item", "link", "kg", "inter")}
    films = _films(_table(paths["item"], 4), dict(_table(paths["link"], 2)))
    triples = [(head, relation, tail) for head, relation, tail in _table(paths["kg"], 3)]
    triples += [
        (film.key, "genre", f"{genre} film") for film in films.values() for genre in film.genres
    ]
    numbered = number_triples(triples, [film.key for film in films.values()])
    node = {key: number for number, key in enumerate(numbered.nodes)}
    liked = _liked(_table(paths["inter"], 4), films)
    train, valid, test = _phrase(np.random.default_rng(seed), liked, films, dialogs)
    mentions = Counter(item for dialog in train for item in dialog.names)
    rows = [(item, film.key, film.name, mentions[item]) for item, film in films.items()]
    catalogue = catalogue_of(rows, node, paths["item"])
    return Source(
        triples=numbered,
        catalogue=catalogue,
        train=train,
        valid=valid,
        test=test,
        link=NameLinker(numbered.nodes, degrees=[0] * len(node), items=catalogue.nodes.tolist()),
        files=tuple(paths.values()),
    )


@dataclass(frozen=True)
class _Film:
    """A film: its node, its name for people and its genres."""

    key: str
    name: str
    genres: tuple[str, ...]


@dataclass(frozen=True)
class _Rating:
    """A film that somebody liked."""

    item: str
    stars: str


def _find(name: str) -> Path:
    """A file of the package, which is never imported."""
    try:
        package = distribution("recbole")
    except PackageNotFoundError:
        raise ValueError(f"the sample is not installed: {INSTALL}") from None
    path = Path(str(package.locate_file(f"{_FOLDER}/{name}")))
    if package.version != VERSION or not path.is_file():
        raise ValueError(f"{path}: not that of recbole {VERSION}: {INSTALL}")
    return path


def _table(path: Path, columns: int) -> list[list[str]]:
    """Rows of a file whose first line is the heading."""
    rows = [line.split("\t") for line in read_lines(path)[1:]]
    if not rows or any(len(row) != columns for row in rows):
        raise ValueError(f"{path}: not a table of {columns} columns: {INSTALL}")
    return rows


def _films(rows: list[list[str]], key_of_item: Mapping[str, str]) -> dict[str, _Film]:
    """Films by their identifier; one without a node in the graph has its identifier as key."""
    films = {}
    for item, title, year, genres in rows:
        inverted = _INVERTED.match(title)
        if inverted:
            title = f"{inverted[2]} {inverted[1]}{inverted[3] or ''}"
        films[item] = _Film(
            key=key_of_item.get(item, item),
            name=f"{title} ({year})" if year.isdecimal() else title,
            genres=tuple(genre for genre in genres.split() if genre != _NO_GENRE),
        )
    return films


def _liked(rows: list[list[str]], films: Collection[str]) -> list[list[_Rating]]:
    """What each person liked, in the order of the ratings."""
    people: dict[str, list[tuple[float, int, _Rating]]] = {}
    for person, item, stars, time in rows:
        if float(stars) >= LIKED and item in films:
            rated = (float(time), int(item), _Rating(item, stars))
            people.setdefault(person, []).append(rated)
    return [
        [rating for _, _, rating in sorted(people[person], key=lambda rated: rated[:2])]
        for person in sorted(people, key=int)
    ]


def _phrase(
    random: Generator, people: list[list[_Rating]], films: Mapping[str, _Film], most: int
) -> tuple[list[Dialog], list[Dialog], list[Dialog]]:
    """Dialogs of eight, one and one tenths of the people."""
    pieces = [
        (place, number, liked[start : start + _PIECE])
        for place, number in enumerate(random.permutation(len(people)).tolist())
        for liked in (people[number],)
        for start in range(0, len(liked) - _PIECE + 1, _PIECE)
    ]
    kept = np.sort(random.permutation(len(pieces))[:most])
    parts: tuple[list[Dialog], list[Dialog], list[Dialog]] = ([], [], [])
    for index in kept.tolist():
        place, number, piece = pieces[index]
        share = place / len(people)
        part = parts[0 if share < 0.8 else 1 if share < 0.9 else 2]
        part.append(_dialog(random, f"{number}-{index}", piece, films))
    return parts


def _dialog(
    random: Generator, name: str, piece: list[_Rating], films: Mapping[str, _Film]
) -> Dialog:
    """A dialog about five films, of which the seeker names the first two."""
    messages: list[Message] = []

    def say(speaker: Speaker, templates: tuple[str, ...], **values: str) -> None:
        template = templates[random.integers(len(templates))]
        messages.append(Message(speaker, template.format(**values)))

    one, two, *others = piece
    say("seeker", _GREETINGS)
    say("recommender", _QUESTIONS)
    say("seeker", _TASTES, one=f"@{one.item}", two=f"@{two.item}")
    for rating in others:
        genres = films[rating.item].genres or ("good",)
        genre = genres[random.integers(len(genres))].lower()
        say("seeker", _WISHES, genre=genre)
        say("recommender", _ANSWERS, item=f"@{rating.item}", genre=genre)
        say("seeker", _REACTIONS, stars=rating.stars)
    say("seeker", _THANKS)
    say("recommender", _GOODBYES)
    return Dialog(
        id=name,
        messages=tuple(messages),
        names={rating.item: films[rating.item].name for rating in piece},
        seeker_answers={},
        recommender_answers={},
    )

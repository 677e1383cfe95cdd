"""Made data: a small world of films, actors and genres, and dialogs whose wishes follow it.

A seeker wants a genre and an actor, or more of what a film has; the recommender names a film that
fits. Which films fit is written in the graph alone, so a model that reads it can answer wishes that
no training dialog holds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from .corpus import Source
from .entities import NameLinker
from .graph import Catalogue
from .graph_files import number_triples
from .redial import Dialog, Message, Speaker

_SYLLABLES = ("ba", "de", "fu", "gi", "ka", "lu", "me", "no", "pi", "ra", "su", "ta", "vo", "zi")
_GENRES = ("horror", "comedy", "western", "mystery", "war", "romance")
_ITEMS_PER_ACTOR = 4
_UNLINKED = 8  # of so many items one has a bare number as its key, as in ReDial
_GREETINGS = ("hello", "hi there", "good evening", "hey, how are you?")
_WISHES = (
    "i am looking for a {genre} movie with {actor}",
    "do you know a {genre} film? i like {actor} a lot",
    "any {genre} movies with {actor}?",
)
_ANSWERS = (
    "have you seen {item} ?",
    "you should watch {item} . it is a great {genre} movie",
    "{item} is what you want, {actor} is in it",
)
_MORE = (
    "i loved it! what else is like {item} ?",
    "yes, i liked {item} . something more like that please",
)
_THANKS = ("thank you, bye!", "sounds great, thanks a lot.")
_GOODBYES = ("enjoy it!", "you are welcome. bye")


@dataclass(frozen=True)
class _Item:
    """A film of the made world."""

    id: str
    name: str
    genre: int
    actors: tuple[int, ...]

    @property
    def key(self) -> str:
        if int(self.id) % _UNLINKED == 0:
            return self.id
        return _uri(f"{self.name.rpartition(' (')[0]} (film)")


def tiny(*, items: int, dialogs: int, seed: int) -> Source:
    """The made world.

    Args:
        items: Films.
        dialogs: Training dialogs; a quarter as many for each other part.
        seed: Seed of the generator.
    """
    random = np.random.default_rng(seed)
    actors = _names(random, max(2 * items // _ITEMS_PER_ACTOR, 4))
    titles = _names(random, items)
    films = [
        _Item(
            id=str(1000 + number),
            name=f"{title} ({random.integers(1970, 2020)})",
            genre=int(random.integers(len(_GENRES))),
            actors=tuple(random.choice(len(actors), size=2, replace=False).tolist()),
        )
        for number, title in enumerate(titles)
    ]
    triples = [
        (film.key, relation, _uri(tail))
        for film in films
        for relation, tail in (
            ("genre", f"{_GENRES[film.genre]} film".capitalize()),
            *(("starring", actors[actor]) for actor in film.actors),
        )
    ]
    numbered = number_triples(triples, [film.key for film in films])
    node = {key: number for number, key in enumerate(numbered.nodes)}
    nodes = [node[film.key] for film in films]
    parts = [
        [_dialog(random, f"{part}{number}", films, actors) for number in range(count)]
        for part, count in enumerate((dialogs, dialogs // 4, dialogs // 4))
    ]
    train, valid, test = parts
    return Source(
        triples=numbered,
        catalogue=Catalogue(
            ids=tuple(film.id for film in films),
            nodes=np.array(nodes, dtype=np.int64),
            names=tuple(film.name for film in films),
            mentions=np.array([_mentions(train, film.id) for film in films], dtype=np.int64),
        ),
        train=train,
        valid=valid,
        test=test,
        link=NameLinker(numbered.nodes, degrees=[0] * len(node), items=nodes),
    )


def _uri(name: str) -> str:
    return f"<http://example.org/resource/{name.replace(' ', '_')}>"


def _names(random: Generator, count: int) -> list[str]:
    """Different names of two words."""
    names: dict[str, None] = {}
    while len(names) < count:
        words = ("".join(random.choice(_SYLLABLES, size=3)) for _ in range(2))
        names[" ".join(word.capitalize() for word in words)] = None
    return list(names)


def _mentions(dialogs: list[Dialog], item: str) -> int:
    return sum(item in dialog.names for dialog in dialogs)


def _dialog(random: Generator, name: str, films: list[_Item], actors: list[str]) -> Dialog:
    """One to three wishes, each with its answer."""
    messages: list[Message] = []
    named: dict[str, str] = {}

    def say(speaker: Speaker, templates: tuple[str, ...], film: _Item, actor: int) -> None:
        template = templates[random.integers(len(templates))]
        text = template.format(
            genre=_GENRES[film.genre], actor=actors[actor].lower(), item=f"@{film.id}"
        )
        messages.append(Message(speaker, text))
        if "{item}" in template:
            named[film.id] = film.name

    film = films[random.integers(len(films))]
    actor = film.actors[random.integers(2)]
    if random.random() < 0.3:
        say("recommender", _GREETINGS, film, actor)
    else:
        say("seeker", _GREETINGS, film, actor)
    say("seeker", _WISHES, film, actor)
    say("recommender", _ANSWERS, film, actor)
    for _ in range(random.integers(3)):
        similar = [other for other in films if other.id not in named and _alike(other, film)]
        if not similar:
            break
        say("seeker", _MORE, film, actor)
        film = similar[random.integers(len(similar))]
        actor = film.actors[0]
        say("recommender", _ANSWERS, film, actor)
    say("seeker", _THANKS, film, actor)
    say("recommender", _GOODBYES, film, actor)
    return Dialog(
        id=name, messages=tuple(messages), names=named, seeker_answers={}, recommender_answers={}
    )


def _alike(one: _Item, other: _Item) -> bool:
    return one.genre == other.genre or bool(set(one.actors) & set(other.actors))

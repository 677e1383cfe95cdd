"""A conversation with a person: what an unseen message means, and what is asked back."""

import re
from dataclasses import dataclass, field

from .linking import Mention, split_title
from .system import Context, Reply, System

MOST_CHARACTERS = 10_000
"""Longer messages are cut; the model reads no more than its last tokens anyway."""
MOST_CHOICES = 9

_YEAR = re.compile(r"\b(?:18|19|20)\d\d\b")
_NUMBER = re.compile(r"\s*#?([1-9])[.)]?\s*")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the system does about a message."""

    text: str
    """What it says."""
    reply: Reply | None = None
    """The answer, unless something is asked back."""
    choices: tuple[str, ...] = ()
    """Names to choose from, where something is asked back."""
    notes: tuple[str, ...] = ()
    """What the person should know about how the message was read."""
    heard: tuple[str, ...] = ()
    """Names of the items found in the message."""


@dataclass
class _Open:
    """A message that waits until it is known which items it means."""

    text: str
    mentions: list[Mention]
    chosen: list[tuple[Mention, int]] = field(default_factory=list)

    @property
    def unclear(self) -> Mention | None:
        place = len(self.chosen)
        return self.mentions[place] if place < len(self.mentions) else None


class Conversation:
    """One dialog with one person.

    Args:
        system: Answers.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        self._names = system.recommender.corpus.graph.catalogue.names
        self.context = Context()
        self._open: _Open | None = None

    def say(self, text: str) -> Turn:
        """Take in a message.

        A name that several items have is asked back. The answer may be a number of the list, a
        year, or something else: then the most mentioned one is meant.
        """
        text = text[:MOST_CHARACTERS]
        if not text.strip():
            return Turn(text="Please say something, for example a film that you like.")
        waiting, self._open = self._open, None
        if waiting is not None:
            answered = self._answered(waiting, text)
            if answered:
                return self._go_on(waiting, ())
            self._guess(waiting)
            self._system.hear(self.context, waiting.text, waiting.chosen)
        mentions = self._system.titles.find(text)
        unknown = tuple(
            f"I know no {mention.text!r} of {mention.other_year}."
            for mention in mentions
            if mention.other_year is not None
        )
        known = [mention for mention in mentions if mention.other_year is None]
        return self._go_on(_Open(text, known), unknown)

    def _go_on(self, message: _Open, notes: tuple[str, ...]) -> Turn:
        while (mention := message.unclear) is not None:
            if len(mention.candidates) > 1:
                self._open = message
                names = [self._names[number] for number in mention.candidates[:MOST_CHOICES]]
                return Turn(
                    text=f"Which {mention.text} do you mean?", choices=tuple(names), notes=notes
                )
            message.chosen.append((mention, mention.candidates[0]))
        system, context = self._system, self.context
        system.hear(context, message.text, message.chosen)
        (reply,) = system.respond([context])
        context.tokens += system.vocabulary.encode(" ".join(reply.words))
        context.items += reply.items
        heard = tuple(self._names[number] for _, number in message.chosen)
        return Turn(text=reply.text or "…", reply=reply, notes=notes, heard=heard)

    def _answered(self, waiting: _Open, text: str) -> bool:
        """Note which item is meant, if the text says so."""
        mention = waiting.unclear
        assert mention is not None
        candidates = mention.candidates[:MOST_CHOICES]
        number = _NUMBER.fullmatch(text)
        if number and int(number[1]) <= len(candidates):
            waiting.chosen.append((mention, candidates[int(number[1]) - 1]))
            return True
        years = set(_YEAR.findall(text))
        right = [one for one in candidates if str(split_title(self._names[one])[1]) in years]
        if len(right) == 1:
            waiting.chosen.append((mention, right[0]))
            return True
        return False

    def _guess(self, waiting: _Open) -> None:
        """Take the most mentioned item wherever several can be meant."""
        while (mention := waiting.unclear) is not None:
            waiting.chosen.append((mention, mention.candidates[0]))

"""A trained system, recommender and dialog model together: dialogs in, answers out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from separata_shared.data import pad
from separata_shared.files import read_json, sha256
from separata_shared.training import load_weights
from torch import Tensor

from .config import DialogConfig
from .dialog import DialogModel
from .entities import NameLinker, name_linker, nodes_of, spotlight_linker
from .linking import Mention, TitleLinker
from .pairs import pad_nodes
from .redial import Link
from .runs import DIALOG, TrainedRecommender, load_recommender, part_config
from .search import Search, fill_slots, make_search
from .words import NULL, SLOT, Vocabulary, join_words

VOCABULARY = "vocabulary.txt"
RECOMMENDER_RECORD = "recommender.json"
SUGGESTIONS = 5


@dataclass
class Context:
    """What was said so far, as the models see it."""

    tokens: list[int] = field(default_factory=list)
    """Tokens of all turns, items as slots."""
    items: list[int] = field(default_factory=list)
    """Nodes of the items, in order, with repeats."""
    entities: list[int] = field(default_factory=list)
    """Linked nodes, in order, with repeats."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer of the system."""

    text: str
    """What it says, with the names of items."""
    words: tuple[str, ...]
    """What the dialog model wrote, with slots."""
    items: tuple[int, ...]
    """Nodes of the items that stand in the text, in their order."""
    suggestions: tuple[int, ...]
    """Nodes of the best items that were not mentioned before, whether or not they are named."""
    attention: tuple[tuple[int, float], ...]
    """Mentioned nodes and their weights in the user vector, largest first."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A recommender and the dialog model trained on top of it."""

    recommender: TrainedRecommender
    config: DialogConfig
    network: DialogModel
    vocabulary: Vocabulary
    search: Search
    link: Link | None = None
    """Finds other nodes than items in text; by their names if it is not given."""

    @cached_property
    def titles(self) -> TitleLinker:
        """Finds items in text."""
        return TitleLinker(self.recommender.corpus.graph.catalogue)

    @cached_property
    def names(self) -> NameLinker:
        """Finds other nodes in text."""
        return name_linker(self.recommender.corpus.graph)

    @cached_property
    def item_names(self) -> dict[int, str]:
        """Name of the item of each node that is one."""
        catalogue = self.recommender.corpus.graph.catalogue
        return dict(zip(catalogue.nodes.tolist(), catalogue.names, strict=True))

    def hear(self, context: Context, text: str, chosen: Sequence[tuple[Mention, int]]) -> None:
        """Add a message to the context.

        Args:
            context: Changed in place.
            text: The message.
            chosen: Its mentions of items, in order, each with the number of the item meant.
        """
        nodes = self.recommender.corpus.graph.catalogue.nodes
        parts, place = [], 0
        for mention, number in chosen:
            parts += [text[place : mention.start], f" {SLOT} "]
            place = mention.end
            context.items.append(int(nodes[number]))
        plain = "".join([*parts, text[place:]])
        context.tokens += self.vocabulary.encode(plain)
        link = self.link or self.names
        context.entities += link(plain.replace(SLOT, " . "))

    @torch.inference_mode()
    def respond(self, contexts: Sequence[Context]) -> list[Reply]:
        """Answer dialogs; the answer to one does not depend on the others."""
        if not contexts:
            return []
        mentioned = [self._mentioned(context) for context in contexts]
        nodes, mask = pad_nodes(mentioned)
        frozen = self.recommender.model
        user, weights = frozen.users(nodes, mask)
        scores = frozen.scores(user, self._items)
        ranked = self._items[scores.argsort(dim=1, descending=True, stable=True)].tolist()
        written = self.search(self.network, self._read(contexts), user)
        return [
            self._reply(context, tokens, order, list(zip(seen, row, strict=False)))
            for context, tokens, order, seen, row in zip(
                contexts, written, ranked, mentioned, weights.tolist(), strict=True
            )
        ]

    def _reply(
        self,
        context: Context,
        tokens: list[int],
        ranked: list[int],
        attention: list[tuple[int, float]],
    ) -> Reply:
        words = self.vocabulary.decode(tokens)
        slot = self.vocabulary.pieces[self.vocabulary.slot]
        filled, items = fill_slots(words, slot=slot, ranked=ranked, mentioned=context.items)
        mentioned = set(context.items)
        fresh = [item for item in ranked[: SUGGESTIONS + len(mentioned)] if item not in mentioned]
        return Reply(
            text=spell(filled, self.item_names),
            words=tuple(words),
            items=tuple(items),
            suggestions=tuple(fresh[:SUGGESTIONS]),
            attention=tuple(sorted(attention, key=lambda pair: -pair[1])),
        )

    def _mentioned(self, context: Context) -> list[int]:
        nodes = [*context.items, *context.entities]
        return np.unique(nodes).astype(int).tolist() if self.config.mentions == "set" else nodes

    def _read(self, contexts: Sequence[Context]) -> Tensor:
        rows = [context.tokens[-self.config.max_length :] for context in contexts]
        return pad(rows, NULL, length=max(1, *(len(row) for row in rows)))

    @cached_property
    def _items(self) -> Tensor:
        return torch.from_numpy(self.recommender.corpus.graph.items)


def spell(words: Sequence[str | int], names: dict[int, str]) -> str:
    """Words and items as a text.

    >>> spell(["have", "you", "seen", 7, "?"], {7: "Heat (1995)"})
    'have you seen Heat (1995)?'
    """
    # Names must not be touched by the rules for words, so marks stand for them.
    marked = [word if isinstance(word, str) else f"\ue000{word}\ue001" for word in words]
    return re.sub("\ue000(\\d+)\ue001", lambda mark: names[int(mark[1])], join_words(marked))


def load_system(
    run: Path,
    *,
    weights: Path | None = None,
    beam: int | None = None,
    search: Literal["batched", "official"] | None = None,
    recommender_weights: Path | None = None,
    spotlight: str | None = None,
) -> System:
    """Read a trained system.

    Args:
        run: Run directory.
        weights: Weights file of the dialog model; default: the best of the run.
        beam: Hypotheses kept for each answer; default: the run's.
        search: ``batched`` or ``official``; default: the run's.
        recommender_weights: Weights file of the recommender; default: the best of the run.
        spotlight: Address of a DBpedia Spotlight service that finds nodes in text instead of the
            names of the nodes. Messages are sent there.

    Raises:
        ValueError: A part is missing or does not fit the others; the message names the file.
    """
    directory, groups = part_config(run, DIALOG, {"dialog": DialogConfig})
    config: DialogConfig = groups["dialog"]
    beam = config.beam if beam is None else beam
    config = replace(config, beam=beam, search=search or config.search)
    trained = load_recommender(run, weights=recommender_weights)
    vocabulary = trained.corpus.vocabulary
    kept = directory.path / VOCABULARY
    if Vocabulary.load(kept).fingerprint != vocabulary.fingerprint:
        raise ValueError(f"{kept}: another vocabulary than that of the data; prepare it as before")
    if recommender_weights is None:
        check_recommender(directory.path / RECOMMENDER_RECORD, trained)
    network = DialogModel(config, num_tokens=len(vocabulary), user_width=trained.model.H.shape[1])
    load_weights(network, weights or directory.best_weights())
    return System(
        recommender=trained,
        config=config,
        network=network.eval(),
        vocabulary=vocabulary,
        search=make_search(config, vocabulary),
        link=_spotlight(spotlight, trained) if spotlight is not None else None,
    )


def _spotlight(url: str, trained: TrainedRecommender) -> Link:
    number = {key: node for node, key in enumerate(trained.corpus.graph.nodes)}
    return nodes_of(spotlight_linker(url), number)


def recommender_record(weights: Path) -> dict[str, str]:
    """What ``recommender.json`` says about the recommender of a dialog model."""
    return {"weights": weights.name, "sha256": sha256(weights)}


def check_recommender(path: Path, trained: TrainedRecommender) -> None:
    """Make sure that a dialog model was trained with this recommender.

    Args:
        path: Its ``recommender.json``.
        trained: The recommender.

    Raises:
        ValueError: It was trained with another one, or the file cannot be read.
    """
    record = read_json(path)
    expected = recommender_record(trained.weights)["sha256"]
    if not isinstance(record, dict) or record.get("sha256") != expected:
        raise ValueError(
            f"{path}: the dialog model was trained with other weights than {trained.weights}; "
            f"delete {path.parent} and run the verb train-dialog again"
        )

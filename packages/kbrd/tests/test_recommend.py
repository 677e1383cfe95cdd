"""Recommendations for people: ``recommend`` and what it rests on."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_kbrd.config import DataConfig, RecommenderConfig
from separata_kbrd.recommend import Suggester
from separata_kbrd.runs import load_recommender
from separata_kbrd.train import train_rec
from separata_shared.training import TrainConfig

DATA = DataConfig(dataset="tiny", threshold=10, tiny_dialogs=80, tiny_items=24)
SIZES = RecommenderConfig(width=16, num_bases=2, batch_pairs=32)
TRAIN = TrainConfig(steps=20, lr=1e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "made"
    train_rec(data=DATA, recommender=SIZES, train=TRAIN, run=path)
    return path


@pytest.fixture(scope="module")
def suggester(run: Path) -> Suggester:
    return Suggester(load_recommender(run))


def test_recommendations_are_the_best_items_not_mentioned(suggester: Suggester) -> None:
    graph = suggester.trained.corpus.graph
    liked = graph.items[:2].tolist()
    (answer,) = suggester.recommend([liked], k=5)
    frozen = suggester.trained.model
    user, _ = frozen.users(torch.tensor([sorted(liked)]), torch.ones(1, 2, dtype=torch.bool))
    scores = frozen.scores(user, torch.tensor(graph.items))[0]
    scores[:2] = -torch.inf
    names = [graph.item_names[place] for place in scores.topk(5).indices.tolist()]
    assert [item.name for item in answer.items] == names
    assert [item.score for item in answer.items] == scores.topk(5).values.tolist()
    assert sum(weight for _, weight in answer.attention) == pytest.approx(1.0)
    assert {name for name, _ in answer.attention} == set(graph.item_names[:2])


def test_the_answer_to_one_does_not_depend_on_the_others(suggester: Suggester) -> None:
    items = suggester.trained.corpus.graph.items.tolist()
    requests = [items[:1], [], items[3:9], items[4:6]]
    together = suggester.recommend(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = suggester.recommend([request])
        assert [item.id for item in alone.items] == [item.id for item in answer.items]


def test_everything_mentioned_leaves_nothing(suggester: Suggester) -> None:
    items = suggester.trained.corpus.graph.items.tolist()
    (answer,) = suggester.recommend([items[1:]])
    assert [item.name for item in answer.items] == [suggester.trained.corpus.graph.item_names[0]]
    assert suggester.recommend([]) == []


def test_a_text_is_read_as_items_and_other_nodes(suggester: Suggester) -> None:
    graph = suggester.trained.corpus.graph
    name = graph.item_names[5]
    nodes, notes = suggester.read(f"I loved {name}, any horror movies?")
    assert nodes[0] == graph.items[5]
    assert [graph.node_name(node) for node in nodes[1:]]
    assert notes == ()
    title = name.rpartition(" (")[0]
    nodes, notes = suggester.read(f"I loved {title} (1871)")
    assert graph.items[5] not in nodes
    assert "not" not in notes or "1871" in notes[0]


@pytest.mark.parametrize("text", ["", "   ", "🙂🙂", "x" * 10_000, "映画が好き", "\x00\x1b[2J"])
def test_whatever_is_typed_gets_an_answer(suggester: Suggester, text: str) -> None:
    nodes, _ = suggester.read(text)
    (answer,) = suggester.recommend([nodes], k=3)
    assert len(answer.items) == 3


def test_an_answer_takes_less_than_50_ms(suggester: Suggester) -> None:
    request = suggester.trained.corpus.graph.items[:3].tolist()
    suggester.recommend([request])
    times = []
    for _ in range(5):
        start = time.process_time()
        suggester.recommend([request])
        times.append(time.process_time() - start)
    assert min(times) < 0.05


class TestCommand:
    def test_items_by_name_and_identifier(
        self, command: Callable[..., Any], run: Path, suggester: Suggester
    ) -> None:
        catalogue = suggester.trained.corpus.graph.catalogue
        items = json.dumps([catalogue.names[0], catalogue.ids[1]])
        done = command("recommend", "--run", run, "--items", items, "--k", 4, "--output", "a.json")
        assert done.status == 0, done
        (answer,) = json.loads(Path("a.json").read_text())
        assert len(answer["items"]) == 4
        assert {name for name, _ in answer["attention"]} == set(catalogue.names[:2])
        assert answer["items"][0]["name"] in done.output
        assert "because of" in done.output

    def test_an_identifier_needs_no_quotation_marks(
        self, command: Callable[..., Any], run: Path, suggester: Suggester
    ) -> None:
        catalogue = suggester.trained.corpus.graph.catalogue
        one, two = catalogue.ids[:2]
        for items, count in ((one, 1), (f"[{one}]", 1), (f"[{one}, {two}]", 2), (f'["{one}"]', 1)):
            done = command("recommend", "--run", run, "--items", items, "--output", "a.json")
            assert done.status == 0, done
            (answer,) = json.loads(Path("a.json").read_text())
            assert {name for name, _ in answer["attention"]} == set(catalogue.names[:count])
        assert command("recommend", "--run", run, "--items", catalogue.names[0]).status == 0
        command("recommend", "--run", run, "--items", "99999").refused("'99999'", "catalogue")

    def test_a_text_that_is_not_understood_is_said_to_be(
        self, command: Callable[..., Any], run: Path
    ) -> None:
        done = command("recommend", "--run", run, "--text", "Kind1")
        assert (done.status, done.output.count("\n")) == (0, 10)
        assert done.errors.startswith("the request: nothing in it was recognised")

    def test_each_line_of_standard_input_is_a_request(
        self, command: Callable[..., Any], run: Path, suggester: Suggester
    ) -> None:
        name = suggester.trained.corpus.graph.item_names[0]
        done = command("recommend", "--run", run, "--k", 1, stdin=f"I like {name}\nhello\n")
        assert done.status == 0, done
        assert done.output.count("1. ") == 2
        (note,) = done.errors.splitlines()  # the list alone would look as if it were understood
        assert note.startswith("request 2: nothing in it was recognised; the list is the one for")

    def test_wrong_use(self, command: Callable[..., Any], run: Path) -> None:
        wrong = ["--items", '["No such film (1999)"]']
        command("recommend", "--run", run, *wrong).refused("No such film (1999)", "catalogue")
        command("recommend", "--run", run, "--text", "hi", "--k", 0).refused("at least 1")
        command("recommend", "--run", run).refused("standard input", "empty")

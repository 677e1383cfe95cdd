"""Parts and batches, the made data, the sample, preparing and loading."""

import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from separata_kbrd import sample
from separata_kbrd.config import DataConfig
from separata_kbrd.corpus import counts_of, make_corpus
from separata_kbrd.data import load
from separata_kbrd.made import tiny
from separata_kbrd.pairs import Flow, Part
from separata_kbrd.prepare import prepare, read_source
from separata_kbrd.redial import TurnPair
from separata_kbrd.words import END, SPECIALS, UNK
from separata_shared.files import sha256


def pair(turn, text, label, items=(), targets=(), entities=(), label_entities=()):
    """A pair whose context is not looked at."""
    nodes = {"items": items, "targets": targets, "entities": entities}
    more = {"label_entities": label_entities, "context_items": (), "context_entities": ()}
    return TurnPair(opens=turn == 1, turn=turn, text=text, label=label, **nodes, **more)


# Two dialogs; the text of a pair is its tokens.
PAIRS = [
    pair(1, "", "10 11"),
    pair(2, "12", "13 14", items=(5, 5), targets=(7, 6, 7), entities=(9,), label_entities=(8,)),
    pair(3, "15 16", "17", items=(6,), targets=(2,)),
    pair(1, "18", "19", targets=(3,)),
    pair(2, "", ""),
]


@pytest.fixture
def part():
    return Part.of(PAIRS, lambda text: [int(word) for word in text.split()])


def test_a_part_gives_its_pairs_back_with_their_context(part):
    found = part[2]
    assert (found.text, found.label, found.turn, found.opens) == ("15 16", "17", 3, False)
    assert (found.items, found.targets, found.entities) == ((6,), (2,), ())
    assert found.context_items == (5, 5, 7, 6, 7, 6)
    assert found.context_entities == (9, 8)
    assert part[3].context_items == ()
    assert part[-1] == part[4]
    assert part[1:3] == [part[1], part[2]]
    with pytest.raises(IndexError):
        part[5]


def test_a_flow_of_nothing_is_empty():
    flow = Flow.of([(True, [], []), (False, [], [])])
    assert flow.before(1).tolist() == []
    assert Flow.of([]).bounds.shape == (0, 4)


def test_batches_for_the_recommender_hold_each_distinct_target_once(part):
    (batch,) = part.recommender_in_order(10, mentions="list")
    assert batch.nodes.tolist() == [[5, 5, 9, 0, 0, 0, 0, 0], [5, 5, 7, 6, 7, 6, 9, 8], [0] * 8]
    assert batch.mask.sum(dim=1).tolist() == [3, 8, 0]
    assert batch.row.tolist() == [0, 0, 1, 2]
    assert batch.target.tolist() == [7, 6, 2, 3]
    assert batch.turn.tolist() == [2, 2, 3, 1]
    assert batch.context.tolist() == [[5, 5, -1, -1, -1, -1], [5, 5, 7, 6, 7, 6], [-1] * 6]
    assert part.num_instances == 4
    (batch,) = part.recommender_in_order(10, mentions="set")
    assert batch.nodes.tolist() == [[5, 9, 0, 0, 0], [5, 6, 7, 8, 9], [0] * 5]


def test_an_epoch_holds_every_pair_with_a_target_once_and_depends_on_its_number(part):
    batches = part.recommender_batches(2, seed=3, mentions="set")
    targets = [
        sorted(t for batch in batches(epoch) for t in batch.target.tolist()) for epoch in (0, 1)
    ]
    assert targets == [[2, 3, 6, 7]] * 2
    assert all(len(batch.target) for epoch in range(20) for batch in batches(epoch))
    orders = {str([batch.target.tolist() for batch in batches(epoch)]) for epoch in range(10)}
    assert len(orders) > 1
    again = part.recommender_batches(2, seed=3, mentions="set")(4)
    assert [b.target.tolist() for b in again] == [b.target.tolist() for b in batches(4)]


def test_training_without_any_target_is_refused():
    part = Part.of([pair(1, "1", "2")], lambda text: [5])
    with pytest.raises(ValueError, match="no answer of the training part names an item"):
        part.recommender_batches(2, seed=1, mentions="set")
    assert list(part.recommender_in_order(2, mentions="set")) == []


def test_batches_for_the_dialog_model_hold_the_whole_history_and_an_end(part):
    (batch,) = part.dialog_in_order(10, mentions="set", max_length=9)
    row = {int(number): place for place, number in enumerate(batch.pair)}
    assert sorted(row) == [0, 1, 2, 3, 4]
    assert batch.xs[row[2]].tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert batch.xs[row[0]].tolist() == [0] * 7
    assert batch.ys[row[1]].tolist() == [13, 14, END]
    assert batch.ys[row[4]].tolist() == [END, 0, 0]
    assert batch.context[row[1]].tolist()[:2] == [5, 5]


def test_long_texts_keep_the_end_of_the_history_and_the_beginning_of_the_answer(part):
    (batch,) = part.dialog_in_order(10, mentions="set", max_length=2)
    row = {int(number): place for place, number in enumerate(batch.pair)}
    assert batch.xs[row[2]].tolist() == [15, 16]
    assert batch.ys[row[1]].tolist() == [13, 14]  # no room for the end
    assert batch.ys[row[2]].tolist() == [17, END]


def test_a_batch_of_empty_histories_has_one_column():
    part = Part.of([pair(1, "", "5")], lambda text: [int(word) for word in text.split()])
    (batch,) = part.dialog_in_order(4, mentions="set", max_length=8)
    assert batch.xs.tolist() == [[0]]
    assert batch.nodes.shape == (1, 0)


def test_every_epoch_of_the_dialog_model_holds_every_pair_once(part):
    batches = part.dialog_batches(2, seed=1, mentions="set", max_length=8)
    for epoch in range(3):
        assert sorted(n for batch in batches(epoch) for n in batch.pair.tolist()) == [0, 1, 2, 3, 4]
        assert max(len(batch.pair) for batch in batches(epoch)) == 2


TINY = DataConfig(threshold=10, tiny_dialogs=40)


@pytest.fixture(scope="module")
def corpus():
    return load(TINY)


def test_the_made_data_is_the_same_each_time_and_follows_its_seed(corpus):
    again = load(TINY)
    assert again.train[:20] == corpus.train[:20]
    assert np.array_equal(again.graph.edges, corpus.graph.edges)
    other = load(DataConfig(threshold=10, tiny_dialogs=40, split_seed=2))
    assert other.train[:20] != corpus.train[:20]


def test_wishes_of_the_made_data_are_answered_by_the_graph(corpus):
    neighbours = {}
    for head, tail, _ in corpus.graph.edges.tolist():
        neighbours.setdefault(head, set()).add(tail)
    for found in corpus.train:
        for target in found.targets:
            asked = set(found.context_entities) | set(found.context_items)
            assert any(asked & neighbours[node] for node in neighbours[target])
        if found.entities and found.targets:  # a wish names a genre and an actor
            assert set(found.entities) <= neighbours[found.targets[0]]


def test_the_made_data_has_what_real_data_has(corpus):
    counts = counts_of(corpus)
    assert counts["train"]["dialogs"] == 40
    assert counts["train"]["empty questions"] > 0
    assert counts["train"]["linked nodes"] > 40
    assert 0 < counts["test"]["pairs with a target"] < counts["test"]["pairs"]
    bare = [node for node in corpus.graph.items if corpus.graph.nodes[node].isdecimal()]
    assert bare  # films without a URI
    assert all(0 < node < corpus.graph.num_nodes for node in corpus.train.items.values if node)
    assert corpus.vocabulary.slot in corpus.train.tokens.values


def redial_files(folder: Path) -> None:
    """A small ReDial with a graph as a table."""
    made = tiny(items=20, dialogs=20, seed=1)

    def lines(dialogs) -> str:
        return "".join(json.dumps(raw(dialog)) + "\n" for dialog in dialogs)

    def raw(dialog) -> dict:
        worker = {"seeker": 1, "recommender": 2}
        messages = [{"senderWorkerId": worker[m.speaker], "text": m.text} for m in dialog.messages]
        return {
            "conversationId": dialog.id,
            "initiatorWorkerId": 1,
            "respondentWorkerId": 2,
            "messages": messages,
            "movieMentions": dict(dialog.names) or [],
            "initiatorQuestions": [],
            "respondentQuestions": [],
        }

    folder.mkdir()
    train = lines(made.train).encode()
    (folder / "train_data.jsonl.xz").write_bytes(lzma.compress(train))
    (folder / "test_data.jsonl").write_text(lines(made.test))
    nodes, names = made.triples.nodes, made.triples.relations
    rows = [f"{nodes[h]}\t{names[r]}\t{nodes[t]}\n" for h, r, t in made.triples.rows.tolist()]
    (folder / "graph.tsv").write_text("".join(rows))
    items = zip(
        made.catalogue.ids, made.catalogue.nodes.tolist(), made.catalogue.names, strict=True
    )
    table = "".join(f"{item}\t{nodes[node]}\t{name}\n" for item, node, name in items)
    (folder / "items.tsv").write_text("item\tnode\tname\n" + table)


@pytest.fixture
def redial(tmp_path):
    redial_files(tmp_path / "raw")
    raw, prepared = str(tmp_path / "raw"), str(tmp_path / "prepared")
    return DataConfig(dataset="redial", raw=raw, prepared=prepared, threshold=5)


def test_prepared_data_comes_back_as_it_was_made(redial, capsys):
    before = {path: sha256(path) for path in Path(redial.raw).iterdir()}
    prepare(data=redial)
    printed = capsys.readouterr().out
    for path, checksum in before.items():
        assert f"{checksum}  {path.name}  (read)" in printed
        assert sha256(path) == checksum  # raw files are only read
    made, read = make_corpus(read_source(redial), redial), load(redial)
    assert counts_of(read) == counts_of(made)
    assert counts_of(read)["train"]["dialogs"] == 18  # int(0.9 * 20)
    assert np.array_equal(read.graph.edges, made.graph.edges)
    assert read.graph.nodes == made.graph.nodes
    assert read.graph.item_names == made.graph.item_names
    assert read.vocabulary.fingerprint == made.vocabulary.fingerprint
    for name, part in made.parts.items():
        assert list(read.parts[name]) == list(part)
        assert np.array_equal(read.parts[name].tokens.values, part.tokens.values)


def test_mentions_outside_the_catalogue_are_counted(redial, capsys):
    prepare(data=redial)
    assert "left out" not in capsys.readouterr().out
    path = Path(redial.raw) / "test_data.jsonl"
    dialog = json.loads(path.read_text().splitlines()[0])
    for text in ("see @777", "or @0777 and @55", "@1000 is known"):
        dialog["messages"].append({"senderWorkerId": 2, "text": text})
    path.write_text(path.read_text() + json.dumps(dialog) + "\n")
    prepare(data=redial)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("left out: 3 mentions of items that are not in the catalogue")
    assert line.endswith("(2 identifiers, most often @777)")


def test_preparing_twice_gives_the_same_bytes(redial):
    prepare(data=redial)
    first = {path.name: sha256(path) for path in Path(redial.prepared).iterdir()}
    prepare(data=redial)
    assert first == {path.name: sha256(path) for path in Path(redial.prepared).iterdir()}


def test_given_validation_dialogs_are_taken_as_they_are(redial):
    values = {"raw": redial.raw, "prepared": redial.prepared, "threshold": 5}
    given = DataConfig(dataset="redial", valid_files=["test_data.jsonl"], **values)
    source = read_source(given)
    assert (len(source.train), len(source.valid)) == (20, 5)
    assert source.valid == source.test


def test_a_table_of_links_is_used_where_it_is_named(redial):
    nodes = read_source(redial).triples.nodes
    table = {"hello": [nodes[1], "<unknown>"]}
    (Path(redial.raw) / "links.json").write_text(json.dumps(table))
    values = {"raw": redial.raw, "prepared": redial.prepared, "threshold": 5}
    source = read_source(
        DataConfig(dataset="redial", links="table", link_table="links.json", **values)
    )
    assert list(source.link("hello")) == [1]
    assert list(source.link("i like horror movies")) == []
    none = read_source(DataConfig(dataset="redial", links="none", **values))
    assert list(none.link("hello")) == []


def test_dialogs_can_be_numbered_by_the_words_of_a_dictionary(redial, tmp_path, capsys):
    (tmp_path / "model.dict").write_text(
        "".join(f"{word}\t9\n" for word in (*SPECIALS, "movie", "horror", "?"))
    )
    given = replace(redial, dictionary=str(tmp_path / "model.dict"), slots="shared")
    prepare(data=given)
    assert "model.dict  (read)" in capsys.readouterr().out
    corpus = load(given)
    assert corpus.vocabulary.pieces == (*SPECIALS, "movie", "horror", "?")
    assert set(corpus.train.tokens.values.tolist()) == {UNK, 4, 5, 6}
    with pytest.raises(ValueError, match="was prepared with slots"):
        load(redial)


def test_data_prepared_otherwise_or_damaged_is_refused(redial, command):
    arguments = ["--data.dataset", "redial", "--data.raw", redial.raw, "--data.threshold", "5"]
    arguments += ["--data.prepared", redial.prepared]
    with pytest.raises(ValueError, match="run the verb prepare"):
        load(redial)
    assert command("prepare", *arguments).status == 0
    with pytest.raises(ValueError, match="was prepared with threshold 5"):
        load(DataConfig(dataset="redial", raw=redial.raw, prepared=redial.prepared, threshold=6))
    (Path(redial.prepared) / "edges.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"edges\.npy: has 6 bytes"):
        load(redial)


def test_wrong_use_of_prepare_ends_in_one_line(redial, command, tmp_path):
    arguments = ["--data.dataset", "redial", "--data.prepared", tmp_path / "p"]
    command("prepare", *arguments, "--data.raw", tmp_path / "no").refused("no such directory")
    (tmp_path / "empty").mkdir()
    command("prepare", *arguments, "--data.raw", tmp_path / "empty").refused("holds no graph")
    raw = ["--data.raw", redial.raw]
    command("prepare", *arguments, *raw, "--data.train_files", "[a.jsonl]").refused("a.jsonl")
    command("prepare", *arguments, *raw, "--data.links", "table").refused("text_dict.pkl")
    command("prepare", *arguments, *raw, "--data.links", "spotlight").refused("spotlight_url")
    command("prepare", *arguments, *raw, "--data.threshold", "100000").refused("threshold")
    command("prepare", *arguments, *raw, "--data.train_share", "1").refused("train_share")
    assert not (tmp_path / "p").exists()


def test_tiny_needs_no_preparation(command):
    assert "nothing to prepare" in command("prepare").output


SAMPLE_FILES = {
    "item": "item_id\ttitle\tyear\tclass\n"
    + "".join(f"{n}\tFilm {n}, The\t199{n % 10}\tHorror Sci-Fi\n" for n in range(1, 12))
    + "12\tunknown\tunknown\tunknown\n",
    "link": "item_id\tentity_id\n1\tm.1\n2\tm.2\n",
    "kg": "head\trelation\ttail\nm.1\tfilm.actor\tm.9\nm.9\tactor.film\tm.2\n",
    "inter": "user\titem\trating\ttime\n"
    + "".join(
        f"{user}\t{item}\t{5 - (item == 3)}\t{100 - item}\n"
        for user in range(30)
        for item in range(1, 12)
    )
    + "7\t12\t1\t3\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Files laid out as those of the package, which need not be installed."""
    for ending, content in SAMPLE_FILES.items():
        (tmp_path / f"ml-100k.{ending}").write_text(content)
    monkeypatch.setattr(sample, "_find", lambda name: tmp_path / name)
    return tmp_path


def test_the_dialogs_of_the_sample_follow_the_ratings(package):
    source = sample.sample(dialogs=1000, seed=1)
    # Eleven liked films of each of 30 people are two pieces of five; 24, 3 and 3 people.
    assert [len(part) for part in (source.train, source.valid, source.test)] == [48, 6, 6]
    assert source.catalogue.names[0] == "The Film 1 (1991)"
    assert source.catalogue.names[-1] == "unknown"
    assert source.triples.nodes[source.catalogue.nodes[0]] == "m.1"
    for dialog in source.train:
        # Ratings are in the order of time, the last film first.
        assert list(dialog.names) in (["11", "10", "9", "8", "7"], ["6", "5", "4", "3", "2"])
    corpus = make_corpus(source, DataConfig(dataset="sample", threshold=0))
    first = next(found for found in corpus.train if found.targets)
    assert len(first.items) == 2
    assert len(first.targets) == 1
    genres = {corpus.graph.node_name(node) for node in corpus.train.entities.values.tolist()}
    assert genres == {"Horror film", "Sci-Fi film"}


def test_nobody_is_in_two_parts_of_the_sample(package):
    source = sample.sample(dialogs=1000, seed=1)
    people = [
        {d.id.split("-")[0] for d in part} for part in (source.train, source.valid, source.test)
    ]
    assert sum(map(len, people)) == len(set.union(*people)) == 30
    fewer = sample.sample(dialogs=16, seed=1)
    assert len(fewer.train) + len(fewer.valid) + len(fewer.test) == 16


def test_a_sample_that_is_not_installed_says_how_to_install_it(command, monkeypatch):
    def missing(name):
        raise sample.PackageNotFoundError(name)

    monkeypatch.setattr(sample, "distribution", missing)
    outcome = command("prepare", "--config", "sample")
    outcome.refused("pip install --no-deps recbole==1.2.1")


def test_a_damaged_table_of_the_sample_is_named(package):
    (package / "ml-100k.inter").write_text("user\titem\n1\t2\n")
    with pytest.raises(ValueError, match=r"ml-100k\.inter: not a table of 4 columns"):
        sample.sample(dialogs=100, seed=1)


def test_batches_move_to_a_device(part):
    from separata_shared.data import to_device

    (batch,) = part.recommender_in_order(10, mentions="set")
    moved = to_device(batch, torch.device("cpu"))
    assert type(moved) is type(batch)

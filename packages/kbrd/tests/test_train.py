"""Training and scoring of the recommender on made data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_kbrd.build import build_recommender
from separata_kbrd.config import DataConfig, RecommenderConfig
from separata_kbrd.data import load
from separata_kbrd.evaluate import evaluate, summarise
from separata_kbrd.pairs import Part
from separata_kbrd.recommendation import rank_instances, recalls, recommendation_step
from separata_kbrd.runs import load_recommender
from separata_kbrd.train import frozen_scorer, train_autorec, train_rec
from separata_shared.training import Run, TrainConfig, fit

DATA = DataConfig(dataset="tiny", threshold=10, tiny_dialogs=80, tiny_items=24)
SIZES = RecommenderConfig(width=16, num_bases=2, batch_pairs=32)
TRAIN = TrainConfig(steps=30, lr=1e-2, log_every=10, evaluate_every=10, deterministic=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a recommender and the autoencoder."""
    path = tmp_path_factory.mktemp("runs") / "made"
    train_rec(data=DATA, recommender=SIZES, train=TRAIN, run=path)
    train_autorec(data=DATA, recommender=SIZES, train=TRAIN, run=path)
    return path


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_ten_dialogs_are_learned_by_heart(aggregate: Any, tmp_path: Path) -> None:
    """Acceptance check 11: recall@1 is 1 where contexts are distinct."""
    corpus = load(DATA)
    (several,) = corpus.train.recommender_in_order(10**6, mentions="set")
    chosen: dict[tuple[int, ...], int] = {}
    for row in several.row.tolist():
        context = tuple(several.nodes[row][several.mask[row]].tolist())
        if context and row not in chosen.values():
            chosen.setdefault(context, row)
    rows = torch.tensor(sorted(chosen.values())[:10])
    first = torch.tensor([several.row.tolist().index(row) for row in rows.tolist()])
    batch = several._replace(
        nodes=several.nodes[rows],
        mask=several.mask[rows],
        context=several.context[rows],
        row=torch.arange(len(rows)),
        target=several.target[first],
        turn=several.turn[first],
    )
    torch.manual_seed(1)
    model = build_recommender(RecommenderConfig(width=16, aggregate=aggregate), corpus.graph)
    config = TrainConfig(steps=150, lr=1e-2, save_every=1000)
    fit(model, lambda epoch: [batch], recommendation_step, config=config, run=Run(tmp_path))
    items = torch.tensor(corpus.graph.items)
    ranked, loss = rank_instances(frozen_scorer(model), [batch], items)
    assert len(rows) == 10
    assert recalls(ranked.rank, {})["all"]["recall@1"]["value"] == 100.0
    assert loss < 0.5


def test_training_lowers_the_loss(run: Path) -> None:
    losses = [r["loss"] for r in Run(run / "recommender").records() if r["kind"] == "evaluate"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_weights(run: Path, tmp_path: Path) -> None:
    train_rec(data=DATA, recommender=SIZES, train=TRAIN, run=tmp_path / "again")
    first, second = (
        (folder / "recommender/weights/step_0000030.safetensors").read_bytes()
        for folder in (run, tmp_path / "again")
    )
    assert first == second


def test_scores_stand_beside_the_baselines(run: Path) -> None:
    record = evaluate(run=run)
    assert json.loads((run / "scores.json").read_text()) == record
    scores = record["recommender"]
    assert scores["candidates"] == 24
    names = ("kbrd", "autorec", "popularity", "repetition")
    count = load(DATA).test.num_instances
    for name in names:
        part = scores[name]["all"]
        assert {score["n"] for score in part.values()} == {count}
        assert sum(turn["recall@1"]["n"] for turn in scores[name]["by_turn"].values()) == count
        assert 0 <= part["recall@1"]["value"] <= part["recall@10"]["value"] <= 100
    assert {"loss"} <= scores["kbrd"].keys() & scores["autorec"].keys()
    assert scores["repetition"]["new"]["recall@10"]["value"] == 0  # it can only repeat


def test_cached_vectors_are_those_of_the_weights(run: Path) -> None:
    trained = load_recommender(run)
    again = load_recommender(run)  # from the file this time
    assert torch.equal(trained.model.H, again.model.H)
    model = build_recommender(trained.config, trained.corpus.graph)
    from separata_shared.training import load_weights

    load_weights(model, trained.weights)
    assert torch.equal(model.frozen().H, again.model.H)


def test_a_damaged_cache_is_refused(run: Path, tmp_path: Path) -> None:
    trained = load_recommender(run)
    file = run / "recommender" / "vectors" / trained.weights.name
    kept = file.read_bytes()
    try:
        file.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(ValueError, match=r"vectors.*not a readable safetensors file"):
            load_recommender(run)
    finally:
        file.write_bytes(kept)


def test_new_weights_make_new_vectors(run: Path) -> None:
    trained = load_recommender(run)
    file = run / "recommender" / "vectors" / trained.weights.name
    before = file.stat().st_mtime_ns
    trained.weights.touch()
    load_recommender(run)
    assert file.stat().st_mtime_ns > before


def test_a_summary_has_mean_and_spread(run: Path, tmp_path: Path) -> None:
    evaluate(run=run)
    record = json.loads((run / "scores.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    score = record["recommender"]["kbrd"]["all"]["recall@10"]
    value = score["value"]
    score["value"] = value + 2
    (other / "scores.json").write_text(json.dumps(record))
    summary = summarise(runs=[run, other], output=tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    found = summary["scores"]["recommender.kbrd.all.recall@10"]
    assert found["mean"] == pytest.approx(value + 1)
    assert found["std"] == pytest.approx(2**0.5)
    assert found["values"] == [value, value + 2]
    alone = summarise(runs=[run], output=tmp_path / "one.json")
    assert alone["scores"]["recommender.kbrd.all.recall@10"]["std"] is None


def test_runs_scored_on_different_things_have_no_summary(run: Path, tmp_path: Path) -> None:
    evaluate(run=run)
    other = tmp_path / "other"
    other.mkdir()
    (other / "scores.json").write_text('{"split": "test"}')
    with pytest.raises(ValueError, match="differs from"):
        summarise(runs=[run, other], output=tmp_path / "summary.json")
    assert not (tmp_path / "summary.json").exists()


class TestCommands:
    """Wrong use of the verbs of the recommender ends in one line."""

    def test_nothing_trained(self, command: Callable[..., Any]) -> None:
        for verb in ("evaluate", "recommend"):
            command(verb, "--run", "nowhere").refused("nowhere", "run the verb train-rec first")

    def test_a_size_of_nothing(self, command: Callable[..., Any]) -> None:
        command("train-rec", "--recommender.width", "0").refused("width", "at least 1")

    def test_an_unknown_normaliser(self, command: Callable[..., Any]) -> None:
        command("train-rec", "--recommender.aggregate", "max").refused("aggregate")

    def test_weights_of_another_model(self, command: Callable[..., Any], run: Path) -> None:
        wrong = run / "autorec" / "weights" / "step_0000030.safetensors"
        command("evaluate", "--run", run, "--weights", wrong).refused(
            str(wrong), "unknown tensor", "another model"
        )

    def test_a_summary_of_nothing(self, command: Callable[..., Any]) -> None:
        command("summarise", "--runs", "[]").refused("name at least one")


def test_a_part_without_targets_cannot_be_trained_on() -> None:
    corpus = load(DATA)
    pairs = [pair for pair in corpus.train if not pair.targets][:3]
    part = Part.of(pairs, lambda text: [])
    with pytest.raises(ValueError, match="no answer of the training part names an item"):
        part.recommender_batches(8, seed=1, mentions="set")

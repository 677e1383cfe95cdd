"""Training and scoring of the dialog model."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_kbrd.config import DataConfig, DialogConfig
from separata_kbrd.evaluate_dialog import dialog_scores, perplexities, variety
from separata_kbrd.replies import ReplyLoss
from separata_kbrd.runs import load_recommender
from separata_kbrd.system import Context, System, load_system
from separata_kbrd.train_dialog import train_dialog
from separata_shared.training import TrainConfig, read_weights
from separata_shared.training import fit as train_loop

SETTINGS = {"log_every": 5, "save_every": 5, "deterministic": True}


@pytest.fixture
def run(talking_run: Path, tmp_path: Path) -> Path:
    """A run directory with the trained recommender alone."""
    shutil.copytree(talking_run / "recommender", tmp_path / "run" / "recommender")
    return tmp_path / "run"


def fit(run: Path, system: System, **changes: Any) -> float:
    """Train for a few steps; the last training loss."""
    settings = {"steps": 10, "lr": 0.01, **SETTINGS, **changes}
    result = train_dialog(
        data=system.recommender.data,
        dialog=system.config,
        train_dialog=TrainConfig(**settings),
        run=run,
    )
    return result.metrics["loss"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(next(iter(sorted((run / "dialog" / "weights").glob("*10.safetensors")))))


def test_equal_seeds_give_equal_weights_also_when_interrupted_and_the_recommender_stays(
    run: Path, system: System, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    before = [file.read_bytes() for file in sorted((run / "recommender").rglob("*.safetensors"))]
    fit(run, system)
    fit(other, system, steps=5)
    # The same run with more steps goes on from its last checkpoint.
    config = other / "dialog" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 5", "steps: 10"))
    fit(other, system)
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    after = [file.read_bytes() for file in sorted((run / "recommender").rglob("*.safetensors"))]
    assert before == after


def test_the_authors_optimizer_learns(run: Path, system: System) -> None:
    loss = fit(run, system, steps=30, optimizer="sgd", lr=1.0, clip_norm=0.1)
    assert loss < 0.9 * math.log(len(system.vocabulary))


def test_other_data_and_another_recommender_are_refused(run: Path, system: System) -> None:
    data = replace(system.recommender.data, tiny_dialogs=65)
    with pytest.raises(ValueError, match="other data"):
        train_dialog(data=data, dialog=DialogConfig(), train_dialog=TrainConfig(), run=run)
    fit(run, system)
    load_system(run)
    (run / "dialog" / "recommender.json").write_text('{"weights": "x", "sha256": "y"}')
    with pytest.raises(ValueError, match=r"recommender\.json.*train-dialog again"):
        load_system(run)
    with pytest.raises(ValueError, match=r"recommender\.json.*delete"):
        fit(run, system, steps=10)  # nothing is left to do, but it is not this recommender's
    (run / "dialog" / "vocabulary.txt").write_text("slots: separate\nother\n")
    with pytest.raises(ValueError, match=r"vocabulary\.txt"):
        load_system(run)


def test_what_was_trained_until_an_interruption_can_be_used(
    run: Path, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        train_loop(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("separata_kbrd.train_dialog.fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(run, system, steps=5)
    assert load_system(run).respond([Context()])[0].words


def test_without_a_recommender_the_message_names_the_verb(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train-rec"):
        train_dialog(
            data=DataConfig(), dialog=DialogConfig(), train_dialog=TrainConfig(), run=tmp_path
        )


def test_cached_vectors_give_the_logits_of_vectors_computed_anew(
    talking_run: Path, system: System
) -> None:
    (vectors,) = (talking_run / "recommender" / "vectors").iterdir()
    again = vectors.rename(vectors.with_suffix(".kept"))
    fresh = load_recommender(talking_run).model
    again.unlink()
    batch = system.recommender.corpus.test.dialog_in_order(8, mentions="set", max_length=200)[0]
    logits = []
    for model in (system.recommender.model, fresh):
        user, _ = model.users(batch.nodes, batch.mask)
        with torch.no_grad():
            logits.append(system.network(batch.xs, batch.ys, user))
    assert torch.allclose(*logits, rtol=0, atol=1e-6)


def test_scores_count_every_answer_and_write_what_was_scored(
    talking_run: Path, system: System
) -> None:
    record = dialog_scores(talking_run, "test")
    part = system.recommender.corpus.test
    lines = (talking_run / "replies.test.jsonl").read_text().splitlines()
    replies = [json.loads(line) for line in lines]
    assert [line["pair"] for line in replies] == list(range(len(part)))
    assert record["item_ratio"]["n"] == record["distinct_3_per_response"]["n"] == len(part)
    with_slot = sum("__item__" in line["reply"].split() for line in replies)
    assert record["item_ratio"]["value"] == with_slot / len(part)
    slots = sum(list(part.tokens.answer(pair)).count(4) for pair in range(len(part)))
    assert record["perplexity"]["n"] - record["perplexity_without_slots"]["n"] == slots
    assert 1 < record["perplexity"]["value"] < len(system.vocabulary)


def losses(*rows: tuple[float, int, float, int]) -> list[ReplyLoss]:
    return [ReplyLoss(*(torch.tensor(number) for number in row)) for row in rows]


def test_perplexity_is_that_of_all_tokens_not_a_mean_over_batches() -> None:
    found = perplexities(losses((6.0, 3, 4.0, 1), (1.0, 5, 0.0, 0)))
    assert found["perplexity"].value == pytest.approx(math.exp(7 / 8))
    assert found["perplexity_without_slots"].value == pytest.approx(math.exp(3 / 7))
    assert found["perplexity_without_slots"].n == 7


def test_variety_counts_empty_answers() -> None:
    found = variety([["a", "S", "S"], [], ["a", "S", "S"], ["b"]], slot="S")
    assert found["item_ratio"].value == 0.5
    assert found["items_per_response"].value == 1.0
    assert found["words_per_response"].value == 7 / 4
    assert found["distinct_2_per_response"].value == 2 / 4  # a S, S S
    assert found["distinct_2"].value == 2 / 4  # of four bigrams
    assert found["distinct_4_per_response"].value == 0.0
    assert "distinct_4" not in found


def test_truncated_and_foreign_files_end_in_one_line(
    command: Callable[..., Any], talking_run: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(talking_run, broken)
    for file in (broken / "dialog" / "weights").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    command("generate", "--run", broken, stdin="hello\n").refused("safetensors")
    config = broken / "dialog" / "config.yaml"
    config.write_text("dialog: 3\n")
    command("generate", "--run", broken, stdin="hello\n").refused("config.yaml")
    (broken / "dialog" / "vocabulary.txt").unlink()
    shutil.copy(talking_run / "dialog" / "config.yaml", config)
    command("chat", "--run", broken).refused("vocabulary.txt")

"""Text, runs and files at the edge of what the pipeline can be given."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from separata_imitation_nat.ablate import compare
from separata_imitation_nat.build import build_learner
from separata_imitation_nat.generate import (
    kind_of,
    length_report,
    load_learner,
    open_run,
    read_scorer,
)
from separata_imitation_nat.quality import (
    ActionUse,
    bleu_by_length,
    bleu_of,
    bleu_statistics,
    collapse,
    length_accuracy,
    paired_bootstrap,
    repeated_tokens,
)
from separata_shared.metrics import bleu

Command = Callable[..., Any]
WORDS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=12).map(" ".join)


@pytest.fixture
def runs(learner: Path, tmp_path: Path) -> Path:
    """The small pipeline, free to be damaged: ``runs`` in the test's directory."""
    return Path(shutil.copytree(learner.parent, tmp_path / "runs"))


@given(st.lists(st.integers(4, 7), max_size=30))
def test_collapsed_tokens_repeat_nothing_and_keep_their_order(tokens: list[int]) -> None:
    short = collapse(tokens)
    assert all(a != b for a, b in pairwise(short))
    assert set(short) == set(tokens)
    assert collapse(short) == short
    if tokens:
        repeated = repeated_tokens([tokens])
        assert len(tokens) - len(short) == round(repeated.value * len(tokens) / 100)


def test_repeated_tokens_do_not_reach_over_sentences() -> None:
    assert repeated_tokens([[5, 5, 6], [6, 7]]).value == pytest.approx(100 / 5)
    with pytest.raises(ValueError, match="nothing to score"):
        repeated_tokens([[], []])


def test_lengths_within_a_distance() -> None:
    assert length_accuracy([3, 4, 9], [3, 8, 4], 0).value == pytest.approx(100 / 3)
    assert length_accuracy([3, 4, 9], [3, 8, 4], 4).value == pytest.approx(200 / 3)


def test_buckets_hold_every_sentence_once_and_their_edges_belong_below() -> None:
    texts = ["a b c d"] * 5
    scores = bleu_by_length(texts, texts, [10, 11, 50, 51, 200])
    assert {name: score["n"] for name, score in scores.items()} == {
        "1-10": 1, "11-20": 1, "41-50": 1, "51-": 2,
    }  # fmt: skip


def test_action_use_of_known_distributions() -> None:
    use = ActionUse()
    pi = torch.zeros(2, 1, 4, 4)
    pi[0] = torch.eye(4)  # three actions once each: perplexity 3
    pi[1, ..., 2] = 1  # one action alone: perplexity 1
    pi[:, :, 3] = torch.tensor([1.0, 0, 0, 0])  # padding, must not count
    real = torch.tensor([[True, True, True, False]])
    use.add(pi, real)
    first, second = use.result()
    assert first["perplexity"] == pytest.approx(3)
    assert (first["used"], second["used"]) == (3, 1)
    assert second["perplexity"] == pytest.approx(1)
    assert ActionUse().result() == []


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_summed_statistics_give_sacrebleus_score(pairs: list[tuple[str, str]]) -> None:
    hypotheses, references = [a for a, _ in pairs], [b for _, b in pairs]
    found = bleu_of(bleu_statistics(hypotheses, references).sum(axis=0))
    assert found == pytest.approx(bleu(hypotheses, references).value, abs=1e-9)


def test_the_bootstrap_is_paired_and_repeats() -> None:
    references = [f"the {n} small dogs run over the {n % 7} green hills" for n in range(60)]
    worse = [line.replace("dogs", "cats") if n % 2 else line for n, line in enumerate(references)]
    systems = {"right": [references], "worse": [worse], "same": [list(worse)]}
    found = paired_bootstrap(systems, references, baseline="worse", samples=200)
    assert found == paired_bootstrap(systems, references, baseline="worse", samples=200)
    assert found["same"]["difference_interval"] == [0.0, 0.0]
    assert found["same"]["p"] == 1.0
    low, high = found["right"]["difference_interval"]
    assert 0 < low <= found["right"]["difference"] <= high
    assert found["right"]["p"] == pytest.approx(1 / 200)
    low, high = found["worse"]["interval"]
    assert low < found["worse"]["bleu"] < high


def test_the_bootstrap_takes_the_mean_over_the_seeds() -> None:
    references = [f"the {n} small dogs run over the {n % 7} green hills today" for n in range(40)]
    short = [line.removesuffix(" green hills today") for line in references]
    long = [f"{line} and then they sleep" for line in references]
    systems = {"short and long": [short, long], "right": [references, references]}
    found = paired_bootstrap(systems, references, baseline="right", samples=50)
    mean = (bleu(short, references).value + bleu(long, references).value) / 2
    joined = bleu(short + long, references * 2).value
    assert abs(joined - mean) > 1  # one text would be spared the brevity penalty
    assert found["short and long"]["bleu"] == pytest.approx(mean, abs=1e-9)
    assert found["short and long"]["difference"] == pytest.approx(mean - 100, abs=1e-9)
    low, high = found["short and long"]["interval"]
    assert low <= mean <= high


def test_differences_are_taken_between_texts_decoded_in_the_same_way(tmp_path: Path) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, text in (("vanilla", "a b c x"), ("soft-copy", "a b c d"), ("imitation", "a b c d")):
        modes = ("one_length",) if name == "vanilla" else ("one_length", "rescored")
        run = tmp_path / name
        run.mkdir()
        score = {"value": 1.0, "signature": "s"}
        raw = dict.fromkeys(("bleu_detokenised", "bleu_tokenised", "repeated_tokens"), score)
        for mode in modes:
            (run / f"scores.{mode}.txt").write_text(f"{text}\n" * 3)
        translations = {mode: {"raw": raw} for mode in modes}
        found[name] = [{"run": run, "seed": 1, "scores": {"translations": translations}}]
    lines = compare(found, ["a b c d"] * 3, 20)
    assert lines["vanilla, one_length"]["compared_with"] == "soft-copy"
    assert lines["vanilla, one_length"]["bootstrap"]["difference"] < 0
    assert lines["imitation, rescored"]["bootstrap"]["difference"] == 0


def test_a_run_says_what_it_is(runs: Path, tmp_path: Path) -> None:
    for kind in ("teacher", "demonstrator", "learner"):
        assert kind_of(runs / kind) == kind
    with pytest.raises(ValueError, match="not a run directory"):
        kind_of(tmp_path)


def test_a_scorer_must_be_autoregressive_and_of_the_same_vocabulary(runs: Path) -> None:
    trained = open_run(runs / "learner", scorer=runs / "demonstrator").trained
    with pytest.raises(ValueError, match="learner: is a learner; only a teacher"):
        read_scorer(runs / "learner", trained)
    with pytest.raises(ValueError, match="needs the run directory of a teacher"):
        read_scorer(None, trained)


def test_a_teacher_is_no_place_for_a_learner(command: Command, runs: Path) -> None:
    shutil.copy(runs / "learner/config.yaml", runs / "teacher/config.yaml")
    command("translate", "--run", "runs/teacher", stdin=b"s1\n").refused("runs/teacher/weights")


@pytest.mark.parametrize("stage", ["teacher", "demonstrator", "learner"])
def test_cut_or_foreign_weights_are_named(command: Command, runs: Path, stage: str) -> None:
    for path in (runs / stage / "weights").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    run = ("--run", f"runs/{stage}", "--scorer", "runs/teacher")
    command("translate", *run, stdin=b"s1\n").refused("weights/step_", "safetensors")


@pytest.mark.parametrize("text", ["", "{", "model: 3\n", "model: {width: wide}\n"])
def test_a_damaged_configuration_is_named(command: Command, runs: Path, text: str) -> None:
    (runs / "learner/config.yaml").write_text(text)
    command("evaluate", "--run", "runs/learner").refused("config.yaml")


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "settings": 3}'])
def test_a_damaged_manifest_is_named(command: Command, runs: Path, text: str) -> None:
    (runs / "distilled/manifest.json").write_text(text)
    distilled = ("--teacher", "runs/teacher", "--output", "runs/distilled")
    command("distill", *distilled).refused("manifest.json")


def test_a_manifest_without_files_is_named(command: Command, runs: Path, small_yaml: Path) -> None:
    path = runs / "distilled/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]
    path.write_text(json.dumps(manifest))
    shutil.rmtree(runs / "demonstrator")
    places = ("--distilled", "runs/distilled", "--run", "runs/demonstrator")
    command("train-demonstrator", "--config", small_yaml, *places).refused("manifest.json")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"s1 " * 40, ("line 1 has 41 tokens", "32 positions")),
        (b"\xff\n", ("line 1 is not valid UTF-8",)),
        (b"", ("standard input: is empty",)),
    ],
)
def test_unusable_text_is_named(
    command: Command, runs: Path, line: bytes, words: tuple[str, ...]
) -> None:
    command("translate", "--run", "runs/learner", "--radius", 0, stdin=line).refused(*words)


def test_unknown_and_empty_words_are_translated(command: Command, runs: Path) -> None:
    text = b"s1\n\n \nwort s2\n"
    for radius in (0, 1):
        run = ("--run", "runs/learner", "--scorer", "runs/teacher", "--radius", radius)
        lines = command("translate", *run, stdin=text).output.split("\n")
        assert [bool(line) for line in lines] == [True, False, False, True, False]


def test_a_length_beyond_the_models_positions_is_reported_and_decoded_shorter(
    learner: Path,
) -> None:
    trained = load_learner(learner)
    model = replace(trained.model, positions="learned")
    network = build_learner(model).eval()
    longest = torch.arange(256).float()  # T - S = 127, and the model has 32 positions
    network.length.projection.register_forward_hook(lambda module, x, y: y + 9 * longest)
    source = torch.from_numpy(trained.source_vocabulary.encode("s1 s2 s3")).long()
    found = length_report(replace(trained, model=model, network=network), [source], [131])
    assert found["length"]["exact"]["value"] == 100
    assert len(found["actions"]) == 2


def test_files_of_different_lengths_cannot_be_scored(command: Command, runs: Path) -> None:
    Path("a.txt").write_text("s1\ns2\n")
    Path("b.txt").write_text("t1\n")
    files = ("--source", "a.txt", "--target", "b.txt")
    command("score", "--run", "runs/teacher", *files).refused("b.txt: has 1 lines, a.txt has 2")
    command("score", "--run", "runs/learner", *files).refused("runs/learner: is a learner")
    Path("c.txt").write_text("t1 " * 40 + "\nt1\n")
    files = ("--source", "a.txt", "--target", "c.txt")
    command("score", "--run", "runs/teacher", *files).refused("c.txt", "41 tokens")

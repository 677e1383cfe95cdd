"""The command line as a user meets it; in this process, except where starting up is the point."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_imitation_nat.__main__ import PACKAGE, VERBS
from separata_imitation_nat.decode import parallel_decode, teacher_scorer, window
from separata_imitation_nat.generate import load_teacher, open_run

Command = Callable[..., Any]
PROGRAM = PACKAGE.replace("_", "-")
STAGES = ("teacher", "distilled", "demonstrator", "learner")


def half_written(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if ".tmp" in path.name or ".old" in path.name]


@pytest.fixture
def runs(learner: Path, tmp_path: Path) -> Path:
    """The small pipeline where the commands look for it: ``runs/small``."""
    folder = tmp_path / "runs/small"
    for stage in STAGES:
        shutil.copytree(learner.parent / stage, folder / stage)
    return folder


@pytest.mark.slow
def test_the_whole_way_on_made_data_verb_by_verb(
    command: Command, small_yaml: Path, tmp_path: Path
) -> None:
    chosen = ("--config", small_yaml, "--train.steps", 3, "--train.evaluate_every", 3)
    assert command("prepare", "--config", small_yaml).output.startswith(
        "tiny: made when it is loaded"
    )
    assert command("train-teacher", *chosen).status == 0
    assert command("distill", "--config", small_yaml, "--beam", 1).status == 0
    assert command("train-demonstrator", *chosen).status == 0
    assert command("train", *chosen).status == 0
    assert command("train-mask-predict", *chosen).status == 0
    assert {path.name for path in Path("runs").iterdir()} == {"small"}
    evaluated = command("evaluate", "--config", small_yaml)
    assert evaluated.status == 0
    assert command("evaluate", "--run", "runs/small/mask-predict").status == 0
    assert not half_written(tmp_path)


def test_evaluate_prints_what_the_protocol_wants(command: Command, runs: Path) -> None:
    evaluated = command("evaluate", "--config", "runs/small/learner/config.yaml", "--run",
                        "runs/small/learner", "--scorer", "runs/small/teacher")  # fmt: skip
    assert evaluated.status == 0, evaluated
    scores = json.loads((runs / "learner/scores.json").read_text())
    assert set(scores["translations"]) == {"one_length", "rescored"}
    for mode, found in scores["translations"].items():
        for form in ("raw", "collapsed"):
            for name in ("bleu_detokenised", "bleu_tokenised"):
                assert "nrefs:1" in found[form][name]["signature"]
        repeated = found["raw"]["repeated_tokens"]
        assert repeated["unit"] == "percent"
        text = (runs / f"learner/scores.{mode}.txt").read_text()
        assert repeated["n"] == len(text.split())  # of words alone, without end marks
        assert sum(score["n"] for score in found["bleu_by_source_length"].values()) == 15
        assert len((runs / f"learner/scores.{mode}.txt").read_text().splitlines()) == 15
    assert scores["length"]["exact"]["value"] <= scores["length"]["within 4"]["value"]
    assert len(scores["actions"]) == 2
    for use in scores["actions"]:
        assert 1 <= use["perplexity"] <= use["actions"] == 8
        assert 1 <= use["used"] <= 8
    for words in ("one_length, raw:", "rescored, collapsed:", "tok:13a", "tok:none", "within 4",
                  "repeated tokens", "action perplexity"):  # fmt: skip
        assert words in evaluated.output
    assert "second" not in evaluated.output


@pytest.mark.parametrize("stage", ["teacher", "demonstrator"])
def test_an_autoregressive_run_is_evaluated_by_the_same_verb(
    command: Command, runs: Path, stage: str
) -> None:
    assert command("evaluate", "--run", f"runs/small/{stage}", "--split", "valid").status == 0
    scores = json.loads((runs / stage / "scores.valid.json").read_text())
    assert scores["kind"] == stage
    assert set(scores["translations"]) == {"beam"}
    assert "length" not in scores


def test_translate_keeps_lines_and_takes_any_run(command: Command, runs: Path) -> None:
    Path("in.txt").write_text("s1 s2 s3\n\ns4 s5\n")
    common = ("--scorer", "runs/small/teacher")
    for stage in ("learner", "teacher", "demonstrator"):
        run = ("--run", f"runs/small/{stage}", *common)
        assert command("translate", *run, "--input", "in.txt", "--output", "out.txt").status == 0
        lines = Path("out.txt").read_text().split("\n")
        assert [bool(line) for line in lines] == [True, False, True, False]
        piped = command("translate", *run, stdin=Path("in.txt").read_bytes())
        assert piped.output == Path("out.txt").read_text()
        assert command("translate", *run, "--limit", 1, "--input", "in.txt").output == (
            piped.output.split("\n")[0] + "\n"
        )


def test_one_length_needs_no_scorer(command: Command, runs: Path) -> None:
    shutil.rmtree(runs / "teacher")
    run = ("--run", "runs/small/learner", "--scorer", "runs/small/teacher")
    assert command("translate", *run, "--radius", 0, stdin=b"s1 s2\n").output.count("\n") == 1
    command("translate", *run, stdin=b"s1 s2\n").refused("runs/small/teacher: not a run directory")


def test_a_window_that_nobody_chooses_in_is_refused(command: Command, runs: Path) -> None:
    command("translate", "--run", "runs/small/teacher", "--radius", 1).refused("radius", "teacher")
    config = runs / "learner/config.yaml"
    config.write_text(config.read_text().replace("scorer: teacher", "scorer: none"))
    words = ("radius", "parallel.scorer none")
    command("translate", "--run", "runs/small/learner", "--radius", 1).refused(*words)


def test_an_exchanged_output_is_refused_before_anything_is_written(
    command: Command, runs: Path
) -> None:
    places = ("--run", "runs/small/learner", "--demonstrator", "runs/small/demonstrator")
    command("explain", *places, "--output", "actions.png").refused("output", "actions.png")
    assert not Path("actions.png").exists()


def test_lower_cased_models_score_lower_cased_lines(command: Command, runs: Path) -> None:
    config = runs / "teacher/config.yaml"
    config.write_text(config.read_text().replace("lowercase: false", "lowercase: true"))
    Path("source.txt").write_text("s1 s2\nS1 S2\n")
    Path("target.txt").write_text("t1 t2\nT1 T2\n")
    files = ("--source", "source.txt", "--target", "target.txt")
    first, second = command("score", "--run", "runs/small/teacher", *files).output.split()
    assert first == second


def test_a_clean_translation_repeats_no_word(command: Command, runs: Path) -> None:
    run = ("--run", "runs/small/learner", "--radius", 0)
    output = command("translate", *run, "--clean", "true", stdin=b"s1 s1 s1 s1 s2 s2 s2\n").output
    words = output.split()
    assert all(a != b for a, b in pairwise(words))


def test_score_gives_the_scores_that_choose_among_lengths(command: Command, runs: Path) -> None:
    # The winner of the window is the candidate to which the verb gives the highest score.
    translator = open_run(runs / "learner", scorer=runs / "teacher")
    line = "s1 s2 s3 s4"
    Path("source.txt").write_text(f"{line}\n" * 3)
    tokens = translator.trained.source_vocabulary.encode(line)
    found = parallel_decode(
        translator.trained.network,
        torch.from_numpy(tokens).long()[None],
        lengths=window(1),
        scorer=teacher_scorer(load_teacher(runs / "teacher").network),
    )
    vocabulary = translator.trained.target_vocabulary
    rows = [vocabulary.decode(row.tolist()) for row in found.candidates[0]]
    Path("target.txt").write_text("".join(f"{row}\n" for row in rows))
    files = ("--source", "source.txt", "--target", "target.txt")
    printed = command("score", "--run", "runs/small/teacher", *files)
    assert printed.status == 0, printed
    assert found.candidate_scores is not None
    expected = found.candidate_scores[0].tolist()
    assert [float(n) for n in printed.output.split()] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--config", "iwslt99"), ("iwslt99", "multi30k")),
        (("train", "--objective.imitation", "-1"), ("objective.imitation",)),
        (("train", "--stages.targets", "both"), ("stages.targets",)),
        (("train", "--stages.teacher_steps", "-1"), ("stages.teacher_steps",)),
        (("train", "--model.copy", "hard"), ("model.copy",)),
        (
            ("train", "--model.share_codebook", "true", "--train.parallel", "fsdp"),
            ("train.parallel", "model.share_codebook"),
        ),
        (("train-mask-predict", "--iterations", "0"), ("iterations",)),
        (("distill", "--teacher", "nowhere"), ("nowhere: not a run directory",)),
        (("evaluate", "--run", "nowhere"), ("nowhere: not a run directory",)),
        (("translate", "--run", "nowhere"), ("nowhere: not a run directory",)),
        (("translate", "--limit", "0"), ("limit",)),
        (("score", "--source", "a", "--target", "b", "--run", "nowhere"), ("nowhere",)),
        (("train", "--config", "multi30k"), ("prepared/multi30k", "prepare")),
        (("train-teacher", "--config", "multi30k"), ("prepared/multi30k", "prepare")),
    ],
)
def test_wrong_use_ends_in_one_line(
    command: Command, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    command(*arguments).refused(*words)
    assert not list(Path().iterdir())


def test_help_of_every_verb_explains_its_options(command: Command) -> None:
    for verb in VERBS:
        outcome = command(verb, "--help")
        assert outcome.status == 0
        assert "--config" in outcome.output
    assert all(verb in command("--help").output for verb in VERBS)


def test_help_of_the_program_does_not_import_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", PACKAGE, "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}

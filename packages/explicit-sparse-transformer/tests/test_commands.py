"""The command line as a user meets it; in this process, except where starting up is the point."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from separata_explicit_sparse_transformer.__main__ import PACKAGE, VERBS
from separata_explicit_sparse_transformer.generate import load_run
from separata_explicit_sparse_transformer.model import sparse_attentions
from separata_shared.cli import main, to_yaml
from separata_shared.training import Run, read_weights, save_weights

PROGRAM = PACKAGE.replace("_", "-")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    output: str
    errors: list[str]
    """Lines on stderr, without progress bars."""


Command = Callable[..., Outcome]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run the program with arguments in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(VERBS, package=PACKAGE, arguments=[str(argument) for argument in arguments])
        printed = capsys.readouterr()
        lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.strip()]
        return Outcome(
            int(left.value.code or 0), printed.out, [line for line in lines if "it/s" not in line]
        )

    return run


@pytest.fixture
def tiny(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file with the settings of the small run, and a small language model."""
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    language_model = (
        "language_model: {width: 8, hidden_width: 8, num_heads: 2, num_layers: 1, dropout: 0.0, "
        "max_span: 16, ramp: 4, initial_span: 0.2, top_k: 3, streams: 4, block: 16}\n"
    )
    path.write_text(to_yaml(small) + "label_smoothing: 0.1\n" + language_model)
    return path


def refused(outcome: Outcome, *words: str) -> None:
    """Exit status 2 and a single line that names what is at fault."""
    assert outcome.status == 2, outcome
    said = [line for line in outcome.errors if line.startswith(f"{PROGRAM}: error: ")]
    assert len(said) == 1, outcome
    assert outcome.errors[-1] == said[0]
    assert not any("Traceback" in line for line in outcome.errors)
    for word in words:
        assert word in said[0], said[0]


def left_behind(directory: Path) -> list[Path]:
    """Files that are half written."""
    return [path for path in directory.rglob("*") if ".tmp" in path.name or ".old" in path.name]


# ---- the whole way -------------------------------------------------------------------------------


def test_the_whole_way_on_made_data(command: Command, tiny: Path, tmp_path: Path) -> None:
    chosen = ("--config", tiny)
    run = ("--run", "runs/small")
    assert command("prepare", *chosen).output.startswith("tiny: made when it is loaded")
    assert command("train", *chosen, *run).status == 0
    assert command("average-checkpoints", *run, "--last", 2).status == 0
    average = "runs/small/weights/average.safetensors"
    evaluated = command("evaluate", *run, "--weights", average)
    assert evaluated.status == 0
    scores = json.loads(Path("runs/small/scores.json").read_text())
    assert "bleu_fairseq" in evaluated.output
    assert all(value["signature"] for value in scores["metrics"].values())
    Path("in.txt").write_text("s1 s2 s3\ns4 s5\n")
    assert command("generate", *run, "--input", "in.txt", "--output", "out.txt").status == 0
    piped = command("generate", *run, stdin=Path("in.txt").read_bytes())
    assert piped.output == Path("out.txt").read_text()
    assert piped.output.count("\n") == 2
    assert command("plot-attention", *run, "--output", "pictures", "--head", 0).status == 0
    assert {path.suffix for path in Path("pictures").iterdir()} == {".png", ".json"}
    # The configuration kept with the run repeats it.
    again = command("train", "--config", "runs/small/config.yaml", "--run", "runs/again")
    assert again.status == 0
    weights = [Run(Path(f"runs/{name}")).weight_files()[-1] for name in ("small", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not left_behind(tmp_path)


def test_experiments_and_conversion(command: Command, tiny: Path, tmp_path: Path) -> None:
    brief = ("--config", tiny, "--train.steps", 2)
    swept = command("sweep-k", *brief, "--top_k", "[2, 3]", "--run", "sweep")
    assert swept.status == 0
    records = json.loads(Path("sweep/sweep.json").read_text())
    assert [record["setting"] for record in records] == ["dense", "k = 2", "k = 3"]
    assert Path("sweep/sweep.png").exists()
    assert command("ablate-phase", *brief, "--run", "phases").status == 0
    assert len(json.loads(Path("phases/phases.json").read_text())) == 4
    dense = "sweep/dense-seed1"
    converted = command("convert", "--run", dense, "--output", "sparse", "--top_k", 2)
    assert converted.status == 0
    assert "mass kept" in converted.output
    assert len(sparse_attentions(load_run(Path("sparse")).network)) == 6
    assert command("evaluate", "--run", "sparse").status == 0
    assert not left_behind(tmp_path)


def test_language_model(command: Command, tiny: Path, tmp_path: Path) -> None:
    run = ("--run", "lm")
    assert command("train-lm", "--config", tiny, "--train.steps", 3, *run).status == 0
    scored = command("evaluate-lm", *run)
    assert scored.status == 0
    bits = json.loads(Path("lm/scores.json").read_text())["metrics"]["bits_per_character"]
    assert bits["signature"]
    assert bits["n"] > 0
    assert f"{bits['value']:.4f}" in scored.output
    assert not left_behind(tmp_path)


def write_text_data(raw: Path, **changes: bytes) -> Path:
    """Files of a parallel text; ``train_de=b"..."`` replaces one, ``b""`` empties it."""
    raw.mkdir()
    for part, count in (("train", 40), ("valid", 4), ("test", 4)):
        for language, words in (("de", "ein Hund läuft"), ("en", "a dog runs")):
            text = "".join(f"{words} {n % 5}\n" for n in range(count)).encode()
            (raw / f"{part}.{language}").write_bytes(changes.get(f"{part}_{language}", text))
    return raw


TEXT = (
    "--data.dataset", "text", "--data.raw", "raw", "--data.prepared", "prepared",
    "--data.segmentation", "words", "--data.vocabulary_size", "40",
)  # fmt: skip


def test_own_text_is_prepared_trained_on_and_translated(
    command: Command, tiny: Path, tmp_path: Path
) -> None:
    write_text_data(tmp_path / "raw")
    assert command("prepare", "--config", tiny, *TEXT).status == 0
    trained = command("train", "--config", tiny, *TEXT, "--train.steps", 2, "--run", "run")
    assert trained.status == 0
    assert command("generate", "--run", "run", stdin="ein Hund läuft 3\n".encode()).status == 0
    assert command("evaluate", "--run", "run").status == 0
    assert not left_behind(tmp_path)


def test_bare_commands_work_on_tiny(command: Command) -> None:
    # Nothing but the number of steps is given; the shipped configuration must fit together.
    assert command("prepare").status == 0
    printed = command("train", "--print_config").output
    assert "tiny_task: reverse" in printed
    assert command("train", "--train.steps", 3, "--train.save_every", 1).status == 0
    assert {path.name for path in Path("runs").iterdir()} == {"tiny"}
    assert command("average-checkpoints", "--last", 2).status == 0
    assert command("generate", stdin=b"s1 s2 s3\n").output.count("\n") == 1


# ---- starting up ---------------------------------------------------------------------------------


def test_help_of_every_verb_explains_every_option(command: Command) -> None:
    for verb in VERBS:
        outcome = command(verb, "--help")
        assert outcome.status == 0
        assert "--config" in outcome.output
    outcome = command("--help")
    assert outcome.status == 0
    assert all(verb in outcome.output for verb in VERBS)


@pytest.mark.parametrize("module", [True, False])
def test_help_of_the_installed_program_is_quick(module: bool) -> None:
    script = Path(sys.executable).with_name(PROGRAM)
    program = [sys.executable, "-m", PACKAGE] if module else [str(script)]
    if not module and not script.exists():
        pytest.skip("the script is not installed beside the interpreter")
    began = time.process_time() + sum(os.times()[2:4])
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=False)
    used = time.process_time() + sum(os.times()[2:4]) - began
    assert done.returncode == 0, done.stderr
    assert "plot-attention" in done.stdout
    assert used < 3.0  # seconds of processor time, what a free machine would take at most


def test_help_of_the_program_does_not_import_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", PACKAGE, "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


def test_a_failing_program_exits_with_two(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", PACKAGE, "evaluate", "--run", "nowhere"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"{PROGRAM}: error: nowhere: not a run directory; train one first\n"


# ---- bad configuration ---------------------------------------------------------------------------


def test_unknown_verb_and_option_are_named(command: Command) -> None:
    refused(command("translate"), "translate")
    refused(command("evaluate", "--beams", 3), "beams")


def test_unknown_configuration_is_named(command: Command) -> None:
    refused(command("train", "--config", "iwslt99"), "--config", "iwslt99", "iwslt14_de_en")


@pytest.mark.parametrize(
    ("replaced", "by", "word"),
    [
        ("width: 16", "breadth: 16", "breadth"),
        ("width: 16", "width: wide", "width"),
        ("kind: topk", "kind: best", "kind"),
        ("top_k: 3", "top_k: 0", "model.attention.top_k"),
        ("beam: 3", "beam: 0", "decode.beam"),
        ("lr: 0.005", "lr: -1.0", "train.lr"),
        ("dropout: 0.1", "dropout: 1.5", "model.dropout"),
        ("dataset: tiny", "dataset: huge", "dataset"),
        ("label_smoothing: 0.1", "label_smoothing: much", "label_smoothing"),
        ("label_smoothing: 0.1", "smoothing: 0.1", "smoothing"),
    ],
)
def test_bad_settings_are_named_with_the_file(
    command: Command, tiny: Path, replaced: str, by: str, word: str
) -> None:
    text = tiny.read_text()
    assert replaced in text
    tiny.write_text(text.replace(replaced, by, 1))
    refused(command("train", "--config", tiny), "small.yaml", word)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("override", "word"),
    [
        (("--model.width", "wide"), "width"),
        (("--model.breadth", "16"), "breadth"),
        (("--model.num_heads", "3"), "model.num_heads"),
        (("--train.precision", "fp8"), "precision"),
        (("--label_smoothing", "1.0"), "label_smoothing"),
        (("--model.max_length", "8"), "model.max_length"),
        (("--model.source_vocabulary_size", "7"), "model.source_vocabulary_size"),
        (("--data.max_tokens", "4"), "data.max_tokens"),
    ],
)
def test_bad_overrides_are_named(
    command: Command, tiny: Path, override: tuple[str, str], word: str
) -> None:
    refused(command("train", "--config", tiny, *override), word)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "content", [b"model: [\n", b"- 1\n", b"", b"\xff\xfe", b"model: 3\n", b"model:\n"]
)
def test_a_file_that_is_no_configuration_is_named(command: Command, content: bytes) -> None:
    Path("bad.yaml").write_bytes(content)
    refused(command("train", "--config", "bad.yaml"), "bad.yaml")
    assert [path.name for path in Path().iterdir()] == ["bad.yaml"]


# ---- bad data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_de": b""}, ("train.de", "empty")),
        ({"train_de": b"eins\n"}, ("train.de", "1 lines", "train.en", "40")),
        ({"valid_en": b"a\nb\nc\n\xff\n"}, ("valid.en", "line 4", "UTF-8")),
        ({"test_de": b"wort " * 40 + b"\n" + b"x\n" * 3}, ("test", "sentence 1", "41 tokens")),
    ],
)
def test_unusable_text_is_named(
    command: Command, tiny: Path, tmp_path: Path, changes: dict[str, bytes], words: tuple[str, ...]
) -> None:
    write_text_data(tmp_path / "raw", **changes)
    refused(command("prepare", "--config", tiny, *TEXT), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_missing_text_is_named(command: Command, tiny: Path, tmp_path: Path) -> None:
    refused(command("prepare", "--config", tiny, *TEXT), "raw/train.de", "no such file")
    write_text_data(tmp_path / "raw")
    (tmp_path / "raw" / "test.en").unlink()
    refused(command("prepare", "--config", tiny, *TEXT), "raw/test.en", "no such file")
    refused(command("train", "--config", tiny, *TEXT), "prepared", "no prepared data")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_data_prepared_otherwise_is_refused(command: Command, tiny: Path, tmp_path: Path) -> None:
    write_text_data(tmp_path / "raw")
    assert command("prepare", "--config", tiny, *TEXT).status == 0
    other = [*TEXT[:-1], "41"]
    refused(command("train", "--config", tiny, *other), "prepared", "vocabulary_size")
    tokens = tmp_path / "prepared" / "train.source.tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    refused(command("train", "--config", tiny, *TEXT), "train.source.tokens.npy")
    assert not (tmp_path / "runs").exists()


# ---- bad runs ------------------------------------------------------------------------------------


@pytest.fixture
def copy(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


READERS = ("generate", "evaluate", "plot-attention", "convert")


@pytest.mark.parametrize("verb", [*READERS, "average-checkpoints", "evaluate-lm"])
def test_a_missing_run_is_named(command: Command, verb: str) -> None:
    refused(command(verb, "--run", "nowhere", stdin=b"s1\n"), "nowhere")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("verb", READERS)
def test_truncated_and_foreign_weights_are_named(
    command: Command, copy: Path, verb: str, tmp_path: Path
) -> None:
    whole = Run(copy).best_weights().read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_weights(tmp_path / "other.safetensors", {"fc.weight": torch.zeros(2, 2)})
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "pickled.pt")
    before = sorted(tmp_path.rglob("*"))
    for name in ("truncated.safetensors", "other.safetensors", "pickled.pt", "missing"):
        outcome = command(verb, "--run", "run", "--weights", name, stdin=b"s1 s2\n")
        refused(outcome, name)
        assert outcome.output == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_truncated_checkpoint_is_named(command: Command, tiny: Path, copy: Path) -> None:
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    part = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:100])
    more = ("--config", tiny, "--run", "run", "--train.steps", 30)
    refused(command("train", *more), newest.name)


def test_a_run_of_another_model_is_not_continued(
    command: Command, tiny: Path, copy: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    outcome = command("train", "--config", tiny, "--run", "run", "--model.width", 32)
    refused(outcome, "run/config.yaml", "model")
    other = command("train", "--config", tiny, "--run", "run", "--data.tiny_symbols", 7)
    refused(other, "run", "vocabulary")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_run_of_the_other_kind_of_model_is_refused(
    command: Command, tiny: Path, copy: Path
) -> None:
    refused(command("evaluate-lm", "--run", "run"), "run/config.yaml", "language_model")
    assert command("train-lm", "--config", tiny, "--train.steps", 1, "--run", "lm").status == 0
    refused(command("generate", "--run", "lm", stdin=b"s1\n"), "lm/config.yaml", "model")
    refused(command("train-lm", "--config", tiny, "--train.steps", 1, "--run", "run"), "run")


def test_a_vocabulary_that_does_not_match_is_named(command: Command, copy: Path) -> None:
    path = copy / "target.vocabulary"
    path.write_text(path.read_text() + "extra\n")
    for verb in READERS:
        refused(command(verb, "--run", "run", stdin=b"s1\n"), "target.vocabulary")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "--beam", 0), ("decode.beam",)),
        (("generate", "--beam", "many"), ("beam",)),
        (("generate", "--limit", 0), ("limit",)),
        (("generate", "--input", "nowhere.txt"), ("nowhere.txt",)),
        (("evaluate", "--split", "train"), ("split",)),
        (("evaluate", "--beam", -1), ("decode.beam",)),
        (("plot-attention", "--head", 2), ("head", "0 to 1")),
        (("plot-attention", "--word", 99), ("word",)),
        (("average-checkpoints", "--last", 0), ("last",)),
        (("average-checkpoints", "--last", 9), ("run", "3 weight files")),
        (("convert", "--top_k", 0), ("top_k",)),
    ],
)
def test_impossible_values_are_named(
    command: Command, copy: Path, arguments: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    before = sorted(copy.parent.rglob("*"))
    outcome = command(*arguments, "--run", "run", stdin=b"s1 s2 s3\n")
    refused(outcome, *words)
    assert sorted(copy.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("standard input", "empty")),
        (b"s1\n\xff\n", ("standard input", "line 2", "UTF-8")),
        (b"s1\n" + b"s1 " * 20, ("standard input", "line 2", "21 tokens", "16 positions")),
    ],
)
def test_unusable_standard_input_is_named(
    command: Command, copy: Path, content: bytes, words: tuple[str, ...]
) -> None:
    outcome = command("generate", "--run", "run", "--output", "out.txt", stdin=content)
    refused(outcome, *words)
    assert not Path("out.txt").exists()


@pytest.mark.parametrize("verb", ["train", "train-lm"])
def test_a_loss_that_is_no_number_ends_in_one_line(
    command: Command, tiny: Path, tmp_path: Path, verb: str
) -> None:
    outcome = command(verb, "--config", tiny, "--train.lr", 1e30, "--run", "run")
    refused(outcome, "loss")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not left_behind(tmp_path)


# ---- no space left -------------------------------------------------------------------------------


@pytest.fixture(params=["64k"])
def full_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system with room for very little; only root can make one."""
    place = tmp_path / "full"
    place.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", place],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("this machine does not let root mount")
    yield place
    subprocess.run(["umount", place], check=True)


# Full at the vocabularies, at the records, at the weights, at the checkpoint.
@pytest.mark.parametrize("full_disk", ["4k", "12k", "64k", "120k"], indirect=True)
def test_a_full_disk_ends_in_one_line(command: Command, tiny: Path, full_disk: Path) -> None:
    outcome = command("train", "--config", tiny, "--train.steps", 1, "--run", full_disk / "run")
    refused(outcome, "No space left", str(full_disk))
    assert not left_behind(full_disk)
    assert not list(full_disk.glob("run/checkpoints/step_*"))
    for weights in full_disk.rglob("*.safetensors"):
        assert read_weights(weights)  # whole


def test_an_output_that_does_not_fit_leaves_nothing(
    command: Command, copy: Path, full_disk: Path
) -> None:
    (full_disk / "filler").write_bytes(b"x" * 60_000)
    lines = b"s1 s2 s3 s4 s5 s1 s2 s3\n" * 600
    outcome = command(
        "generate", "--run", copy, "--beam", 1, "--output", full_disk / "out.txt", stdin=lines
    )
    refused(outcome, "No space left", "out.txt")
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("verb", ["evaluate", "average-checkpoints", "plot-attention", "convert"])
def test_a_write_that_fails_leaves_the_files_as_they_were(
    command: Command, copy: Path, verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if verb == "convert":
        config = copy / "config.yaml"
        config.write_text(config.read_text().replace("kind: topk", "kind: dense"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    arguments = {
        "average-checkpoints": ("--last", 2),
        "convert": ("--output", tmp_path / "sparse"),
    }.get(verb, ())
    refused(command(verb, "--run", copy, *arguments), "No space left", str(tmp_path))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before

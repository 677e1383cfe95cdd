"""What a user can get wrong: one line that names it, exit status 2, nothing half written."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_shared.training import Run, read_weights, save_weights

Command = Callable[..., Any]
Texts = Callable[..., Path]

TEXT = (
    "--data.dataset", "text", "--data.raw", "raw", "--data.prepared", "prepared",
    "--data.segmentation", "words", "--data.vocabulary_size", "40",
)  # fmt: skip


def half_written(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if ".tmp" in path.name or ".old" in path.name]


def test_unknown_verb_and_option_are_named(command: Command) -> None:
    command("translate").refused("translate")
    command("evaluate", "--beams", 3).refused("beams")


def test_unknown_configuration_is_named(command: Command) -> None:
    command("train", "--config", "iwslt99").refused("--config", "iwslt99", "iwslt14_de_en")


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
    command: Command, small_yaml: Path, replaced: str, by: str, word: str
) -> None:
    text = small_yaml.read_text()
    assert replaced in text
    small_yaml.write_text(text.replace(replaced, by, 1))
    command("train", "--config", small_yaml).refused("small.yaml", word)
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
    command: Command, small_yaml: Path, override: tuple[str, str], word: str
) -> None:
    command("train", "--config", small_yaml, *override).refused(word)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "content", [b"model: [\n", b"- 1\n", b"", b"\xff\xfe", b"model: 3\n", b"model:\n"]
)
def test_a_file_that_is_no_configuration_is_named(command: Command, content: bytes) -> None:
    Path("bad.yaml").write_bytes(content)
    command("train", "--config", "bad.yaml").refused("bad.yaml")
    assert [path.name for path in Path().iterdir()] == ["bad.yaml"]


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
    command: Command,
    small_yaml: Path,
    text_files: Texts,
    tmp_path: Path,
    changes: dict[str, bytes],
    words: tuple[str, ...],
) -> None:
    text_files(**changes)
    command("prepare", "--config", small_yaml, *TEXT).refused(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_missing_text_is_named(
    command: Command, small_yaml: Path, text_files: Texts, tmp_path: Path
) -> None:
    command("prepare", "--config", small_yaml, *TEXT).refused("raw/train.de", "no such file")
    text_files()
    (tmp_path / "raw" / "test.en").unlink()
    command("prepare", "--config", small_yaml, *TEXT).refused("raw/test.en", "no such file")
    command("train", "--config", small_yaml, *TEXT).refused("prepared", "no prepared data")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_data_prepared_otherwise_is_refused(
    command: Command, small_yaml: Path, text_files: Texts, tmp_path: Path
) -> None:
    text_files()
    assert command("prepare", "--config", small_yaml, *TEXT).status == 0
    other = [*TEXT[:-1], "41"]
    command("train", "--config", small_yaml, *other).refused("prepared", "vocabulary_size")
    tokens = tmp_path / "prepared" / "train.source.tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    command("train", "--config", small_yaml, *TEXT).refused("train.source.tokens.npy")
    assert not (tmp_path / "runs").exists()


READERS = ("generate", "evaluate", "plot-attention", "convert")


@pytest.mark.parametrize("verb", [*READERS, "average-checkpoints", "evaluate-lm"])
def test_a_missing_run_is_named(command: Command, verb: str) -> None:
    command(verb, "--run", "nowhere", stdin=b"s1\n").refused("nowhere")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("verb", READERS)
def test_truncated_and_foreign_weights_are_named(
    command: Command, run_copy: Path, verb: str, tmp_path: Path
) -> None:
    whole = Run(run_copy).best_weights().read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_weights(tmp_path / "other.safetensors", {"fc.weight": torch.zeros(2, 2)})
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "pickled.pt")
    before = sorted(tmp_path.rglob("*"))
    for name in ("truncated.safetensors", "other.safetensors", "pickled.pt", "missing"):
        outcome = command(verb, "--run", "run", "--weights", name, stdin=b"s1 s2\n")
        outcome.refused(name)
        assert outcome.output == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_truncated_checkpoint_is_named(
    command: Command, small_yaml: Path, run_copy: Path
) -> None:
    newest = sorted((run_copy / "checkpoints").iterdir())[-1]
    part = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:100])
    more = ("--config", small_yaml, "--run", "run", "--train.steps", 30)
    command("train", *more).refused(newest.name)


def test_a_run_of_another_model_is_not_continued(
    command: Command, small_yaml: Path, run_copy: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    outcome = command("train", "--config", small_yaml, "--run", "run", "--model.width", 32)
    outcome.refused("run/config.yaml", "model")
    other = command("train", "--config", small_yaml, "--run", "run", "--data.tiny_symbols", 7)
    other.refused("run", "vocabulary")
    assert {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()} == before


def test_a_run_of_the_other_kind_of_model_is_refused(
    command: Command, small_yaml: Path, run_copy: Path
) -> None:
    command("evaluate-lm", "--run", "run").refused("run/config.yaml", "language_model")
    assert (
        command("train-lm", "--config", small_yaml, "--train.steps", 1, "--run", "lm").status == 0
    )
    command("generate", "--run", "lm", stdin=b"s1\n").refused("lm/config.yaml", "model")
    command("train-lm", "--config", small_yaml, "--train.steps", 1, "--run", "run").refused("run")


def test_a_vocabulary_that_does_not_match_is_named(command: Command, run_copy: Path) -> None:
    path = run_copy / "target.vocabulary"
    path.write_text(path.read_text() + "extra\n")
    for verb in READERS:
        command(verb, "--run", "run", stdin=b"s1\n").refused("target.vocabulary")


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
    command: Command, run_copy: Path, arguments: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    before = sorted(run_copy.parent.rglob("*"))
    outcome = command(*arguments, "--run", "run", stdin=b"s1 s2 s3\n")
    outcome.refused(*words)
    assert sorted(run_copy.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("standard input", "empty")),
        (b"s1\n\xff\n", ("standard input", "line 2", "UTF-8")),
        (b"s1\n" + b"s1 " * 20, ("standard input", "line 2", "21 tokens", "16 positions")),
    ],
)
def test_unusable_standard_input_is_named(
    command: Command, run_copy: Path, content: bytes, words: tuple[str, ...]
) -> None:
    outcome = command("generate", "--run", "run", "--output", "out.txt", stdin=content)
    outcome.refused(*words)
    assert not Path("out.txt").exists()


@pytest.mark.parametrize("verb", ["train", "train-lm"])
def test_a_loss_that_is_no_number_ends_in_one_line(
    command: Command, small_yaml: Path, tmp_path: Path, verb: str
) -> None:
    outcome = command(verb, "--config", small_yaml, "--train.lr", 1e30, "--run", "run")
    outcome.refused("loss")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not half_written(tmp_path)


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
def test_a_full_disk_ends_in_one_line(command: Command, small_yaml: Path, full_disk: Path) -> None:
    outcome = command(
        "train", "--config", small_yaml, "--train.steps", 1, "--run", full_disk / "run"
    )
    outcome.refused("No space left", str(full_disk))
    assert not half_written(full_disk)
    assert not list(full_disk.glob("run/checkpoints/step_*"))
    for weights in full_disk.rglob("*.safetensors"):
        assert read_weights(weights)  # whole


def test_an_output_that_does_not_fit_leaves_nothing(
    command: Command, run_copy: Path, full_disk: Path
) -> None:
    (full_disk / "filler").write_bytes(b"x" * 60_000)
    lines = b"s1 s2 s3 s4 s5 s1 s2 s3\n" * 600
    outcome = command(
        "generate", "--run", run_copy, "--beam", 1, "--output", full_disk / "out.txt", stdin=lines
    )
    outcome.refused("No space left", "out.txt")
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("verb", ["evaluate", "average-checkpoints", "plot-attention", "convert"])
def test_a_write_that_fails_leaves_the_files_as_they_were(
    command: Command, run_copy: Path, verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if verb == "convert":
        config = run_copy / "config.yaml"
        config.write_text(config.read_text().replace("kind: topk", "kind: dense"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    arguments = {
        "average-checkpoints": ("--last", 2),
        "convert": ("--output", tmp_path / "sparse"),
    }.get(verb, ())
    command(verb, "--run", run_copy, *arguments).refused("No space left", str(tmp_path))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before

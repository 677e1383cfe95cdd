"""Distillation: one line for each source line, whatever happens on the way."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import separata_imitation_nat.distill as module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from separata_imitation_nat.data import with_distilled
from separata_imitation_nat.distill import distill, read_distilled
from separata_imitation_nat.generate import load_teacher
from separata_shared.translation import load, translate_lines
from separata_shared.translation.search import with_search


def files(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by its name."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


@pytest.fixture
def copy(distilled: Path, tmp_path: Path) -> Path:
    """A copy of the distilled text that a test may damage."""
    return Path(shutil.copytree(distilled, tmp_path / "distilled"))


@pytest.fixture
def again(teacher: Path) -> Callable[..., Path]:
    """``distill`` as it made the session's text."""
    return lambda output, **changes: distill(
        **{"teacher": teacher, "output": output, "beam": 2, "shard_lines": 40, **changes}
    )


def test_every_source_line_has_its_translation_in_its_place(
    distilled: Path, teacher: Path, small: dict[str, Any]
) -> None:
    corpus = load(small["data"])
    trained = with_search(load_teacher(teacher), beam=2, alpha=None)
    sources = [
        corpus.source_vocabulary.decode(corpus.train.source[n]) for n in range(len(corpus.train))
    ]
    lines = (distilled / "target.txt").read_text().splitlines()
    assert len(lines) == 150
    assert lines == translate_lines(trained, sources)


def test_the_same_teacher_gives_the_same_bytes(
    distilled: Path, again: Callable[..., Path], tmp_path: Path
) -> None:
    again(tmp_path / "other")
    assert files(tmp_path / "other") == files(distilled)


def test_the_manifest_names_everything_that_the_text_depends_on(
    distilled: Path, teacher: Path
) -> None:
    manifest = json.loads((distilled / "manifest.json").read_text())
    settings = manifest["settings"]
    assert manifest["complete"]
    assert settings["lines"] == 150
    assert settings["decode"]["beam"] == 2
    assert settings["teacher"] == module.sha256(load_teacher(teacher).weights)
    assert {"source", "vocabularies", "shard_lines"} <= settings.keys()
    assert len(manifest["files"]) == 1 + 4  # shards of 40 of 150 lines
    for name, checksum in manifest["files"].items():
        assert module.sha256(distilled / name) == checksum


def test_a_finished_text_is_not_made_again(
    copy: Path, again: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(copy)
    monkeypatch.setattr(module, "translate_shard", None)  # calling it would fail
    again(copy)
    assert files(copy) == before


@pytest.mark.parametrize("shard", [0, 3])
def test_a_missing_shard_is_made_again(
    shard: int, copy: Path, distilled: Path, again: Callable[..., Path]
) -> None:
    (copy / f"shards/{shard:05d}.tsv").unlink()
    again(copy)
    assert files(copy) == files(distilled)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_shard_is_found_by_its_checksums_and_made_again(
    data: st.DataObject, distilled: Path, again: Callable[..., Path], tmp_path: Path
) -> None:
    copy = tmp_path / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(distilled, copy)
    path = copy / f"shards/{data.draw(st.integers(0, 3)):05d}.tsv"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["bit", "cut", "line lost", "line twice", "empty"])):
        case "bit":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[place:]
        case "line lost":
            del content[: content.index(b"\n") + 1]
        case "line twice":
            content[:0] = content[: content.index(b"\n") + 1]
        case "empty":
            content.clear()
    path.write_bytes(content)
    redone: list[int] = []
    original = module.translate_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "translate_shard", lambda *a: (redone.append(a[1]), original(*a))[1])
        again(copy)
    assert redone == [int(path.stem)]
    assert files(copy) == files(distilled)


def test_a_damaged_text_is_restored_from_its_shards(
    copy: Path, distilled: Path, again: Callable[..., Path], small: dict[str, Any]
) -> None:
    text = copy / "target.txt"
    text.write_bytes(text.read_bytes().replace(b"t", b"x", 1))
    source = load(small["data"]).train.source
    with pytest.raises(ValueError, match=r"target\.txt: missing or damaged; run distill again"):
        read_distilled(copy, source)
    again(copy)
    assert files(copy) == files(distilled)


def test_a_run_that_stops_between_shards_goes_on(
    distilled: Path,
    again: Callable[..., Path],
    tmp_path: Path,
    small: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, original = tmp_path / "stopped", module.translate_shard

    def stop(plan: Any, shard: int, trained: Any) -> list[str]:
        if shard == 2:
            raise KeyboardInterrupt
        return original(plan, shard, trained)

    with monkeypatch.context() as patch:
        patch.setattr(module, "translate_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            again(output)
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "shards"]
    with pytest.raises(ValueError, match="not complete; run distill again"):
        read_distilled(output, load(small["data"]).train.source)
    again(output)
    assert files(output) == files(distilled)


def test_a_killed_run_resumes_to_the_bytes_of_an_unbroken_one(
    teacher: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.txt"
    source.write_text("s1 s2 s3\ns4 s5\n" * 20)
    options: dict[str, Any] = {"teacher": teacher, "input": source, "beam": 2, "shard_lines": 1}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # A copy of this process: starting up would take longer than the work.
    work = multiprocessing.get_context("fork").Process(
        target=distill, kwargs={**options, "output": killed}, daemon=True
    )
    work.start()
    limit = time.monotonic() + 60
    while len(list(killed.glob("shards/*.tsv"))) < 3:
        assert work.is_alive()
        assert time.monotonic() < limit
        time.sleep(0.005)
    work.kill()
    work.join()
    assert len(list(killed.glob("shards/*.tsv"))) < 40
    assert not (killed / "target.txt").exists()
    distill(**options, output=killed)
    distill(**options, output=whole)
    assert files(killed) == files(whole)


def test_several_workers_share_the_shards(
    distilled: Path, again: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "shared"
    again(output, worker=1, workers=2)
    assert [path.stem for path in sorted(output.glob("shards/*.tsv"))] == ["00001", "00003"]
    assert not (output / "target.txt").exists()
    again(output, worker=0, workers=2)
    assert files(output) == files(distilled)


def test_workers_may_begin_at_the_same_time(
    distilled: Path,
    again: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The other worker writes its manifest after this one has looked for it.
    output, exists, begin = tmp_path / "shared", Path.exists, module.begin

    def exists_not_yet(path: Path) -> bool:
        monkeypatch.setattr(Path, "exists", exists)
        assert path == output / "manifest.json"
        again(output, worker=1, workers=2)
        return False

    def begin_early(*arguments: Any) -> None:
        monkeypatch.setattr(module, "begin", begin)
        monkeypatch.setattr(Path, "exists", exists_not_yet)
        begin(*arguments)

    monkeypatch.setattr(module, "begin", begin_early)
    again(output, worker=0, workers=2)
    assert files(output) == files(distilled)


def test_what_a_killed_process_was_writing_is_no_other_file(
    distilled: Path, again: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "left"
    output.mkdir()
    (output / ".manifest.json.999.tmp").write_text("{")
    again(output)
    (output / ".manifest.json.999.tmp").unlink()
    assert files(output) == files(distilled)


def test_own_text_keeps_its_empty_lines(again: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("s1 s2 s3\n\ns4 s5\n\n")
    lines = again(tmp_path / "out", input=source).read_text().split("\n")
    assert len(lines) == 5
    assert [bool(line) for line in lines] == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam": 3}, r"manifest\.json: was made with another decode"),
        ({"alpha": 0.5}, r"manifest\.json: was made with another decode"),
        ({"shard_lines": 41}, r"manifest\.json: was made with another shard_lines"),
        ({"shard_lines": 0}, "^shard_lines: must be at least 1, got 0"),
        ({"workers": 0}, "^workers: must be at least 1, got 0"),
        ({"worker": 2, "workers": 2}, "^worker: must be from 0 to 1, got 2"),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(
    copy: Path, again: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    before = files(copy)
    with pytest.raises(ValueError, match=message):
        again(copy, **changes)
    assert files(copy) == before


def test_another_source_or_teacher_is_refused(
    copy: Path, again: Callable[..., Path], teacher: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.txt"
    source.write_text("s1 s2 s3\n")
    with pytest.raises(ValueError, match="another source"):
        again(copy, input=source)
    weights = sorted((teacher / "weights").iterdir())
    best = load_teacher(teacher).weights
    other = next(path for path in weights if path != best)
    with pytest.raises(ValueError, match="another teacher"):
        again(copy, weights=other)


def test_a_directory_of_something_else_is_left_alone(
    again: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="mine: holds other files"):
        again(tmp_path / "mine")
    (tmp_path / "mine/manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of format 1"):
        again(tmp_path / "mine")


def test_distilled_targets_replace_those_of_the_training_part_alone(
    distilled: Path, small: dict[str, Any]
) -> None:
    corpus = load(small["data"])
    changed = with_distilled(corpus, distilled, max_length=16)
    lines = (distilled / "target.txt").read_text().split("\n")[:-1]
    kept = [n for n, line in enumerate(lines) if line.strip()]
    assert len(changed.train) == len(kept)
    for place, number in enumerate(kept):
        assert changed.target_vocabulary.decode(changed.train.target[place]) == lines[number]
        assert changed.train.source[place].tolist() == corpus.train.source[number].tolist()
    assert changed.valid is corpus.valid
    assert changed.test is corpus.test


def test_too_long_translations_are_left_out_and_counted(
    distilled: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = load(small["data"])
    whole = with_distilled(corpus, distilled, max_length=16)
    limit = int(whole.train.target.lengths.max()) - 1
    expected = int((whole.train.target.lengths > limit).sum())
    capsys.readouterr()
    shorter = with_distilled(corpus, distilled, max_length=limit)
    assert len(whole.train) - len(shorter.train) == expected
    assert f"{150 - len(shorter.train)} pairs left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no translation of 1 to 0 tokens"):
        with_distilled(corpus, distilled, max_length=1)

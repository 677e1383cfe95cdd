"""The public data sets, each with small files laid out as the originals are."""

import gzip
import hashlib
import http.client
import io
import lzma
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from separata_shared.data import characters
from separata_shared.translation import (
    DataConfig,
    corpora,
    load,
    load_characters,
    preparation,
    prepare,
)

LANGUAGES = {"multi30k": ("en", "de"), "iwslt15_en_vi": ("en", "vi")}


def config(tmp_path: Path, dataset: str, **changes: Any) -> DataConfig:
    source, target = LANGUAGES.get(dataset, ("de", "en"))
    settings: dict[str, Any] = {
        "dataset": dataset,
        "raw": str(tmp_path / "raw"),
        "prepared": str(tmp_path / "prepared"),
        "source_language": source,
        "target_language": target,
        "segmentation": "words",
    }
    return DataConfig(**settings | changes)


def write_parts(folder: Path, names: tuple[str, ...], languages: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for language in languages:
            (folder / f"{name}.{language}").write_text(f"{name} {language} One\nTwo {language}\n")


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("multi30k", ("train", "val", "test_2016_flickr")),
        ("iwslt15_en_vi", ("train", "tst2012", "tst2013")),
        ("iwslt14_de_en", ("train", "valid", "test")),
    ],
)
def test_files_have_the_names_of_the_original(
    tmp_path: Path, dataset: str, names: tuple[str, str, str]
) -> None:
    data = config(tmp_path, dataset)
    write_parts(tmp_path / "raw", names, (data.source_language, data.target_language))
    prepare(data=data)
    corpus = load(data)
    lowered = dataset == "iwslt14_de_en"
    expected = [f"{name} {data.source_language} One" for name in names[1:]]
    found = [corpus.valid.source_lines[0], corpus.test.source_lines[0]]
    assert found == ([line.lower() for line in expected] if lowered else expected)


def test_missing_files_are_fetched_and_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = tmp_path / "host"
    write_parts(host, ("train", "val", "test_2016_flickr"), ("en", "de"))
    for path in list(host.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(preparation, "_MULTI30K", host.as_uri())
    data = config(tmp_path, "multi30k")
    prepare(data=data)
    assert len(load(data).train) == 2
    assert capsys.readouterr().out.count("fetching") == 6
    prepare(data=data)
    assert "fetching" not in capsys.readouterr().out


def test_without_a_network_the_line_names_file_and_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_IWSLT15", (tmp_path / "nowhere").as_uri())
    with pytest.raises(ValueError, match=r"train\.en: missing, and file:.*put the file there"):
        prepare(data=config(tmp_path, "iwslt15_en_vi"))
    assert not list((tmp_path / "raw").glob("*"))
    assert not (tmp_path / "prepared").exists()


def test_a_download_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer(io.BytesIO):
        headers = {"Content-Length": "1000"}  # noqa: RUF012

    monkeypatch.setattr(preparation.urllib.request, "urlopen", lambda *_, **__: Answer(b"half"))
    with pytest.raises(ValueError, match="broke off after 4 of 1000 bytes"):
        prepare(data=config(tmp_path, "enwik8"))
    assert not list((tmp_path / "raw").glob("*"))


def test_broken_transfer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*_: object, **__: object) -> None:
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr(preparation.urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match=r"enwik8\.zip: missing, and .* cannot be fetched"):
        prepare(data=config(tmp_path, "enwik8"))


TRAIN_DE = [
    "<url>http://example.org</url>",
    "<title>Ein Titel hier</title>",
    "<description>TED Talk: Beschreibung</description>",
    "<keywords>talks</keywords>",
    "<talkid>1</talkid>",
    *[f"Satz Nummer {n}" for n in range(45)],
    "zu kurz",
    "",
]
TRAIN_EN = [
    "<url>http://example.org</url>",
    "<title>A title here</title>",
    "<description>TED Talk: description</description>",
    "<keywords>talks</keywords>",
    "<talkid>1</talkid>",
    *[f"Sentence number {n}" for n in range(45)],
    "more than half as long again",
    "empty on the other side",
]


def write_archive(path: Path, *, leave_out: str = "") -> None:
    training = {"de": TRAIN_DE, "en": TRAIN_EN}
    files = {
        f"train.tags.de-en.{language}": "".join(f"{line}\n" for line in lines)
        for language, lines in training.items()
    }
    for name in corpora.IWSLT14_TESTS:
        for language in ("de", "en"):
            files[f"IWSLT14.{name}.de-en.{language}.xml"] = (
                '<doc docid="1">\n<title>skip</title>\n'
                f'<seg id="1"> {name}\u2019s {language} </seg>'
                f'\n<seg id="2">Zwei {language}</seg>\n</doc>\n'
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            if name != leave_out:
                content = text.encode()
                member = tarfile.TarInfo(f"de-en/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_the_archive_is_prepared_by_the_recipe(tmp_path: Path) -> None:
    write_archive(tmp_path / "de-en.tgz")
    text = corpora.iwslt14_archive(tmp_path / "de-en.tgz", lambda line, _: line)
    # Title and description lose their tags and stay, three kinds of lines go, then two pairs: one
    # for its ratio of lengths and one for its empty side. 47 pairs are left.
    clean = ["ein titel hier", "ted talk: beschreibung", *[f"satz nummer {n}" for n in range(45)]]
    assert text.valid.source == (clean[22], clean[45])
    assert text.train.source == tuple(line for n, line in enumerate(clean) if n not in (22, 45))
    assert text.train.target[0] == "a title here"
    # Five sets of two sentences, in the order of the recipe, apostrophes made plain.
    assert len(text.test.source) == len(text.test.target) == 10
    assert text.test.source[:3] == ("ted.dev2010's de", "zwei de", "tedx.dev2012's de")


@pytest.mark.parametrize(
    ("source", "target", "clean"),
    [(1, 1, True), (2, 3, True), (2, 4, False), (175, 175, True), (176, 176, False), (0, 1, False)],
)
def test_clean_pairs(source: int, target: int, clean: bool) -> None:
    words = " ".join(["w"] * source), " ".join(["w"] * target)
    assert corpora._is_clean(*words) is clean
    assert corpora._is_clean(*words[::-1]) is clean


def test_damaged_and_incomplete_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "de-en.tgz"
    write_archive(path, leave_out="train.tags.de-en.en")
    with pytest.raises(ValueError, match=r"de-en\.tgz: has no file train\.tags\.de-en\.en"):
        corpora.iwslt14_archive(path, lambda line, _: line)
    write_archive(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"de-en\.tgz: not a readable archive"):
        corpora.iwslt14_archive(path, lambda line, _: line)


def test_the_other_direction_exchanges_the_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path / "raw" / "de-en.tgz")
    monkeypatch.setattr(corpora, "moses", lambda: lambda line, _: line)
    forward = preparation.read_raw(config(tmp_path, "iwslt14_de_en"))
    backward = preparation.read_raw(
        config(tmp_path, "iwslt14_de_en", source_language="en", target_language="de")
    )
    assert forward.train.source == backward.train.target
    assert forward.test.target == backward.test.source


def test_missing_sacremoses_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path / "raw" / "de-en.tgz")
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    with pytest.raises(ValueError, match=r"pip install .*\[moses\]"):
        prepare(data=config(tmp_path, "iwslt14_de_en"))


WHOLE = bytes(range(97, 123)) * 3 + b"one two three four five" + b"\xff"


@pytest.fixture
def small_enwik8(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Let 102 bytes be the whole of enwik8."""
    monkeypatch.setattr(characters, "ENWIK8_PARTS", (80, 10, 12))
    checksum = hashlib.md5(WHOLE, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(preparation, "_ENWIK8_MD5", checksum)
    assert len(WHOLE) == 102
    return WHOLE


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("enwik8", content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("enwik8", bytes),
        ("enwik8.zip", zipped),
        ("enwik8.gz", gzip.compress),
        ("enwik8.xz", lzma.compress),
    ],
)
def test_the_standard_file_is_cut_in_three(
    tmp_path: Path, small_enwik8: bytes, name: str, pack: Any
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(pack(small_enwik8))
    data = config(tmp_path, "enwik8")
    prepare(data=data)
    text = load_characters(data)
    assert text.decode(text.train) == small_enwik8[:80]
    assert text.decode(text.valid) == small_enwik8[80:90].replace(b" ", b"?")
    # A byte that training never saw has the last number.
    assert text.test[-1] == len(text.alphabet) == text.vocabulary_size - 1
    assert text.vocabulary_size == 26 + 1


def test_given_parts_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name, content in (("train.first", b"abcabc"), ("valid.x", b"ab"), ("test.y", b"cd")):
        (tmp_path / "raw" / f"{name}.xz").write_bytes(lzma.compress(content))
    data = config(tmp_path, "enwik8", train_bytes=3)
    prepare(data=data)
    text = load_characters(data)
    assert text.train.tolist() == [0, 1, 2]
    assert text.test.tolist() == [2, 3]
    with pytest.raises(ValueError, match="was prepared with train_bytes 3"):
        load_characters(config(tmp_path, "enwik8"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("enwik8", WHOLE[:-1], "holds 101 bytes, enwik8 has 102"),
        ("enwik8", WHOLE[:-1] + b"x", "md5 .* is not enwik8's"),
        ("enwik8.zip", b"no archive", r"enwik8\.zip: not the archive"),
        ("enwik8.gz", b"no archive", r"enwik8\.gz: cannot be decompressed"),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, small_enwik8: bytes, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        prepare(data=config(tmp_path, "enwik8"))
    assert not (tmp_path / "prepared").exists()


def test_an_empty_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "raw" / f"{name}.bin").write_bytes(b"" if name == "valid" else b"ab")
    with pytest.raises(ValueError, match=r"valid\.bin: is empty"):
        prepare(data=config(tmp_path, "enwik8"))

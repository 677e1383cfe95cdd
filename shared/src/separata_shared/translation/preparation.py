"""The command ``prepare``: from raw files to the directory that ``load`` reads."""

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from separata_shared.data.characters import enwik8, number_characters
from separata_shared.data.prepared import new_directory, seal
from separata_shared.files import atomic_write, find_file, sha256, write_text
from separata_shared.translation import corpora
from separata_shared.translation.config import CHARACTERS, DataConfig
from separata_shared.translation.data import (
    SPLITS,
    Corpus,
    learn_vocabularies,
    settings,
    tokenise,
)

_MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
_IWSLT14 = "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
_IWSLT15 = "https://nlp.stanford.edu/projects/nmt/data/iwslt15.en-vi"
_ENWIK8 = "http://mattmahoney.net/dc/enwik8.zip"
_ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
_MULTI30K_NAMES = ("train", "val", "test_2016_flickr")
_IWSLT15_NAMES = ("train", "tst2012", "tst2013")


def prepare(*, data: DataConfig) -> None:
    """Turn raw data into tokens on disk and print the checksums of what was read and written.

    Missing files of a public data set are downloaded first. The directory ``data.prepared`` is
    written whole or not at all; prepared data that stood there is replaced.

    Args:
        data: Which corpus, where its raw files are and where the result goes.

    Raises:
        ValueError: A file is missing, empty, damaged or not valid UTF-8, the two sides differ in
            their number of lines, a validation or test sentence is too long, or the vocabulary
            cannot be learned.
    """
    if data.dataset in ("tiny", "tiny_characters"):
        print(f"{data.dataset}: made when it is loaded, nothing to prepare")
        return
    directory = Path(data.prepared)
    with new_directory(directory) as fresh:
        if data.dataset in CHARACTERS:
            files, details = _prepare_characters(data, fresh)
        else:
            files, details = _prepare_pairs(data, fresh)
        raw = {f"{path.parent.name}/{path.name}": sha256(path) for path in files}
        manifest = seal(fresh, settings(data), {**details, "raw": raw})
    for name, checksum in raw.items():
        print(f"{checksum}  {name}  (read)")
    for name, entry in manifest["files"].items():
        print(f"{entry['sha256']}  {directory / name}")
    for name, counts in details["counts"].items():
        print(f"{name}: " + ", ".join(f"{value:,} {key}" for key, value in counts.items()))


def read_raw(data: DataConfig) -> corpora.Text:
    """Lines of a parallel data set; missing files of a public one are downloaded.

    Raises:
        ValueError: A file is missing or cannot be read, or numbers of lines differ.
    """
    raw, languages = Path(data.raw), (data.source_language, data.target_language)
    match data.dataset:
        case "sample":
            return corpora.sample()
        case "text" if raw.is_file():
            return corpora.one_table(raw)
        case "multi30k":
            for name in _each_file(_MULTI30K_NAMES, languages):
                _download(f"{_MULTI30K}/{name}.gz", raw, name)
            return corpora.parallel_files(raw, *languages, names=_MULTI30K_NAMES)
        case "iwslt15_en_vi":
            for name in _each_file(_IWSLT15_NAMES, languages):
                _download(f"{_IWSLT15}/{name}", raw, name)
            return corpora.parallel_files(raw, *languages, names=_IWSLT15_NAMES)
        case "iwslt14_de_en" if not find_file(raw, "train.de"):
            _download(_IWSLT14, raw, "de-en.tgz")
            text = corpora.iwslt14_archive(raw / "de-en.tgz", corpora.moses())
            # The archive is read as German to English; the direction is the configuration's.
            return text if languages == ("de", "en") else text.reversed()
        case _:
            return corpora.parallel_files(raw, *languages)


def _each_file(names: tuple[str, ...], languages: tuple[str, str]) -> list[str]:
    return [f"{name}.{language}" for name in names for language in languages]


def _prepare_pairs(data: DataConfig, directory: Path) -> tuple[tuple[Path, ...], dict[str, Any]]:
    text = read_raw(data)
    if data.lowercased:
        text = text.map(str.lower)
    vocabularies = learn_vocabularies(text, data)
    corpus = tokenise(text, data, vocabularies)
    for side, vocabulary in zip(("source", "target"), vocabularies, strict=True):
        vocabulary.save(directory / f"{side}.vocabulary")
    _write_corpus(corpus, directory)
    counts = {
        name: {
            "pairs": len(split),
            "left out": len(text.splits[name].source) - len(split),
            "source tokens": len(split.source.tokens),
            "target tokens": len(split.target.tokens),
        }
        for name, split in zip(SPLITS, (corpus.train, corpus.valid, corpus.test), strict=True)
    }
    fingerprints = {
        "source": corpus.source_vocabulary.fingerprint,
        "target": corpus.target_vocabulary.fingerprint,
    }
    return text.files, {"counts": counts, "vocabularies": fingerprints}


def _write_corpus(corpus: Corpus, directory: Path) -> None:
    for name, split in zip(SPLITS, (corpus.train, corpus.valid, corpus.test), strict=True):
        sides = {
            "source": (split.source, split.source_lines),
            "target": (split.target, split.target_lines),
        }
        for side, (sequences, lines) in sides.items():
            np.save(directory / f"{name}.{side}.tokens.npy", sequences.tokens)
            np.save(directory / f"{name}.{side}.offsets.npy", sequences.offsets)
            if name != "train":
                write_text(directory / f"{name}.{side}.txt", "".join(f"{n}\n" for n in lines))


def _prepare_characters(
    data: DataConfig, directory: Path
) -> tuple[tuple[Path, ...], dict[str, Any]]:
    raw = Path(data.raw)
    if not any(raw.glob("train.*")) and not find_file(raw, "enwik8"):
        _download(_ENWIK8, raw, "enwik8.zip")
    (train, valid, test), files = enwik8(raw)
    if len(files) == 1:
        _check_enwik8(files[0], train + valid + test)
    characters = number_characters(train[: data.train_bytes or None], valid, test)
    parts = dict(zip(SPLITS, (characters.train, characters.valid, characters.test), strict=True))
    for name, symbols in parts.items():
        np.save(directory / f"{name}.symbols.npy", symbols)
    counts = {
        name: {
            "characters": len(symbols),
            "unseen in training": int((symbols == len(characters.alphabet)).sum()),
        }
        for name, symbols in parts.items()
    }
    return files, {"counts": counts, "alphabet": list(characters.alphabet)}


def _check_enwik8(path: Path, whole: bytes) -> None:
    found = hashlib.md5(whole, usedforsecurity=False).hexdigest()
    if found != _ENWIK8_MD5:
        raise ValueError(f"{path}: md5 {found} is not enwik8's {_ENWIK8_MD5}")


def _download(url: str, raw: Path, name: str) -> None:
    """Fetch a file into ``raw`` unless ``raw`` has it, plain or compressed.

    Raises:
        ValueError: It cannot be fetched; the message says where to put it.
    """
    if find_file(raw, name):
        return
    path = raw / url.rsplit("/", 1)[-1]
    print(f"fetching {url}")
    try:
        with (
            urllib.request.urlopen(url, timeout=60) as answer,
            atomic_write(path) as temporary,
            temporary.open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)
            announced = answer.headers.get("Content-Length")
            if announced and file.tell() != int(announced):
                raise ConnectionError(f"broke off after {file.tell()} of {announced} bytes")
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
    ) as error:
        raise ValueError(
            f"{path}: missing, and {url} cannot be fetched ({error}); put the file there"
        ) from None

"""Compiling C++ on first use."""

import ctypes
from pathlib import Path

import pytest
import torch
from separata_shared import native

SUM = 'extern "C" long sum(const long* x, long n) { long s = 0; while (n) s += x[--n]; return s; }'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "toy"
    folder.mkdir()
    file = folder / "native.cpp"
    file.write_text(SUM)
    return file


def test_library_is_compiled_once(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    numbers = torch.arange(5)
    for _ in range(2):
        native.load.cache_clear()
        library = native.load(source)
        assert library.sum(ctypes.c_void_p(numbers.data_ptr()), ctypes.c_long(5)) == 10
    assert capfd.readouterr().err.count("compiling toy/native.cpp") == 1


def test_name_follows_source_and_headers(source: Path) -> None:
    first = native.library_path(source)
    (source.parent / "native.h").write_text("// new")
    second = native.library_path(source)
    source.write_text(SUM + "\n")
    assert len({first, second, native.library_path(source)}) == 3


def test_broken_source_says_what_is_wrong_and_leaves_nothing(source: Path) -> None:
    source.write_text("int broken(")
    with pytest.raises(native.UnavailableError, match="error: "):
        native.load(source)
    assert not list(native.library_path(source).parent.iterdir())


def test_damaged_library_is_an_error_with_its_name(source: Path) -> None:
    library = native.library_path(source)
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    with pytest.raises(native.UnavailableError, match=library.name):
        native.load(source)

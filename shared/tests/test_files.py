import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from separata_shared.files import (
    atomic_write,
    read_json,
    read_lines,
    read_text,
    sha256,
    write_json,
    write_text,
)


def test_failed_write_keeps_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    write_text(path, "old")

    def fail_half_way() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory") as caught:
        write_text(tmp_path, "x")
    assert caught.value.filename == str(tmp_path)
    assert not list(tmp_path.parent.glob(".*.tmp"))


@pytest.mark.parametrize("place", ["fsync", "write"])
def test_full_disk_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_text(path, "new")
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@given(st.lists(st.text(st.characters(exclude_characters="\n\r\ufeff", codec="utf-8")), min_size=2))
def test_lines_are_separated_by_line_feeds_alone(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    # U+2028 and its like belong to a sentence: parallel files are aligned by line feeds.
    path = tmp_path_factory.mktemp("lines") / "file"
    write_text(path, "".join(line + "\n" for line in lines))
    assert read_lines(path) == lines


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert read_lines(path) == ["one", "\ufefftwo"]  # only at the beginning is it a mark


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="file: no such file"):
        read_text(path)
    with pytest.raises(ValueError, match="is a directory"):
        read_text(tmp_path)
    path.write_bytes(b"fine\n\xff\n")
    with pytest.raises(ValueError, match="file: line 2 is not valid UTF-8"):
        read_lines(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="file: is empty"):
        read_lines(path)
    path.write_bytes(b"{")
    with pytest.raises(ValueError, match="file: not valid JSON"):
        read_json(path)


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"z": [1, 2.5, None], "ä": "ö"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert list(read_json(tmp_path / "a.json")) == ["z", "ä"]


def test_sha256_is_the_published_one(tmp_path: Path) -> None:
    # FIPS 180-2, appendix B.1.
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == expected

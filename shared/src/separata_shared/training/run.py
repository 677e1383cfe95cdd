"""A run directory: everything needed to repeat, resume, judge and cite one training run.

```
config.yaml        resolved configuration; ``--config runs/x/config.yaml`` repeats the run
environment.json   versions, hardware, command
metrics.jsonl      one JSON object a line, in the order of the steps
best.json          step and value of the best evaluation
checkpoints/       step_0000100/: all that resuming needs
weights/           step_0000100.safetensors: the model alone
scores.json        written by the verb ``evaluate``
```
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from separata_shared.files import read_json, read_lines, read_text, write_json, write_text


class Run:
    """Paths and records of one run directory.

    Args:
        path: The directory; made when something is written.
        config: What the run is given, dataclasses or plain values by the name of their group;
            written by ``begin``.
    """

    def __init__(self, path: Path | str, config: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.groups = config
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights"
        self.best = self.path / "best.json"
        self.scores = self.path / "scores.json"

    def begin(self, *, write: bool) -> None:
        """Check that the directory may be continued; record configuration and environment.

        Args:
            write: Whether this process writes; with several, only the first one does.

        Raises:
            ValueError: The directory holds a run whose groups, ``train`` apart, are different.
        """
        from separata_shared.cli import to_yaml

        text = None if self.groups is None else to_yaml(self.groups)
        if text is not None and self.config.exists() and self.checkpoints.exists():
            self._refuse_other(text)
        if write:
            write_json(self.environment, environment())
            if text is not None:
                write_text(self.config, text)

    def _refuse_other(self, text: str) -> None:
        old, new = _groups(read_text(self.config)), _groups(text)
        for name in sorted((old.keys() | new.keys()) - {"train"}):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{self.config}: {name} is not what this command asks for; "
                    "choose another run directory or delete this one"
                )

    def alone(self, *, write: bool) -> AbstractContextManager[object]:
        """Keep the directory to this process, if it is the one that writes, until a block ends.

        Raises:
            ValueError: Another process trains in the directory.
        """
        try:
            return FileLock(self.path / ".lock", timeout=0).acquire() if write else nullcontext()
        except Timeout:
            raise ValueError(f"{self.path}: another process is training in this run") from None

    def record(self, **values: float | int | str | None) -> None:
        """Append one line to ``metrics.jsonl``."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the records after ``step``: a resumed run writes them again."""
        if self.metrics.exists() and self.metrics.stat().st_size:
            kept = [line for line in read_lines(self.metrics) if _step(line) <= step]
            write_text(self.metrics, "".join(line + "\n" for line in kept))

    def records(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``.

        Raises:
            ValueError: The file is missing, or a crash cut a line short; the message names it.
        """
        try:
            return [json.loads(line) for line in read_lines(self.metrics)]
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.metrics}: a line is not JSON ({error})") from None

    def weight_files(self) -> list[Path]:
        """The weight files, oldest first."""
        return sorted(self.weights.glob("step_[0-9]*.safetensors"), key=step_of)

    def best_weights(self) -> Path:
        """Weights of the best evaluation; the newest ones when there was no evaluation.

        Raises:
            ValueError: The directory has no weights, or its record of the best step is damaged.
        """
        if self.best.exists():
            best = read_json(self.best)
            if not isinstance(best, dict) or not isinstance(best.get("step"), int):
                raise ValueError(f"{self.best}: names no step; delete it to use the newest weights")
            path = self.weights / f"{step_name(best['step'])}.safetensors"
            if path.exists():
                return path
        files = self.weight_files()
        if not files:
            raise ValueError(f"{self.weights}: no weights; train first")
        return files[-1]

    def prune(self, keep: int, protected: int) -> None:
        """Delete all but the newest ``keep`` checkpoints and weights, and those of one step.

        Args:
            keep: How many stay.
            protected: The step whose weights stay whatever their age.
        """
        for folder in sorted(self.checkpoints.glob("step_[0-9]*"), key=step_of)[:-keep]:
            shutil.rmtree(folder)
        for file in self.weight_files()[:-keep]:
            if step_of(file) != protected:
                file.unlink()


def step_name(step: int) -> str:
    """Name of a step's files, such as ``step_0000100``."""
    return f"step_{step:07d}"


def step_of(path: Path) -> int:
    """Step of a file or folder named by ``step_name``."""
    return int(path.name.removeprefix("step_").split(".")[0])


# Reading them takes a while, and a process may begin many runs.
_versions = cache(lambda: dict(sorted((d.metadata["Name"], d.version) for d in distributions())))


def environment() -> dict[str, Any]:
    """Versions, commit, hardware, threads and command of this process."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "cuda": torch.version.cuda,
        "versions": _versions(),
    }


def processor() -> str:
    """Name of the CPU."""
    try:
        found = re.search("model name.*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    # The commit of the source tree this code runs from; none for an installed wheel.
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _groups(text: str) -> dict[str, str]:
    # The texts are our own: a group begins at each line that is not indented.
    blocks = re.split(r"^(?=[^\s#-])", text, flags=re.MULTILINE)
    return {block.split(":", 1)[0]: block for block in blocks if block.strip()}


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut short by a crash

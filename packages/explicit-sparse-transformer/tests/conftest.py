import io
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from separata_explicit_sparse_transformer.__main__ import PACKAGE, VERBS
from separata_explicit_sparse_transformer.config import AttentionConfig, DecodeConfig, ModelConfig
from separata_explicit_sparse_transformer.data import DataConfig
from separata_explicit_sparse_transformer.train import train
from separata_shared.cli import main, to_yaml
from separata_shared.testing.parity import goldens_option, pytest_generate_tests
from separata_shared.training import TrainConfig

__all__ = ["pytest_addoption", "pytest_generate_tests"]

pytest_addoption = goldens_option(Path(__file__).parent / "goldens")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread, and the order of additions is then fixed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """Settings of ``train`` for a small sparse model of made sentences; seconds suffice."""
    return {
        "model": ModelConfig(
            width=16,
            num_heads=2,
            hidden_width=24,
            encoder_layers=2,
            decoder_layers=2,
            dropout=0.1,
            max_length=16,
            attention=AttentionConfig(top_k=3),
        ),
        "data": DataConfig(
            tiny_pairs=150, tiny_symbols=6, tiny_length=9, max_length=16, max_tokens=160
        ),
        "train": TrainConfig(
            steps=24, lr=5e-3, save_every=8, evaluate_every=8, log_every=8, device="cpu"
        ),
        "decode": DecodeConfig(beam=3, max_length_constant=4),
    }


@pytest.fixture(scope="session")
def trained_run(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a small sparse model; tests may read it but write elsewhere."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    train(**small, run=run)
    return run


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may change: ``run`` in its directory."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    output: str
    errors: list[str]
    """Lines on stderr, without progress bars."""

    def refused(self, *words: str) -> None:
        """Check for exit status 2 and a single line that names what is at fault."""
        error = f"{PACKAGE.replace('_', '-')}: error: "
        assert self.status == 2, self
        assert self.errors[-1].startswith(error), self
        assert sum(line.startswith(error) for line in self.errors) == 1, self
        assert not any("Traceback" in line for line in self.errors), self
        for word in words:
            assert word in self.errors[-1]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the program with arguments, in this process and in the test's own directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(VERBS, package=PACKAGE, arguments=[str(argument) for argument in arguments])
        printed = capsys.readouterr()
        lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.strip()]
        return Outcome(
            int(left.value.code or 0), printed.out, [line for line in lines if "it/s" not in line]
        )

    return run


@pytest.fixture
def small_yaml(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file with the settings of ``small``, and a small language model."""
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    language_model = (
        "language_model: {width: 8, hidden_width: 8, num_heads: 2, num_layers: 1, dropout: 0.0, "
        "max_span: 16, ramp: 4, initial_span: 0.2, top_k: 3, streams: 4, block: 16}\n"
    )
    path.write_text(to_yaml(small) + "label_smoothing: 0.1\n" + language_model)
    return path


@pytest.fixture
def text_files(tmp_path: Path) -> Callable[..., Path]:
    """Write a small parallel text into ``raw``."""
    return lambda **changes: write_text_files(tmp_path / "raw", **changes)


def write_text_files(raw: Path, **changes: bytes) -> Path:
    """Files of a parallel text; ``train_de=b"..."`` replaces one, ``b""`` empties it."""
    raw.mkdir()
    for part, count in (("train", 40), ("valid", 4), ("test", 4)):
        for language, words in (("de", "ein Hund läuft"), ("en", "a dog runs")):
            text = "".join(f"{words} {n % 5}\n" for n in range(count)).encode()
            (raw / f"{part}.{language}").write_bytes(changes.get(f"{part}_{language}", text))
    return raw

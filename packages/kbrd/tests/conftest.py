import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from separata_kbrd.__main__ import PACKAGE, VERBS
from separata_kbrd.config import DataConfig, DialogConfig, RecommenderConfig
from separata_kbrd.system import System, load_system
from separata_kbrd.train import train
from separata_shared.cli import main
from separata_shared.testing.parity import goldens_option, pytest_generate_tests
from separata_shared.training import TrainConfig

__all__ = ["pytest_addoption", "pytest_generate_tests"]

_goldens = goldens_option(Path(__file__).parent / "goldens")


def pytest_addoption(parser: pytest.Parser) -> None:
    _goldens(parser)
    parser.addoption(
        "--real-graph",
        type=Path,
        default=None,
        help="folder with the subkg_triples.npz of KBRD's graph, for the checks that need it",
    )


@pytest.fixture
def real_graph(request: pytest.FixtureRequest) -> Path | None:
    """Folder of KBRD's graph; it is real data and not part of this repository."""
    folder: Path | None = request.config.getoption("--real-graph")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread, and the order of additions is then fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    output: str
    errors: str

    def refused(self, *words: str) -> None:
        """Check for exit status 2 and a last line that names what is at fault."""
        assert self.status == 2, self
        assert "Traceback" not in self.errors
        last = self.errors.strip().splitlines()[-1]
        assert last.startswith("separata-kbrd: error: "), self
        assert [word for word in words if word not in last] == [], last


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the program with arguments, in this process and in the test's own directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: str = "") -> Outcome:
        stream = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(VERBS, package=PACKAGE, arguments=[str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Outcome(int(left.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def talking_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a small system, recommender and dialog model, that has learned a bit."""
    run = tmp_path_factory.mktemp("runs") / "talking"
    settings = {"log_every": 1000, "deterministic": True}
    train(
        data=DataConfig(threshold=10, tiny_dialogs=64, tiny_items=24),
        recommender=RecommenderConfig(width=16, num_bases=2, batch_pairs=64),
        dialog=DialogConfig(
            width=32,
            hidden_width=32,
            encoder_layers=1,
            decoder_layers=1,
            bias_width=16,
            dropout=0.0,
            activation_dropout=0.0,
            max_length=200,
            batch_pairs=32,
            max_reply=24,
        ),
        train=TrainConfig(steps=40, lr=0.02, **settings),
        train_dialog=TrainConfig(steps=80, lr=0.01, clip_norm=1.0, **settings),
        run=run,
    )
    return run


@pytest.fixture(scope="session")
def system(talking_run: Path) -> System:
    """That system, loaded."""
    return load_system(talking_run)

"""The toy model, and a way to run it in processes of its own."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TOY = Path(__file__).with_name("toy.py")
Launch = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    # The order of additions depends on the number of threads; those of ``launch`` have one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy", TOY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def launch() -> Launch:
    """Start ``toy.py`` with arguments in some processes that know each other as under torchrun."""

    def start(*arguments: str, processes: int = 1) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            subprocess.Popen(
                [sys.executable, str(TOY), *arguments],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]

    return start


@pytest.fixture
def run_jobs(launch: Launch, tmp_path: Path) -> Callable[..., None]:
    """Run several settings of the toy in one group of processes."""

    def run(settings: list[dict[str, Any]], *, processes: int) -> None:
        file = tmp_path / "jobs.json"
        file.write_text(json.dumps([{**each, "run": str(each["run"])} for each in settings]))
        started = launch("jobs", "--file", str(file), processes=processes)
        ended = [process.communicate(timeout=300) for process in started]
        for process, (_, messages) in zip(started, ended, strict=True):
            assert process.returncode == 0, messages

    return run

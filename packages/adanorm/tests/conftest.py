from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from separata_shared.testing.parity import goldens_option, pytest_generate_tests

__all__ = ["pytest_addoption", "pytest_generate_tests"]

pytest_addoption = goldens_option(Path(__file__).parent / "goldens")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread, and the order of additions is then fixed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

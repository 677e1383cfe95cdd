from pathlib import Path

from separata_shared.testing.parity import goldens_option, pytest_generate_tests

__all__ = ["pytest_addoption", "pytest_generate_tests"]

pytest_addoption = goldens_option(Path(__file__).parent / "goldens")

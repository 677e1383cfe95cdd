from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        default=Path(__file__).parent / "goldens",
        help="folder of golden files that test_parity.py compares with",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--goldens")
        files = sorted(path for path in folder.glob("*.*") if path.suffix in (".npz", ".json"))
        # An empty folder must not pass: the missing file fails when it is opened.
        metafunc.parametrize(
            "golden_path", files or [folder / "no-golden-files"], ids=lambda path: path.name
        )

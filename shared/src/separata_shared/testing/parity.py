"""Golden files: arrays printed by the authors' code, compared with named tolerances.

In a package's ``tests/conftest.py``::

    from separata_shared.testing.parity import goldens_option, pytest_generate_tests

    pytest_addoption = goldens_option(Path(__file__).parent / "goldens")

A test with an argument ``golden_path`` then runs once for every file of the folder.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class Tolerance:
    """How far apart two arrays may be, and why: ``Tolerance("forward", 1e-5)``."""

    name: str
    absolute: float


@dataclass(frozen=True)
class Golden:
    """One golden file."""

    path: Path
    config: dict[str, Any]
    arrays: dict[str, Tensor]


def prefixed(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names begin with ``prefix``, named without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def load_golden(path: Path) -> Golden:
    """Read an ``.npz`` with its ``config``, or a ``.json`` as configuration without arrays.

    The configuration of an ``.npz`` is one JSON string, named ``config`` or ``config_json``.
    Nothing in the file is executed.

    Raises:
        ValueError: The file is missing, damaged, or has no ``config``; the message names it.
    """
    try:
        if path.suffix == ".json":
            return Golden(path, json.loads(path.read_text(encoding="utf-8")), {})
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        name = "config" if "config" in arrays else "config_json"
        config = json.loads(str(arrays.pop(name)))
    except KeyError:
        raise ValueError(f"{path}: has no array named config") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable golden file ({error})") from None
    return Golden(path, config, {name: torch.from_numpy(array) for name, array in arrays.items()})


def assert_close(actual: Tensor, expected: Tensor, tolerance: Tolerance, name: str) -> None:
    """Fail with the array's name and its worst deviation unless both agree.

    Infinite entries must be equal; NaN agrees with nothing.

    Raises:
        AssertionError: Shapes differ, or an entry deviates by more than the tolerance.
    """
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    )
    found, wanted = actual.detach().double(), expected.double()
    deviation = (found - wanted).abs().masked_fill(found == wanted, 0.0)
    far = ~(deviation <= tolerance.absolute)
    if far.any():
        worst = int(deviation.nan_to_num(nan=torch.inf).argmax())
        place = tuple(int(index) for index in np.unravel_index(worst, deviation.shape))
        raise AssertionError(
            f"{name}: {int(far.sum())} of {far.numel()} entries are off; worst deviation "
            f"{deviation.flatten()[worst]:.3g} at {place} ({found.flatten()[worst]:.8g} instead "
            f"of {wanted.flatten()[worst]:.8g}), {tolerance.name} tolerance "
            f"{tolerance.absolute:g}"
        )


def assert_same_support(actual: Tensor, expected: Tensor, name: str) -> None:
    """Fail unless the same entries are positive.

    Raises:
        AssertionError: Shapes differ, or an entry is positive on one side only.
    """
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    )
    different = (actual > 0) != (expected > 0)
    if different.any():
        place = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: another support, {int(different.sum())} entries differ, first at {place} "
            f"({float(actual[place]):.3g} instead of {float(expected[place]):.3g})"
        )


def goldens_option(default: Path) -> Callable[["pytest.Parser"], None]:
    """``pytest_addoption`` for ``--goldens DIR``.

    Args:
        default: Folder that is used without the option.
    """

    def pytest_addoption(parser: "pytest.Parser") -> None:
        parser.addoption(
            "--goldens",
            type=Path,
            default=default,
            help="folder of golden files that the parity tests compare with",
        )

    return pytest_addoption


def pytest_generate_tests(metafunc: "pytest.Metafunc") -> None:
    """Run every test that has an argument ``golden_path`` once for each golden file."""
    if "golden_path" in metafunc.fixturenames:
        folder: Path = metafunc.config.getoption("--goldens")
        files = sorted(path for path in folder.glob("*") if path.suffix in (".npz", ".json"))
        # An empty folder must not pass: the missing file fails when it is opened.
        metafunc.parametrize(
            "golden_path", files or [folder / "no-golden-files"], ids=lambda path: path.name
        )

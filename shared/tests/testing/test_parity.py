import json
from pathlib import Path

import numpy as np
import pytest
import torch
from separata_shared.testing.parity import (
    Tolerance,
    assert_close,
    assert_same_support,
    load_golden,
    prefixed,
)

pytest_plugins = ["pytester"]

FORWARD = Tolerance("forward", 1e-5)


def write(path: Path, **arrays: object) -> Path:
    np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
    return path


def test_a_golden_file_gives_configuration_and_arrays(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", config=json.dumps({"top_k": 3}), param_w=[1.0, 2.0], out=[3])
    golden = load_golden(path)
    assert golden.config == {"top_k": 3}
    assert set(golden.arrays) == {"param_w", "out"}
    assert prefixed(golden.arrays, "param_")["w"].tolist() == [1.0, 2.0]


def test_the_configuration_may_be_called_config_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", config_json=json.dumps({"beam": 4}), out=[3])
    golden = load_golden(path)
    assert golden.config == {"beam": 4}
    assert set(golden.arrays) == {"out"}


def test_a_json_golden_is_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"bleu": 41.5}')
    golden = load_golden(tmp_path / "a.json")
    assert (golden.config, golden.arrays) == ({"bleu": 41.5}, {})


def test_unreadable_goldens_are_named(tmp_path: Path) -> None:
    write(tmp_path / "whole.npz", config="{}", out=np.zeros(1000))
    write(tmp_path / "bare.npz", out=[1])
    write(tmp_path / "text.npz", config="no json")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:500])
    for name in ("bare", "text", "cut", "none"):
        with pytest.raises(ValueError, match=rf"{name}\.npz"):
            load_golden(tmp_path / f"{name}.npz")


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", config="{}", evil=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_golden(tmp_path / "a.npz")


def test_the_worst_deviation_is_named() -> None:
    expected = torch.zeros(2, 3)
    actual = expected.clone()
    actual[0, 1], actual[1, 2] = 2e-5, -3e-5
    with pytest.raises(
        AssertionError,
        match=r"out: 2 of 6 entries are off; worst deviation 3e-05 at \(1, 2\).*forward",
    ):
        assert_close(actual, expected, FORWARD, "out")
    assert_close(actual, expected, Tolerance("loose", 1e-4), "out")


def test_infinities_must_be_equal_and_nan_never_agrees() -> None:
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert_close(infinite, infinite, FORWARD, "scores")
    for wrong in (-infinite, torch.zeros(2), torch.full((2,), torch.nan)):
        with pytest.raises(AssertionError, match="scores"):
            assert_close(wrong, infinite, FORWARD, "scores")
    with pytest.raises(AssertionError, match="scores"):
        assert_close(torch.tensor([torch.nan]), torch.tensor([torch.nan]), FORWARD, "scores")


def test_shapes_are_not_broadcast() -> None:
    for check in (lambda a, b: assert_close(a, b, FORWARD, "out"), _support):
        with pytest.raises(AssertionError, match=r"out: shape \(1,\) instead of \(2,\)"):
            check(torch.zeros(1), torch.zeros(2))


def _support(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_same_support(actual, expected, "out")


def test_supports_are_compared_by_sign_alone() -> None:
    expected = torch.tensor([0.5, 0.0, 0.5])
    _support(torch.tensor([0.9, 0.0, 1e-9]), expected)
    with pytest.raises(AssertionError, match=r"2 entries differ, first at \(1,\)"):
        _support(torch.tensor([1.0, 1e-9, 0.0]), expected)


CONFTEST = """
from pathlib import Path
from separata_shared.testing.parity import goldens_option, pytest_generate_tests

pytest_addoption = goldens_option(Path(__file__).parent / "goldens")
"""


def test_each_golden_file_of_the_folder_is_one_test(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("def test_golden(golden_path): golden_path.read_bytes()")
    for name in ("goldens/a.npz", "goldens/b.json", "goldens/README.md", "other/c.npz"):
        (pytester.path / name).parent.mkdir(exist_ok=True)
        (pytester.path / name).touch()
    pytester.runpytest("-p", "no:hypothesispytest").assert_outcomes(passed=2)
    pytester.runpytest("-p", "no:hypothesispytest", "--goldens", "other").assert_outcomes(passed=1)


def test_an_empty_folder_fails(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("def test_golden(golden_path): golden_path.read_bytes()")
    pytester.runpytest("-p", "no:hypothesispytest").assert_outcomes(failed=1)

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_shared import translation
from separata_shared.nn import Transformer
from separata_shared.training import Run, read_weights, save_weights
from separata_shared.training.average import average_checkpoints
from separata_shared.translation import TransformerConfig, build_transformer

load_run = partial(
    translation.load_run, TransformerConfig, partial(build_transformer, kind=Transformer)
)


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"last": 1}, [24]),
        ({"last": 2}, [16, 24]),
        ({"last": 3}, [8, 16, 24]),
        ({"last": 2, "upper": 16}, [8, 16]),
        ({"last": 2, "upper": 23}, [8, 16]),
        ({"last": 1, "upper": 8}, [8]),
    ],
)
def test_average_is_the_mean_of_the_newest_files(
    run: Path, options: dict[str, Any], steps: list[int]
) -> None:
    path = average_checkpoints(run=run, **options)
    assert path == run / "weights" / "average.safetensors"
    files = [read_weights(run / "weights" / f"step_{step:07d}.safetensors") for step in steps]
    averaged = read_weights(path)
    assert averaged.keys() == files[0].keys()
    for name, tensor in averaged.items():
        expected = torch.stack([file[name].double() for file in files]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_an_average_is_no_training_step(run: Path, tmp_path: Path) -> None:
    newest = Run(run).weight_files()
    average_checkpoints(run=run, last=2)
    assert Run(run).weight_files() == newest
    again = average_checkpoints(run=run, last=3, output=tmp_path / "deep" / "mean.safetensors")
    assert again == tmp_path / "deep" / "mean.safetensors"
    assert read_weights(again)


def test_averaged_weights_can_be_evaluated(run: Path) -> None:
    path = average_checkpoints(run=run, last=3)
    assert translation.evaluate(load_run, run=run, weights=path)["weights"] == "average.safetensors"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0}, "^last: must be at least 1, got 0"),
        ({"last": 4}, "run: has 3 weight files, 4 are needed"),
        ({"last": 2, "upper": 15}, "run: has 1 weight files up to 15, 2 are needed"),
    ],
)
def test_too_few_files_are_refused(run: Path, options: dict[str, Any], message: str) -> None:
    before = set(run.rglob("*"))
    with pytest.raises(ValueError, match=message):
        average_checkpoints(run=run, **options)
    assert set(run.rglob("*")) == before


def test_a_damaged_file_and_one_of_another_model_are_named(run: Path) -> None:
    _, second, third = Run(run).weight_files()
    save_weights(third, {"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=f"{third.name}: .* does not match .*{second.name}"):
        average_checkpoints(run=run, last=2)
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{second.name}: not a readable safetensors file"):
        average_checkpoints(run=run, last=2)
    assert not (run / "weights" / "average.safetensors").exists()

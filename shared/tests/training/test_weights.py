from pathlib import Path
from types import ModuleType

import pytest
import torch
from separata_shared.training import average_weights, load_weights, read_weights, save_weights
from separata_shared.training.weights import full_state
from torch import nn


def test_tied_weights_are_stored_once_and_loaded_into_both_places(
    toy: ModuleType, tmp_path: Path
) -> None:
    model = toy.build()
    nn.init.normal_(model.embedding.weight)
    state = full_state(model)
    assert "embedding.weight" in state
    assert "output.weight" not in state
    save_weights(tmp_path / "w.safetensors", state)
    fresh = toy.build()
    load_weights(fresh, tmp_path / "w.safetensors")
    assert torch.equal(fresh.output.weight, model.embedding.weight)


def test_mismatch_is_named_and_changes_nothing(toy: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = full_state(toy.build())
    model = toy.build()
    nn.init.ones_(model.embedding.weight)
    wrong = {
        r"w\.safetensors: lacks blocks\.0\.linear\.bias": {
            name: tensor for name, tensor in state.items() if name != "blocks.0.linear.bias"
        },
        r"w\.safetensors: unknown tensor extra": {**state, "extra": torch.zeros(1)},
        r"w\.safetensors: blocks\.0\.norm\.bias has shape \(3,\), the model needs \(8,\)": {
            **state,
            "blocks.0.norm.bias": torch.zeros(3),
        },
    }
    for message, content in wrong.items():
        save_weights(path, content)
        with pytest.raises(ValueError, match=message):
            load_weights(model, path)
    assert torch.equal(model.embedding.weight, torch.ones_like(model.embedding.weight))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(
    toy: ModuleType, tmp_path: Path, number: float
) -> None:
    path = tmp_path / "w.safetensors"
    state = full_state(toy.build())
    state["embedding.weight"][0, 0] = number
    save_weights(path, state)
    with pytest.raises(
        ValueError, match=r"w\.safetensors: embedding\.weight holds NaN or infinite"
    ):
        load_weights(toy.build(), path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K\x01."])
def test_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors: not a readable safetensors file"):
        read_weights(path)


def test_truncated_and_missing_files_are_named(toy: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match=r"w\.safetensors: no such file"):
        read_weights(path)
    save_weights(path, full_state(toy.build()))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"w\.safetensors: not a readable"):
        read_weights(path)


def test_average_is_the_mean_in_double_precision(tmp_path: Path) -> None:
    # In float32 1e8 + 1 - 1e8 is 0; the mean of the three is 1/3.
    values, paths = (1e8, 1.0, -1e8), []
    for number, value in enumerate(values):
        paths.append(tmp_path / f"{number}.safetensors")
        save_weights(paths[-1], {"a": torch.tensor([value]), "n": torch.tensor(number)})
    state = average_weights(paths)
    assert state["a"].dtype == torch.float32
    assert state["a"].item() == pytest.approx(1 / 3, rel=1e-6)
    assert state["n"].item() == 2


def test_average_refuses_other_models_and_nothing_at_all(tmp_path: Path) -> None:
    save_weights(tmp_path / "a", {"a": torch.zeros(1)})
    save_weights(tmp_path / "b", {"b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"b: a does not match .*a"):
        average_weights([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="no weight files"):
        average_weights([])

import errno
import operator
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from separata_shared.training import checkpoint, optim
from separata_shared.training.checkpoint import Progress
from separata_shared.training.config import TrainConfig
from separata_shared.training.distributed import World
from torch import nn

WORLD = World(0, 1, torch.device("cpu"))
State = tuple[nn.Module, torch.optim.Optimizer]


def make(toy: ModuleType, *, width: int = 8, **settings: Any) -> State:
    model = toy.build(width=width)
    return model, optim.make_optimizer(model, TrainConfig(**settings))


def trained(toy: ModuleType, **settings: Any) -> State:
    model, optimizer = make(toy, **settings)
    for batch in toy.batches(0)[:2]:
        toy.step(model, batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, state: State, step: int = 1) -> Path:
    return checkpoint.save(folder, *state, Progress(step=step, epoch=2, index=3), WORLD, seed=1)


def load(path: Path, state: State, seed: int = 1) -> Progress:
    return checkpoint.load(path, *state, WORLD, seed=seed)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "sgd"},
        {"optimizer": "adagrad"},
    ],
)
def test_loading_gives_back_what_was_saved(
    toy: ModuleType, tmp_path: Path, settings: dict[str, Any]
) -> None:
    state = trained(toy, **settings)
    path = save(tmp_path, state)
    fresh = make(toy, **settings)
    assert load(path, fresh) == Progress(step=1, epoch=2, index=3)
    for before, after in zip(checkpoint._states(*state), checkpoint._states(*fresh), strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(value, after[name]), name
    assert path.name == "step_0000001"
    assert [each.name for each in tmp_path.iterdir()] == ["step_0000001"]


def test_latest_is_the_highest_step(toy: ModuleType, tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    state = make(toy)
    for step in (9, 10_000_000, 200):
        save(tmp_path, state, step)
    (tmp_path / ".step_9999999999.tmp").mkdir()  # what a crash while saving leaves
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step_10000000"


@pytest.mark.parametrize("moment", ["tensors", "rename"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), SystemExit])
def test_failure_while_saving_leaves_the_previous_checkpoint_usable(
    toy: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    failure: BaseException | type[BaseException],
) -> None:
    state = trained(toy)
    save(tmp_path, state)

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(Path, "rename", fail)
        else:
            patch.setattr(os, "fsync", fail)
        with pytest.raises((OSError, SystemExit)) as caught:
            save(tmp_path, state, step=2)
    if isinstance(failure, OSError):
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == errno.ENOSPC
    assert [each.name for each in tmp_path.iterdir()] == ["step_0000001"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert load(newest, make(toy)).step == 1
    save(tmp_path, state, step=2)


def test_remains_of_a_crash_do_not_disturb_the_next_save(toy: ModuleType, tmp_path: Path) -> None:
    (tmp_path / ".step_0000001.tmp").mkdir()
    (tmp_path / ".step_0000001.tmp" / "__9_0.distcp").write_bytes(b"old")
    path = save(tmp_path, make(toy))
    assert sorted(each.name for each in path.iterdir()) == [".metadata", "__0_0.distcp"]


def cut_index(path: Path) -> None:
    file = path / ".metadata"
    file.write_bytes(file.read_bytes()[:-50])


def cut_data(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:500])


def without_index(path: Path) -> None:
    (path / ".metadata").unlink()


def without_data(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


def other_pickle(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps({"a": 1}))


def not_a_pickle(path: Path) -> None:
    (path / ".metadata").write_bytes(b"hello")


@pytest.mark.parametrize(
    "damage", [cut_index, cut_data, without_index, without_data, other_pickle, not_a_pickle]
)
def test_damaged_checkpoint_is_named(
    toy: ModuleType, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = save(tmp_path, trained(toy))
    damage(path)
    state = make(toy)
    before = [p.clone() for p in state[0].parameters()]
    with pytest.raises(ValueError, match="step_0000001") as caught:
        load(path, state)
    assert "\n" not in str(caught.value)
    if damage is not cut_data:  # noticed before anything is read
        assert all(map(torch.equal, before, state[0].parameters()))


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_index_that_would_run_code_is_refused(toy: ModuleType, tmp_path: Path) -> None:
    path = save(tmp_path, make(toy))
    trace = tmp_path / "trace"
    (path / ".metadata").write_bytes(pickle.dumps(Malicious(f"touch {trace}")))
    with pytest.raises(ValueError, match=r"\.metadata: refused, .*system is not admitted"):
        load(path, make(toy))
    assert not trace.exists()


class Member:
    """Pickles as Python before 3.11.4 pickles the member of an enumeration."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (self.owner, self.name)


def test_index_may_hold_members_of_enumerations(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enumeration = type(
        torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    )
    monkeypatch.setattr(
        enumeration,
        "__reduce_ex__",
        lambda member, _: Member(enumeration, member.name).__reduce__(),
    )
    path = save(tmp_path, trained(toy))
    assert b"getattr" in (path / ".metadata").read_bytes()
    assert load(path, make(toy)) == Progress(step=1, epoch=2, index=3)


def test_index_reaches_no_attribute(toy: ModuleType, tmp_path: Path) -> None:
    path = save(tmp_path, make(toy))
    victim = tmp_path / "victim"
    victim.touch()
    for owner in (type(victim), victim):
        (path / ".metadata").write_bytes(pickle.dumps(Member(owner, "unlink")))
        with pytest.raises(ValueError, match=r"\.metadata: refused"):
            load(path, make(toy))
    assert victim.exists()


def test_entry_that_is_no_tensor_is_refused(toy: ModuleType, tmp_path: Path) -> None:
    # Such an entry is a pickle inside the data file.
    folder = tmp_path / "step_0000001"
    with checkpoint._one_process_is_fine():
        dcp.save({"progress": {1, 2}}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    with pytest.raises(ValueError, match="BytesStorageMetadata is not admitted"):
        load(folder, make(toy))


def test_foreign_checkpoint_is_refused_with_the_first_difference(
    toy: ModuleType, tmp_path: Path
) -> None:
    path = save(tmp_path, trained(toy))
    with pytest.raises(
        ValueError, match=r"step_0000001: model\.embedding\.weight has shape \(20, 8\).*\(20, 6\)"
    ):
        load(path, make(toy, width=6))
    with pytest.raises(ValueError, match=r"unknown optimizer\.state\..*exp_avg"):
        load(path, make(toy, optimizer="sgd"))
    with pytest.raises(ValueError, match=r"train\.seed 1, not 2"):
        load(path, make(toy), seed=2)
    path = save(tmp_path, trained(toy, optimizer="sgd"), step=2)
    with pytest.raises(ValueError, match=r"lacks optimizer\.state\..*exp_avg"):
        load(path, make(toy))

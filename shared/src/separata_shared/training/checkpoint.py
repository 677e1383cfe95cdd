"""Checkpoints: model, optimizer and position in the data, whole or absent.

Written with torch.distributed.checkpoint into a temporary directory that is renamed when all of it
is on the disk. A checkpoint holds tensors only, and it can be read by any number of processes.
"""

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from separata_shared.training.distributed import World, barrier
from separata_shared.training.run import step_name, step_of


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch of the next micro-batch."""
    index: int = 0
    """Place of the next micro-batch in its epoch."""
    best_step: int = 0
    """Step of the best evaluation; 0 before the first."""
    best: float = 0.0
    """Value of the best evaluation."""


def latest(folder: Path) -> Path | None:
    """Newest checkpoint in ``folder``; None without one."""
    return max(folder.glob("step_[0-9]*"), key=step_of, default=None)


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    world: World,
    *,
    seed: int,
) -> Path:
    """Write the checkpoint of ``progress.step``; every process calls it.

    Args:
        folder: Directory of the checkpoints.
        model: Model, sharded or not, without the wrapper of DDP.
        optimizer: Its optimizer.
        progress: Where the run stands.
        world: The processes.
        seed: Seed of the run, which a resuming run must share.

    Returns:
        The checkpoint, ``folder/step_0000100``.

    Raises:
        OSError: It could not be written; the earlier checkpoints are untouched.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

    final = folder / step_name(progress.step)
    temporary = folder / f".{final.name}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier(world)
    try:
        with _one_process_is_fine():
            save_tensors(
                _tensors(model, optimizer, progress, seed),
                storage_writer=FileSystemWriter(temporary),
                no_dist=world.size == 1,
            )
        if world.is_main:
            _replace(temporary, final)
    except CheckpointException as error:
        raise _as_os_error(error, final) from None
    finally:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    barrier(world)
    return final


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, *, seed: int
) -> Progress:
    """Read a checkpoint into ``model`` and ``optimizer``; every process calls it.

    Args:
        path: The checkpoint, as ``save`` returned it.
        model: Model of the same architecture, sharded in any way.
        optimizer: Optimizer of the same kind.
        world: The processes; their number may differ from when the checkpoint was made.
        seed: Seed of this run.

    Returns:
        Where the run stands.

    Raises:
        ValueError: It is truncated, of another model, optimizer or seed, or not a checkpoint of
            this library; the message names it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

    from separata_shared.training._reader import TensorReader

    _check_names(path, tensors := _tensors(model, optimizer, Progress(), seed))
    try:
        with _one_process_is_fine():
            load_tensors(tensors, storage_reader=TensorReader(path), no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{path}: truncated or damaged checkpoint ({_line(error)})") from None
    step, epoch, index, best_step, saved_seed = tensors["progress"].tolist()
    if saved_seed != seed:
        raise ValueError(f"{path}: made with train.seed {saved_seed}, not {seed}")
    model_state, optimizer_state = _states(model, optimizer)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state | _part(tensors, "model."),
        optim_state_dict=optimizer_state | _part(tensors, "optimizer."),
        options=_options(),
    )
    return Progress(step, epoch, index, best_step, tensors["best"].item())


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, seed: int
) -> dict[str, Tensor]:
    """Everything a checkpoint holds. What is no tensor comes from the configuration instead."""
    model_state, optimizer_state = _states(model, optimizer)
    tensors = {f"model.{name}": value for name, value in model_state.items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer_state.items()}
    position = [progress.step, progress.epoch, progress.index, progress.best_step, seed]
    tensors["progress"] = torch.tensor(position)
    tensors["best"] = torch.tensor(progress.best, dtype=torch.float64)
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def _states(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return get_state_dict(model, optimizer, options=_options())


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _check_names(path: Path, tensors: dict[str, Tensor]) -> None:
    """Compare names and shapes with the checkpoint's index before anything is read."""
    from separata_shared.training._reader import read_shapes

    try:
        saved = read_shapes(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: not a checkpoint, it has no .metadata") from None
    except Exception as error:
        # A damaged pickle raises almost anything.
        raise ValueError(f"{path / '.metadata'}: refused, {_line(error)}") from None
    for name in sorted(saved.keys() ^ tensors.keys()):
        what = "lacks" if name in tensors else "has an unknown"
        raise ValueError(f"{path}: of another model or optimizer, it {what} {name}")
    for name, tensor in tensors.items():
        if saved[name] != tuple(tensor.shape):
            raise ValueError(
                f"{path}: {name} has shape {saved[name]}, this model needs {tuple(tensor.shape)}"
            )


def _replace(temporary: Path, final: Path) -> None:
    # The writer has flushed the files; their names live in the directories.
    _flush_directory(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _flush_directory(final.parent)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_os_error(error: BaseException, path: Path) -> OSError:
    """Turn torch's report of several failures into the first one's cause."""
    text = _line(error)
    causes = [cause for cause, _ in getattr(error, "failures", {}).values()]
    for cause in causes:
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno is not None:
                return OSError(cause.errno, os.strerror(cause.errno), str(path))
            cause = cause.__cause__ or cause.__context__
    return OSError(errno.EIO, f"could not be written ({text})", str(path))


def _line(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(str(error).split())[:200] or type(error).__name__

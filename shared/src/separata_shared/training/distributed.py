"""One process or many, started by torchrun: the same calls in both cases."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the messages."""
        return self.rank == 0


def start(device: str = "auto") -> World:
    """Join the processes that torchrun started, or be the only one; may be called again.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1`` and so on; ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: The device does not exist.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device: {device!r} is not a device") from None
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ImportError):
        # What torch raises depends on the kind of device that it was built without.
        raise ValueError(f"train.device: {device!r} is not available here; use cpu") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        return World(0, 1, chosen)
    if not dist.is_initialized():
        # Checkpoints exchange tensors of the host, hence gloo beside nccl.
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def stop() -> None:
    """Leave the process group, at a clean end and after model and optimizer are gone.

    Not to be called while an exception is on its way: the other processes may be inside a
    collective operation, and waiting for them would hide the traceback.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def wrap(
    model: nn.Module,
    world: World,
    *,
    parallel: Literal["ddp", "fsdp"],
    blocks: tuple[type[nn.Module], ...] = (),
) -> nn.Module:
    """Make ``model`` train on all processes.

    Args:
        model: Model on its device; its parameters become those of process 0.
        world: The processes.
        parallel: ``ddp`` keeps a copy on each process, ``fsdp`` (FSDP2) shards in place.
        blocks: Module types that FSDP2 shards one by one; what remains is one more shard.

    Returns:
        The module to call in training; ``model`` itself for one process or FSDP2.
    """
    if world.size == 1:
        return model
    if parallel == "ddp":
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    # Imported late: it costs almost as much time as torch itself.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in list(model.modules()):
        if isinstance(module, blocks):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def gradient_exchange(model: nn.Module, *, when: bool) -> Iterator[None]:
    """Exchange gradients in this block's backward pass only if ``when`` holds."""
    if isinstance(model, DistributedDataParallel) and not when:
        with model.no_sync():
            yield
        return
    # A method that FSDP2 adds to the module; asking for its class would cost its import.
    set_exchange: Callable[[bool], None] | None = getattr(model, "set_requires_gradient_sync", None)
    if set_exchange is not None:
        set_exchange(when)
    yield


def total(tensor: Tensor, world: World) -> Tensor:
    """Sum ``tensor`` over all processes, in place and without waiting for the device."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(number: int, world: World, *, when: bool) -> int:
    """Largest ``number`` of all processes, which wait for each other if ``when`` holds.

    Returns:
        The largest; 0 for several processes if ``when`` does not hold.
    """
    if world.size == 1:
        return number
    if not when:
        return 0
    shared = torch.tensor(number, device=world.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared.item())


def barrier(world: World) -> None:
    """Wait for all processes."""
    if world.size > 1:
        dist.barrier()

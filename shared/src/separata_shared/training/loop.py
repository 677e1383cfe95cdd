"""One training loop for all methods, on one process or many.

A method brings its model, its batches and ``step``, which computes a loss. The objective of an
optimizer step is sum(total) / sum(count) over all its micro-batches on all processes, so the
number of processes and of accumulated micro-batches changes speed and memory but not the result.
Before each micro-batch the random numbers are seeded with (seed, epoch, index): dropout depends on
the place in the data alone, and a resumed run repeats it exactly.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from separata_shared.data.batching import Batches, BatchStream
from separata_shared.data.collate import to_device
from separata_shared.training import checkpoint, distributed, optim
from separata_shared.training.checkpoint import Progress
from separata_shared.training.config import Loss, TrainConfig, TrainResult
from separata_shared.training.recorder import Recorder
from separata_shared.training.run import Run
from separata_shared.training.signals import Interrupted, caught_signals

Batch = TypeVar("Batch")
Evaluate = Callable[[nn.Module], dict[str, float]]


def fit(
    model: nn.Module,
    batches: Batches[Batch],
    step: Callable[[nn.Module, Batch], Loss],
    *,
    config: TrainConfig,
    run: Run,
    evaluate: Evaluate | None = None,
    blocks: tuple[type[nn.Module], ...] = (),
    before_step: Callable[[int], None] | None = None,
    decays: optim.Decays | None = None,
    clip: optim.Clip | None = None,
) -> TrainResult:
    """Train ``model``, or go on with the newest checkpoint of ``run``.

    Args:
        model: Model; moved to the device and trained in place.
        batches: Batches of each epoch, a pure function of the epoch.
        step: Computes the loss of a batch; calls the model it is given, which may be wrapped.
        config: Settings of the run.
        run: Directory that takes everything written.
        evaluate: Numbers that judge the model, such as ``loss``; called without gradients and in
            evaluation mode, by all processes alike.
        blocks: Module types that FSDP2 shards.
        before_step: Called with the number of steps done before each step, for schedules of a
            method's own.
        decays: Says of a parameter's name and tensor whether weight decay applies to it.
        clip: Clips gradients and returns their norm; the total norm to ``clip_norm`` by default.

    Returns:
        How the run ended.

    Raises:
        ValueError: The loss or gradient is not finite, the checkpoint does not fit, or another
            process trains in this directory.
        OSError: Something could not be written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    world = distributed.start(config.device)
    with (
        run.alone(write=world.is_main),
        _own_random_state(world),
        _deterministic(config.deterministic),
        caught_signals() as signals,
        Recorder(run, config=config, world=world) as recorder,
    ):
        run.begin(write=False)
        wrapped = distributed.wrap(
            model.to(world.device), world, parallel=config.parallel, blocks=blocks
        )
        optimizer = optim.make_optimizer(model, config, decays)
        update = _Update(
            step,
            model=wrapped,
            optimizer=optimizer,
            config=config,
            world=world,
            before_step=before_step or (lambda step: None),
            clip=clip or partial(optim.clip_total_norm, max_norm=config.clip_norm or math.inf),
        )
        progress = Progress()
        newest = checkpoint.latest(run.checkpoints)
        if newest is not None:
            progress = checkpoint.load(newest, model, optimizer, world, seed=config.seed)
        # What is refused above, or has no step to make, leaves the records of the run as they are.
        run.begin(write=world.is_main and progress.step < config.steps)
        stream = BatchStream(batches, epoch=progress.epoch, index=progress.index)
        recorder.begin(progress)
        wrapped.train()
        signum = 0
        while progress.step < config.steps and not signum:
            update(progress, stream, recorder)
            due = partial(_due, progress.step, last=progress.step == config.steps)
            pause = due(config.log_every) or due(config.evaluate_every) or due(config.save_every)
            # Several processes agree on a signal where they wait for each other anyway.
            signum = distributed.largest(max(signals, default=0), world, when=pause)
            if pause or signum:
                recorder.check()
                recorder.log(progress)
            if evaluate is not None and due(config.evaluate_every):
                with _evaluation(wrapped, world, config):
                    values = evaluate(model)
                recorder.judge(values, progress, model)
            if signum or due(config.save_every):
                # Weights first: a run whose last checkpoint stands is complete.
                recorder.save_weights(progress, model)
                checkpoint.save(
                    run.checkpoints, model, optimizer, progress, world, seed=config.seed
                )
                recorder.tidy(progress)
        # A signal in the last evaluation must end what would follow this run, too.
        signum = signum or distributed.largest(max(signals, default=0), world, when=True)
        if signum:
            raise Interrupted(
                f"stopped at step {progress.step}; the same command goes on from there", signum
            )
        return recorder.result(progress)


class _Update:
    """One optimizer step, made without waiting for the device."""

    def __init__(
        self,
        step: Callable[[nn.Module, Any], Loss],
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        world: distributed.World,
        before_step: Callable[[int], None],
        clip: optim.Clip,
    ) -> None:
        self.step, self.model, self.optimizer = step, model, optimizer
        self.config, self.world = config, world
        self.before_step, self.clip = before_step, clip
        self.schedule = optim.make_schedule(config)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, progress: Progress, stream: BatchStream[Any], recorder: Recorder) -> None:
        self.before_step(progress.step)
        lr = self.schedule(progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        names, sums = self.gradients(stream)
        distributed.total(sums, self.world)
        gradients = [_local(p.grad) for p in self.parameters if p.grad is not None]
        # DDP and FSDP2 average over the processes; the objective sums.
        torch._foreach_mul_(gradients, (self.world.size / sums[1].clamp(min=1)).float())
        norm = self.clip(self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        progress.epoch, progress.index = stream.epoch, stream.index
        recorder.add(progress.step, names, sums, norm, lr)

    def gradients(self, stream: BatchStream[Any]) -> tuple[list[str], Tensor]:
        """Add up the gradients of this process's micro-batches.

        Returns:
            Names of the logged sums, and this process's loss, items and logged sums.
        """
        config, world = self.config, self.world
        names: list[str] = []
        rows = []
        taken = stream.take(config.accumulate * world.size, rank=world.rank, size=world.size)
        for number, (epoch, index, batch) in enumerate(taken, start=1):
            torch.manual_seed(_seed(config.seed, epoch, index))
            with distributed.gradient_exchange(self.model, when=number == config.accumulate):
                with _autocast(world, config):
                    loss = self.step(self.model, to_device(batch, world.device))
                torch.autograd.backward(loss.total)
            names = list(loss.log)
            numbers = (loss.total.detach(), loss.count, *loss.log.values())
            rows.append(torch.stack([n.to(world.device, torch.float64) for n in numbers]))
        return names, torch.stack(rows).sum(dim=0)


def _due(step: int, every: int, *, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _seed(seed: int, epoch: int, index: int) -> int:
    """Mix a position into one well-spread number of 63 bits."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> 1)


def _local(gradient: Tensor) -> Tensor:
    # The part that this process holds of a gradient sharded by FSDP2; it shares the memory.
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _autocast(world: distributed.World, config: TrainConfig) -> torch.autocast:
    return torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16")


@contextmanager
def _evaluation(model: nn.Module, world: distributed.World, config: TrainConfig) -> Iterator[None]:
    model.eval()
    with torch.no_grad(), _autocast(world, config):
        yield
    model.train()


def _own_random_state(world: distributed.World) -> AbstractContextManager[None]:
    """Give the caller's random state back at the end; ``fit`` seeds every micro-batch."""
    return torch.random.fork_rng([world.device] if world.device.type == "cuda" else [])


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Use deterministic algorithms only, until the block ends."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # What cuBLAS needs for it, read when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

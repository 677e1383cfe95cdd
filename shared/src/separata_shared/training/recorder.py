"""What a run shows and writes while it trains: progress, metrics, weights, the best step."""

import math
import sys
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from separata_shared.files import write_json
from separata_shared.training.checkpoint import Progress
from separata_shared.training.config import TrainConfig, TrainResult
from separata_shared.training.distributed import World
from separata_shared.training.run import Run, step_name
from separata_shared.training.weights import full_state, save_weights


class Recorder:
    """Sums over the steps since the last record, and the places where results go.

    Only the first process shows and writes; the others take part in what needs all of them.

    Args:
        run: Run directory.
        config: Settings of the run.
        world: The processes.
    """

    def __init__(self, run: Run, *, config: TrainConfig, world: World) -> None:
        self.run, self.config, self.world = run, config, world
        self.metrics: dict[str, float] = {}
        # On a terminal a bar; elsewhere one line per record.
        self.bar = tqdm(
            total=config.steps, unit="step", disable=not (world.is_main and sys.stderr.isatty())
        )
        # First step whose loss or gradient was not finite; on the device until looked at.
        self._failed = torch.zeros((), dtype=torch.float64, device=world.device)
        self._saved_step = 0
        self._began = time.perf_counter()
        self._restart()

    def _restart(self) -> None:
        self._sums: Tensor | None = None
        self._since = time.perf_counter()

    def begin(self, progress: Progress) -> None:
        """Show where the run stands and drop the records after it."""
        if self.world.is_main:
            self.run.forget_after(progress.step)
        self._restart()
        self.bar.update(progress.step - self.bar.n)
        if progress.step:
            self.say(f"resuming {self.run.path} at step {progress.step}")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def result(self, progress: Progress) -> TrainResult:
        """How the run ended."""
        seconds = time.perf_counter() - self._began
        return TrainResult(progress.step, seconds, self.metrics, progress.best_step)

    def say(self, text: str) -> None:
        """Print a line for whoever watches, above the bar if there is one."""
        if self.world.is_main:
            tqdm.write(text, file=sys.stderr)

    def add(self, step: int, names: list[str], sums: Tensor, norm: Tensor, lr: float) -> None:
        """Take in one optimizer step without waiting for the device.

        Args:
            step: Number of the step, from 1.
            names: What the sums after the first two are called.
            sums: Loss, items and further sums of the step, over all processes.
            norm: Gradient norm.
            lr: Learning rate.
        """
        finite = torch.isfinite(sums[0]) & torch.isfinite(norm)
        self._failed = torch.where(finite | (self._failed > 0), self._failed, float(step))
        self._sums = sums if self._sums is None else self._sums + sums
        self._names, self._norm, self._lr = names, norm, lr
        self.bar.update()

    def check(self) -> None:
        """Wait for the device and look whether all losses and gradients were finite.

        Raises:
            ValueError: One was not.
        """
        failed = int(self._failed.item())
        if failed:
            raise ValueError(
                f"step {failed}: the loss or its gradient is not finite, and nothing was saved "
                f"since; see {self.run.metrics}, then try a lower train.lr or train.clip_norm"
            )

    def log(self, progress: Progress) -> None:
        """Record the means since the last record."""
        if self._sums is None:
            return
        total, items, *others = self._sums.tolist()
        seconds = time.perf_counter() - self._since
        values = {
            name: value / max(items, 1)
            for name, value in zip(("loss", *self._names), (total, *others), strict=True)
        }
        values |= {
            "lr": self._lr,
            "gradient_norm": self._norm.item(),
            "items_per_second": items / seconds,
        }
        self.metrics |= values
        self._write("train", progress, values)
        shown = {name: f"{values[name]:.4g}" for name in ("loss", "lr", "items_per_second")}
        if self.bar.disable:
            numbers = "  ".join(f"{name} {number}" for name, number in shown.items())
            self.say(f"step {progress.step}/{self.config.steps}  {numbers}")
        else:
            self.bar.set_postfix(shown)
        self._restart()

    def judge(self, values: dict[str, float], progress: Progress, model: nn.Module) -> None:
        """Record an evaluation and keep its weights if they are the best so far.

        Raises:
            ValueError: The monitored number is not among ``values``, or is not a number.
        """
        monitor = self.config.monitor
        if monitor not in values:
            raise ValueError(
                f"train.monitor: {monitor!r} is not evaluated; there are {', '.join(values)}"
            )
        if math.isnan(values[monitor]):
            raise ValueError(f"step {progress.step}: {monitor} of the evaluation is not a number")
        self._write("evaluate", progress, values)
        self.metrics |= {f"evaluate/{name}": value for name, value in values.items()}
        sign = 1 if self.config.monitor_mode == "min" else -1
        value = values[monitor]
        if not progress.best_step or sign * value < sign * progress.best:
            progress.best_step, progress.best = progress.step, value
        self.say(
            f"step {progress.step}  evaluation  "
            + "  ".join(f"{name} {number:.4g}" for name, number in values.items())
        )
        self.save_weights(progress, model)
        self.tidy(progress)

    def save_weights(self, progress: Progress, model: nn.Module) -> None:
        """Write the model's weights, unless those of this step are written."""
        if self._saved_step == progress.step:
            return
        state = full_state(model)
        if self.world.is_main:
            save_weights(self.run.weights / f"{step_name(progress.step)}.safetensors", state)
            if progress.best_step:
                best = {"step": progress.best_step, self.config.monitor: progress.best}
                write_json(self.run.best, best)
        self._saved_step = progress.step

    def tidy(self, progress: Progress) -> None:
        """Delete what is no longer wanted, and begin to measure anew."""
        if self.world.is_main:
            self.run.prune(self.config.keep, protected=progress.best_step)
        self._restart()

    def _write(self, kind: str, progress: Progress, values: dict[str, float]) -> None:
        if self.world.is_main:
            self.run.record(kind=kind, step=progress.step, epoch=progress.epoch, **values)

"""What a training run is told, and what its parts tell each other."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of ``fit``: the group ``train`` of a configuration."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    seed: int = 1
    """Seed of data order and dropout."""
    optimizer: Literal["adam", "adamw", "sgd", "adagrad"] = "adam"
    """Optimizer; adamw decouples the weight decay, p -= lr * weight_decay * p."""
    lr: float = 1e-3
    """Peak learning rate; for the schedule noam the factor in front of it."""
    schedule: Literal["constant", "linear", "inverse_sqrt", "noam", "cosine"] = "constant"
    """Learning rate as a function of the step; all of them warm up first."""
    warmup: int = 0
    """Steps of linear warm-up."""
    lr_start: float = 0.0
    """Learning rate at the first step of the warm-up."""
    lr_min: float = 0.0
    """Learning rate never goes below this after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: float = 1e-8
    """Added to the denominator of Adam and Adagrad."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    accumulate: int = 1
    """Micro-batches per step on each process."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the step; bf16 is autocast, parameters stay in fp32."""
    device: str = "auto"
    """Device such as cpu or cuda:1; auto takes a GPU if there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: copies of the model, or shards."""
    log_every: int = 50
    """Steps between two records of the loss; the only place where the host waits for the device."""
    evaluate_every: int = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    save_every: int = 1000
    """Steps between two checkpoints; the last step always has one."""
    keep: int = 3
    """How many of the newest checkpoints and weight files stay; the best weights always stay."""
    monitor: str = "loss"
    """Number returned by the evaluation that names the best weights."""
    monitor_mode: Literal["min", "max"] = "min"
    """Whether a low or a high monitored number is good."""
    deterministic: bool = False
    """Use deterministic algorithms only, so that a CPU run repeats bit by bit."""

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        for name in ("steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: must be at least 1, not {getattr(self, name)}")
        names = ["seed", "warmup", "evaluate_every", "lr", "lr_start", "lr_min", "clip_norm"]
        for name in (*names, "eps", "momentum", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name}: must not be negative, is {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas: must be in [0, 1), are {self.betas}")
        if self.schedule == "noam" and self.warmup < 1:
            raise ValueError("train.warmup: the schedule noam needs at least 1 step")


@dataclass
class Loss:
    """What a method's ``step`` returns for one micro-batch."""

    total: Tensor
    """Loss summed over the items; a scalar with a gradient."""
    count: Tensor
    """Number of items, tokens for example; a scalar."""
    log: dict[str, Tensor] = field(default_factory=dict)
    """Further sums over the items, detached; their means are logged."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Optimizer steps done."""
    seconds: float
    """Wall time of this call."""
    metrics: dict[str, float]
    """The last logged means and the last evaluation's numbers, prefixed with ``evaluate/``."""
    best_step: int
    """Step of the best evaluation; 0 without one."""

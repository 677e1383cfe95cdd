"""Optimizers, parameter groups, learning-rate schedules and gradient clipping.

A schedule is a pure function of the number of updates made so far, 0 for the first one.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from separata_shared.training.config import TrainConfig

Schedule = Callable[[int], float]
Clip = Callable[[list[nn.Parameter]], Tensor]
Decays = Callable[[str, nn.Parameter], bool]


def _warm(step: int, lr: float, warmup: int, start: float) -> float:
    return start + (lr - start) * step / warmup


def constant(step: int, *, lr: float, warmup: int = 0, start: float = 0.0) -> float:
    """Linear from ``start`` to ``lr`` over ``warmup`` steps, then ``lr``."""
    return _warm(step, lr, warmup, start) if step < warmup else lr


def linear(
    step: int, *, lr: float, warmup: int, steps: int, start: float = 0.0, floor: float = 0.0
) -> float:
    """Warm-up, then a straight line from ``lr`` at ``warmup`` to ``floor`` at ``steps``."""
    if step < warmup:
        return _warm(step, lr, warmup, start)
    return floor + (lr - floor) * max(0.0, (steps - step) / max(1, steps - warmup))


def cosine(
    step: int, *, lr: float, warmup: int, steps: int, start: float = 0.0, floor: float = 0.0
) -> float:
    """Warm-up, then half a cosine from ``lr`` at ``warmup`` to ``floor`` at ``steps``."""
    if step < warmup:
        return _warm(step, lr, warmup, start)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (lr - floor) * (1 + math.cos(math.pi * done)) / 2


def inverse_sqrt(
    step: int, *, lr: float, warmup: int, start: float = 1e-7, floor: float = 0.0
) -> float:
    """Warm-up, then ``lr * sqrt(warmup / step)``, never below ``floor``; fairseq's schedule."""
    if step < warmup:
        return _warm(step, lr, warmup, start)
    return max(floor, lr * math.sqrt(max(1, warmup) / max(1, step)))


def noam(step: int, *, lr: float, warmup: int) -> float:
    """``lr * min(1, step / warmup) * max(step, warmup) ** -0.5``; tensor2tensor's schedule.

    Its constant is part of ``lr``: for width 512 and factor 2, ``lr = 2 * 512 ** -0.5``.
    """
    return lr * min(1.0, step / warmup) / math.sqrt(max(step, warmup))


def make_schedule(config: TrainConfig) -> Schedule:
    """Schedule that a configuration asks for."""
    lr, warmup, steps = config.lr, config.warmup, config.steps
    start, floor = config.lr_start, config.lr_min
    match config.schedule:
        case "constant":
            return partial(constant, lr=lr, warmup=warmup, start=start)
        case "linear":
            return partial(linear, lr=lr, warmup=warmup, steps=steps, start=start, floor=floor)
        case "inverse_sqrt":
            return partial(inverse_sqrt, lr=lr, warmup=warmup, start=start, floor=floor)
        case "noam":
            return partial(noam, lr=lr, warmup=warmup)
        case "cosine":
            return partial(cosine, lr=lr, warmup=warmup, steps=steps, start=start, floor=floor)


def parameter_groups(
    model: nn.Module, weight_decay: float, decays: Decays | None = None
) -> list[dict[str, object]]:
    """Trainable parameters in one group with weight decay and one without.

    Args:
        model: Model whose parameters are grouped.
        weight_decay: Decay of the first group.
        decays: Says of a name and parameter whether it is decayed; all are by default.

    Returns:
        The groups that are not empty, in the form that torch optimizers take.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with_decay = [p for name, p in named if decays is None or decays(name, p)]
    chosen = {id(p) for p in with_decay}
    without = [p for _, p in named if id(p) not in chosen]
    groups: list[dict[str, object]] = [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, config: TrainConfig, decays: Decays | None = None
) -> torch.optim.Optimizer:
    """Torch optimizer that a configuration asks for.

    Adam is fused; in torch 2.13 the fused SGD and Adagrad do not work with FSDP2.
    """
    groups = parameter_groups(model, config.weight_decay, decays)
    match config.optimizer:
        case "adam":
            return torch.optim.Adam(
                groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
            )
        case "adamw":
            return torch.optim.AdamW(
                groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
            )
        case "sgd":
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=config.lr, eps=config.eps)


def clip_total_norm(parameters: Iterable[nn.Parameter], *, max_norm: float) -> Tensor:
    """Scale all gradients together so that their norm is at most ``max_norm``.

    Returns:
        The norm before scaling, a scalar on the parameters' device.
    """
    norm = nn.utils.clip_grad_norm_(list(parameters), max_norm)
    return _full(norm)


def clip_each_norm(parameters: Iterable[nn.Parameter], *, max_norm: float) -> Tensor:
    """Scale the gradient of each parameter on its own to a norm of at most ``max_norm``.

    Returns:
        The norm of all gradients before scaling, a scalar on the parameters' device.
    """
    norms = [_full(nn.utils.clip_grad_norm_([p], max_norm)) for p in parameters]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _full(norm: Tensor) -> Tensor:
    # With FSDP2 the norm is a DTensor whose parts lie on different processes.
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole

"""The norms on a GPU in Triton. Not run on a GPU yet: checked by the interpreter.

One program holds a row in registers, so memory is read and written once forward and once backward.
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

WIDEST = 2**14  # numbers of a row that one program can hold
NUMBERS = 8  # of a row in a thread


def supports(x: Tensor, width: int) -> str | None:
    """Give the reason why rows of ``width`` numbers cannot be normalised here, None where they can.

    Args:
        x: The input.
        width: ``H``.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; PyTorch for CUDA brings it"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on GPUs, and with TRITON_INTERPRET=1 on the CPU, not on {x.device.type}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, not in {x.dtype}"
    if width > WIDEST:
        return f"rows may hold {WIDEST} numbers, not {width}"
    return None


def forward(
    x: Tensor, residual: Tensor | None, width: int, C: float, k: float, eps: float, official: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Normalise rows; arguments and results as in ``closed_form.forward``."""
    from .triton_kernels import forward_kernel

    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    output = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    rows = x.numel() // width
    statistics = x.new_empty(2, rows, dtype=torch.float32)
    with torch.accelerator.device_index(x.get_device() if x.is_cuda else None):
        forward_kernel[(rows,)](
            x,
            x if residual is None else residual,
            output,
            output if total is None else total,
            *statistics.unbind(),
            width,
            C,
            k,
            eps,
            OFFICIAL=official,
            RESIDUAL=residual is not None,
            **_sizes(width),
        )
    return output, total, statistics


def backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    *,
    C: float,
    k: float,
    eps: float,
    official: bool,
    detach_mean: bool,
    detach_std: bool,
) -> Tensor:
    """Gradient of the input; arguments as in ``closed_form.backward``."""
    from .triton_kernels import backward_kernel

    x, grad = x.contiguous(), grad.contiguous()
    output = torch.empty_like(x)
    rows = statistics.shape[1]
    width = x.numel() // rows
    with torch.accelerator.device_index(x.get_device() if x.is_cuda else None):
        backward_kernel[(rows,)](
            grad,
            x if grad_total is None else grad_total.contiguous(),
            x,
            *statistics.unbind(),
            output,
            width,
            C,
            k,
            eps,
            OFFICIAL=official,
            DETACH_MEAN=detach_mean,
            DETACH_STD=detach_std,
            RESIDUAL=grad_total is not None,
            **_sizes(width),
        )
    return output


def _sizes(width: int) -> dict[str, Any]:
    """The numbers of a row rounded up to a power of two, and the warps that share them."""
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(max(block // (32 * NUMBERS), 1), 16)}

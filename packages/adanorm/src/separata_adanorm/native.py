"""The norms on a CPU in C++ (``native.cpp``), compiled on first use; float32 and bfloat16."""

import ctypes
import functools
import warnings
from pathlib import Path

import torch
from separata_shared import native
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
# Instructions to use, for tests: a number from 0 to the machine's best; None is the best.
LEVEL: int | None = None
# Bytes of a float32 output from which it is written past the caches, which it would only flush.
STREAM_BYTES = 2**24
# Numbers that are worth a thread.
THREAD_NUMBERS = 2**15


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels.

    Raises:
        UnavailableError: They cannot be compiled here.
    """
    kernels = native.load(SOURCE)
    kernels.norm_best_level.restype = ctypes.c_int64
    pointers, integers, numbers = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    shared = [integers] * 2 + [numbers] * 3 + [integers]  # rows, H, C, k, eps, official
    kernels.norm_forward.argtypes = [pointers] * 6 + shared + [integers] * 4
    kernels.norm_backward.argtypes = [pointers] * 5 + shared + [integers] * 6
    kernels.norm_forward.restype = kernels.norm_backward.restype = None
    return kernels


@functools.cache
def best_level() -> int:
    """The best instructions of this machine: 0 is plain, 1 AVX2 and 2 AVX-512."""
    return int(library().norm_best_level())


@functools.cache
def available() -> bool:
    """Whether the kernels can be used; warns once, the first time, where they cannot."""
    try:
        library()
    except native.UnavailableError as error:
        warnings.warn(f"the norms use slower PyTorch code: {error}", stacklevel=2)
        return False
    return True


def supports(x: Tensor) -> str | None:
    """Give the reason why ``x`` cannot be normalised here, None where it can."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, not on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 and bfloat16, not in {x.dtype}"
    return None


def forward(
    x: Tensor, residual: Tensor | None, width: int, C: float, k: float, eps: float, official: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Normalise rows; arguments and results as in ``closed_form.forward``."""
    x = x.contiguous()
    is_bf16, stream, threads, level = _way(x, width)
    rows = x.numel() // width
    output = torch.empty_like(x)
    statistics = torch.empty(2, rows)
    total = scratch = None
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(x)
    if residual is not None or is_bf16:
        scratch = torch.empty(threads, width)
    library().norm_forward(
        *(x.data_ptr(), _address(residual), output.data_ptr(), _address(total)),
        *(statistics.data_ptr(), _address(scratch)),
        *(rows, width, C, k, eps, official),
        *(is_bf16, stream, threads, level),
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
    x, grad = x.contiguous(), grad.to(x.dtype).contiguous()
    grad_total = None if grad_total is None else grad_total.to(x.dtype).contiguous()
    rows = statistics.shape[1]
    width = x.numel() // rows
    output = torch.empty_like(x)
    library().norm_backward(
        *(grad.data_ptr(), _address(grad_total), x.data_ptr()),
        *(statistics.data_ptr(), output.data_ptr()),
        *(rows, width, C, k, eps, official, detach_mean, detach_std),
        *_way(x, width),
    )
    return output


def _way(x: Tensor, width: int) -> tuple[bool, bool, int, int]:
    """Whether numbers are bfloat16 and pass the caches; threads and the level of instructions."""
    size = x.numel()
    is_bf16 = x.dtype == torch.bfloat16
    stream = not is_bf16 and 4 * size >= STREAM_BYTES and width % 16 == 0
    threads = max(min(torch.get_num_threads(), size // THREAD_NUMBERS), 1)
    return is_bf16, stream, threads, best_level() if LEVEL is None else LEVEL


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

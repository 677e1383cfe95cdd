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


class Problem(ctypes.Structure):
    """The arguments of the kernels; mirrors ``Problem`` of ``native.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        *((name, ctypes.c_int64) for name in ("official", "detach_mean", "detach_std")),
        *((name, ctypes.c_int64) for name in ("is_bf16", "stream", "threads", "level")),
        *((name, ctypes.c_double) for name in ("C", "k", "eps")),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "grad", "grad_total")),
        *((name, ctypes.c_void_p) for name in ("output", "total", "mean", "sigma", "scratch")),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels.

    Raises:
        UnavailableError: They cannot be compiled here.
    """
    kernels = native.load(SOURCE)
    kernels.norm_best_level.restype = ctypes.c_int64
    kernels.norm_level_name.restype = ctypes.c_char_p
    kernels.norm_level_name.argtypes = [ctypes.c_int64]
    for function in (kernels.norm_forward, kernels.norm_backward):
        function.argtypes = [ctypes.POINTER(Problem)]
        function.restype = None
    return kernels


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise rows; arguments and results as in ``closed_form.forward``."""
    problem = _problem(x, width, C=C, k=k, eps=eps, official=official)
    x = x.contiguous()
    output = torch.empty_like(x)
    mean, sigma = torch.empty(problem.rows), torch.empty(problem.rows)
    total = x.new_empty(0)
    scratch = None
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(x)
    if residual is not None or x.dtype == torch.bfloat16:
        scratch = torch.empty(problem.threads, width)
    _point(problem, x=x, residual=residual, output=output, mean=mean, sigma=sigma, scratch=scratch)
    problem.total = total.data_ptr()
    library().norm_forward(problem)
    return output, total, mean, sigma


def backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    mean: Tensor,
    sigma: Tensor,
    *,
    C: float,
    k: float,
    eps: float,
    official: bool,
    detach_mean: bool,
    detach_std: bool,
) -> Tensor:
    """Gradient of the input; arguments as in ``closed_form.backward``."""
    width = x.numel() // max(len(mean), 1)
    problem = _problem(x, width, C=C, k=k, eps=eps, official=official)
    problem.detach_mean, problem.detach_std = detach_mean, detach_std
    x, grad = x.contiguous(), grad.to(x.dtype).contiguous()
    grad_total = None if grad_total is None else grad_total.to(x.dtype).contiguous()
    output = torch.empty_like(x)
    _point(problem, x=x, grad=grad, grad_total=grad_total, output=output, mean=mean, sigma=sigma)
    library().norm_backward(problem)
    return output


def _problem(x: Tensor, width: int, *, C: float, k: float, eps: float, official: bool) -> Problem:
    """What forward and backward have in common."""
    size = x.numel()
    stream = x.dtype == torch.float32 and width % 16 == 0 and 4 * size >= STREAM_BYTES
    return Problem(
        rows=size // width if width else 0,
        width=width,
        official=official,
        is_bf16=x.dtype == torch.bfloat16,
        stream=stream,
        threads=max(min(torch.get_num_threads(), size // THREAD_NUMBERS), 1),
        level=library().norm_best_level() if LEVEL is None else LEVEL,
        C=C,
        k=k,
        eps=eps,
    )


def _point(problem: Problem, **tensors: Tensor | None) -> None:
    """Set the address of each tensor; the caller keeps the tensors alive."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(problem, name, tensor.data_ptr())

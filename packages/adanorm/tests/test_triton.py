"""The kernels for GPUs, by Triton's interpreter where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from separata_adanorm import closed_form, triton
from torch import Tensor

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
runs_here = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs in the interpreter below")


@needs_triton
@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests run in this process")
def test_in_the_interpreter() -> None:
    # It must be chosen before triton is imported, so in a process of its own.
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def check(x: Tensor, residual: Tensor | None, share: float, official: bool) -> None:
    """Compare forward and backward with the closed form, for everything that can be detached."""
    g, g_total = torch.randn_like(x), torch.randn_like(x)
    width = x.shape[-1]
    found = triton.forward(x, residual, width, 1.5, 0.1, 1e-5, official)
    expected = closed_form.forward(x, residual, width, 1.5, 0.1, 1e-5, official)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=share, atol=10 * share)
    _, total, statistics = expected
    sigma = statistics[1]
    saved = (g, None, x) if residual is None else (g, g_total, total)
    size = (g.float() / (sigma.view(*x.shape[:-1], 1) + 1e-5)).abs().max().item()
    for mean_is_constant in (True, False):
        for std_is_constant in (True, False):
            options = {"C": 1.5, "k": 0.1, "eps": 1e-5, "official": official}
            options |= {"detach_mean": mean_is_constant, "detach_std": std_is_constant}
            torch.testing.assert_close(
                triton.backward(*saved, statistics, **options),
                closed_form.backward(*saved, statistics, **options),
                rtol=share,
                atol=4 * share * size,
            )


# The interpreter cuts bfloat16 off instead of rounding it.
@needs_triton
@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 2, 7, 31, 512, 1000])
def test_agrees_with_the_closed_form(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, residual = (torch.randn(2, 2 * width, device=DEVICE).to(dtype)[:, ::2] for _ in range(2))
    share = 1e-6 if dtype == torch.float32 else 2e-3
    for official in (True, False):
        if width > 1 or not official:
            check(x, None, share, official)
            check(x, residual, share, official)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 7, 31, 512, 1000, 4096, 8192, 16384])
def test_agrees_with_the_closed_form_on_a_gpu(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, residual = (torch.randn(64, width, device=DEVICE).to(dtype) for _ in range(2))
    share = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for official in (True, False):
        if width > 1 or not official:
            check(x, None, share, official)
            check(x, residual, share, official)


@needs_triton
@runs_here
@pytest.mark.parametrize("value", [0.0, 0.1, 1e30])
def test_constant_rows_are_zero(value: float) -> None:
    x = torch.full((2, 100), value, device=DEVICE)
    output, _, statistics = triton.forward(x, None, 100, 1.0, 0.1, 1e-5, True)
    assert not output.any()
    assert not statistics[1].any()


@needs_triton
@runs_here
@pytest.mark.parametrize("scale", [1e-30, 1e20, 1e35])
def test_squares_do_not_overflow(scale: float) -> None:
    torch.manual_seed(0)
    x = scale * torch.randn(2, 64, device=DEVICE)
    for official in (True, False):
        found = triton.forward(x, None, 64, 1.0, 0.1, 1e-5, official)[0]
        exact = closed_form.forward(x.double(), None, 64, 1.0, 0.1, 1e-5, official)[0]
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_says_what_it_cannot_do() -> None:
    x = torch.randn(2, 8)
    if importlib.util.find_spec("triton") is None:
        assert "not installed" in (triton.supports(x, 8) or "")
    elif not INTERPRETED:
        assert "on GPUs" in (triton.supports(x, 8) or "")
    else:
        assert triton.supports(x, 8) is None
        assert "float64" in (triton.supports(x.double(), 8) or "")
        assert "16384" in (triton.supports(x, 20000) or "")

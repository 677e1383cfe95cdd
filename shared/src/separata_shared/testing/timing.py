"""Timings that can be compared: competitors take turns in one process, on the clock of their work.

A time is process CPU time where one thread computes, so that neighbours on a shared machine disturb
little; wall time with several threads; and wall time after synchronisation on an accelerator.
"""

import contextlib
import ctypes
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from separata_shared.training.run import processor

Call = Callable[[], object]
Clock = Callable[[], float]
Precision = Literal["highest", "high", "medium"]
"""As ``torch.set_float32_matmul_precision`` takes it."""

# A sample lasts at least this long, by repeating short calls.
SAMPLE_SECONDS = 0.01
# Options of malloc.h: how much is kept and taken at the end of the heap, and how many buffers live
# outside of it; and their values, ours and those of glibc.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 2**26}
GIVE_BACK = {MMAP_MAX: 2**16, TRIM_THRESHOLD: 2**17, TOP_PAD: 2**17}


@contextlib.contextmanager
def kept_memory(*, ready: int = 0, limit: int | None = None) -> Iterator[None]:
    """Let glibc keep memory that is freed inside the block.

    By default it gives buffers of 32 MiB and more back to the kernel, and the page faults of each
    new one cost more than many kernels do. But kept memory fragments, so only the timed calls
    belong inside. Elsewhere than on Linux this does nothing.

    Args:
        ready: Bytes to take from the kernel now, so that the first rounds have no page faults.
        limit: Bytes of data after which allocations fail, rather than fill the machine.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    set_malloc(KEEP)
    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
        torch.ones(ready, dtype=torch.uint8)  # and back to glibc
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        set_malloc(GIVE_BACK)


def set_malloc(options: Mapping[int, int]) -> None:
    """Set options of glibc's malloc and give all free memory back; a no-op for other libraries."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for option, value in options.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def make_clock(device: str, threads: int) -> Clock:
    """The clock, in seconds, that counts on this device."""
    if torch.device(device).type != "cpu":
        return _synchronised
    return time.process_time if threads == 1 else time.perf_counter


def _synchronised() -> float:
    torch.accelerator.synchronize()
    return time.perf_counter()


def interleave(
    competitors: Mapping[str, Call], clock: Clock, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds a call of each competitor took, one number a round.

    Args:
        competitors: Calls by name; they take turns.
        clock: Gives seconds.
        rounds: Largest number of rounds, two or more for ``spread``.
        seconds: After this time no further round begins, but there are five at least.
    """
    repeats = {}
    for name, call in competitors.items():
        call()
        repeats[name] = math.ceil(SAMPLE_SECONDS / max(_sample(call, clock, 1), 1e-5))
    times: dict[str, list[float]] = {name: [] for name in competitors}
    start = clock()
    for done in range(rounds):
        if done >= min(5, rounds) and clock() - start > seconds:
            break
        for name, call in competitors.items():
            times[name].append(_sample(call, clock, repeats[name]))
    return times


def _sample(call: Call, clock: Clock, repeats: int) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, and the 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[-1]


def ratio(times: list[float], baseline: list[float]) -> float:
    """Median of the ratios of each round."""
    return statistics.median(own / base for own, base in zip(times, baseline, strict=True))


@contextlib.contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Compute float32 products in this precision inside the block.

    On some CPUs ``"medium"`` chooses another library of the same accuracy and twice the speed.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that wait for the backward of an operation: its inputs as well, each storage once.

    Args:
        forward: Computes the output, which must require a gradient.
    """
    # The storages are kept, so that no address comes twice.
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> None:
        # Nothing goes back to the graph: a node that held its own output would never be freed.
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        output = forward()
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [child for child, _ in node.next_functions]
        # Functions written in Python may also hold tensors as plain attributes.
        for value in getattr(node, "__dict__", {}).values():
            if isinstance(value, Tensor):
                keep(value)
    return sum(storage.nbytes() for storage in storages.values())


def peak_flops(dtype: torch.dtype, device: str, clock: Clock) -> float:
    """Operations a second of the best product of two matrices ``(2048, 2048)`` found here."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    best = math.inf
    precisions: list[Precision] = ["highest", "medium"] if device == "cpu" else ["highest"]
    for precision in precisions:
        with matmul_precision(precision):
            times = interleave({"mm": lambda: a @ a}, clock, rounds=7, seconds=5.0)
        best = min(best, spread(times["mm"])[0])
    return 2 * 2048**3 / best


def copy_bandwidth(device: str, clock: Clock) -> float:
    """Bytes read and written a second while copying 128 MiB."""
    source = torch.ones(2**25, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, clock, rounds=7, seconds=5.0)
    return 2 * source.nbytes / spread(times["copy"])[0]


def environment(device: str, threads: int) -> dict[str, object]:
    """What timings depend on besides the case."""
    on_cpu = torch.device(device).type == "cpu"
    return {
        "device": processor() if on_cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "clock": "CPU time" if on_cpu and threads == 1 else "wall time",
    }

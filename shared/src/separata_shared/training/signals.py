"""Stopping a run by Ctrl-C (SIGINT) or by a batch system (SIGTERM)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run stopped by a signal after saving all that resuming needs.

    Args:
        message: What was saved and how to go on.
        signum: The signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying from the first; a second one acts as ever.

    Outside the main thread nothing is caught, because Python handles signals only there.

    Yields:
        The list of the signals received so far.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {signum: signal.getsignal(signum) for signum in signals}

    def handle(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for each, handler in previous.items():
            signal.signal(each, handler)

    try:
        for signum in signals:
            signal.signal(signum, handle)
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

"""Ctrl-C at a moment of our choosing."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back; yields a function that says whether it came.

    A step that is cut through has updated some matrices and not others: what is saved then is no
    whole number of steps, and a resumed run goes another way. A second Ctrl-C does not wait.
    """
    before = signal.getsignal(signal.SIGINT)
    # Signals reach the main thread only; and where Ctrl-C is ignored, it stays so.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return
    came = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)

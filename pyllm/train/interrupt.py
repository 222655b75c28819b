"""Ctrl-C, and the SIGTERM of a batch system, at a moment of our choosing."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NOTICE = b"\nstopping after this step, with a checkpoint (once more: at once, without one)\n"


class Terminated(SystemExit):
    """SIGTERM came; the exit code is 128 + 15, as a shell has it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def _in_main_thread() -> bool:
    # Signals reach the main thread only, and only there may a handler be set.
    return threading.current_thread() is threading.main_thread()


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM an exception, as Ctrl-C is one, so that the run can say where it stands."""
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def held_signals() -> Iterator[Callable[[], BaseException | None]]:
    """Hold Ctrl-C and SIGTERM back; yields a function that gives what to raise once one came.

    A step that is cut through has updated some matrices and not others: what is saved then is no
    whole number of steps, and a resumed run goes another way. A second one does not wait.
    """
    before: dict[int, Any] = {}
    came: list[BaseException] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
        signal.signal(number, before[number])
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, NOTICE)

    if _in_main_thread():
        for each in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(each)):  # one that is ignored stays so
                before[each] = handler
                signal.signal(each, remember)
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

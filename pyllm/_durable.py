"""Files that are written whole or not at all, and stay when the power goes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from glob import escape
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Write a text file in UTF-8 so that a kill at any moment leaves the old one or the new one.

    Raises:
        OSError: the disk is full or the place cannot be written; an old file stays.
    """
    # Two processes that write one file would otherwise rename each other's half of it.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with named_errors(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Only now is the new name on the disk, too.
    sync(path.parent)
    for left in path.parent.glob(f"{escape(path.name)}.*.tmp"):
        if _is_of_the_dead(left):
            left.unlink(missing_ok=True)


def _is_of_the_dead(temporary: Path) -> bool:
    """Was the process killed that named this file? No other will remove it."""
    pid = temporary.name.split(".")[-2]
    if os.name == "nt" or not pid.isdecimal():  # there, this signal would end the process
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's; no pid
        return False
    return False


def sync(path: Path) -> None:
    """Return when a file, or the list of names that a folder is, lies on the disk.

    Raises:
        OSError: the disk is full or broken.
    """
    # Some systems cannot open a folder for syncing; the rename is still ordered after the files.
    with contextlib.suppress(PermissionError, IsADirectoryError):
        handle = os.open(path, os.O_RDONLY)
        try:
            with named_errors(path):
                os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Give an OSError the file's name: writing to an open file that fails tells none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None

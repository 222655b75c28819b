"""One process at a time in the folder of a run: two would write over each other's files."""

import contextlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; where nothing else is put into it, it vanishes again.

    The operating system gives the lock up when a process ends, kill -9 included. What counts is
    the lock, not the file ``.lock``, which may lie there from a run that was killed.

    Raises:
        ValueError: another process holds it.
        OSError: the folder or the file cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / LOCK):
            yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # something is in it
                place.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    with contextlib.closing(_acquire(path)) as file:
        try:
            yield
        finally:
            # While it is held: who opened it in the meantime sees that it has no name any more.
            with contextlib.suppress(OSError):
                if _lies_at(path, file):
                    path.unlink()


def _acquire(path: Path) -> FileIO:
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                pid = file.read(20).decode("ascii", errors="replace")
            who = f"another process (pid {pid})" if pid.isdigit() else "another process"
            raise ValueError(
                f"{path.parent}: {who} is training there; wait for its end, or stop it, or start "
                "a new run with another --out"
            ) from None
        except OSError:
            return file  # some network file systems know no locks: as on Windows
        if _lies_at(path, file):
            break
        file.close()  # the process before removed it between the opening and the lock
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the number, too
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    return file


def _lies_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

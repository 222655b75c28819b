"""How every script starts: flags from a typed dataclass, user errors in one line, exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pyllm._memory import is_out_of_memory

# Set before torch loads the libraries that read them.
ENVIRONMENT = {
    # How long an OpenMP thread spins before it sleeps. GNU's default of 300,000 rounds is right for
    # an idle machine; with one busy neighbour on 2 cores a training step became 9 times slower with
    # it, 3 times with 20,000 and twice with 5,000, which cost 7% on the idle machine. This value
    # lies between and was not timed itself.
    "GOMP_SPINCOUNT": "10000",
    # float32 and float64 products then have the same bits on any number of threads (Intel's
    # conditional numerical reproducibility).
    "MKL_CBWR": "AUTO,STRICT",
}

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


def run(
    main: Callable[[Any], object],
    config_type: type[Any],
    defaults: Callable[[list[str]], Any] | None = None,
) -> NoReturn:
    """Reads the command line into `config_type`, calls `main` with it, and exits.

    What the command line leaves out comes from what `defaults` makes of it (the arguments after
    the script's name), or from the defaults of `config_type`.

    Exit codes: 0, or the number that `main` returns; 2 for what a user can cause (ValueError;
    OSError with its kinds: files, permissions, network; too little memory), after one line on
    stderr; 130 for Ctrl-C. Anything else is a bug of ours and keeps its traceback.
    """
    os.environ.update({**ENVIRONMENT, **os.environ})
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character of a story shows a question mark.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            code = main(_read(config_type, defaults))
        except SystemExit as stop:  # tyro's after --help, rich's when the reader has gone
            code = 0 if isinstance(stop.__context__, BrokenPipeError) else stop.code
        _flush()
    except BrokenPipeError:
        # The reader has had enough (`| head`): nothing is wrong, and nobody is left to tell.
        _leave(0)
    except (ValueError, OSError) as error:
        _say(f"error: {_one_line(error)}")
        _leave(USER_ERROR)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _say(f"error: memory does not suffice ({_one_line(error)}); choose smaller sizes")
        _leave(USER_ERROR)
    except KeyboardInterrupt:
        _say("interrupted")
        _leave(INTERRUPTED)
    _leave(code if isinstance(code, int) else 0)


def require_writable(folder: Path) -> None:
    """Find out now, and not when the work is done, that nothing can be written into `folder`.

    Raises:
        ValueError: it cannot be made, or takes no file.
    """
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write into {folder} ({error.strerror}); name a folder that can be written"
        ) from None
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it was not made after all
                place.rmdir()


def require_writable_file(flag: str, path: Path) -> None:
    """The same for a file that a flag names.

    Raises:
        ValueError: its folder takes no file, or it is a folder itself.
    """
    require_writable(path.parent)
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file")


def _read(config_type: type[Any], defaults: Callable[[list[str]], Any] | None) -> Any:
    from pyllm._flags import read_flags

    arguments = sys.argv[1:]
    chosen = {"default": defaults(arguments)} if defaults else {}
    return read_flags(config_type, arguments, **chosen)


def _one_line(error: Exception) -> str:
    """The message without line breaks, and with nothing that a terminal would obey."""
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _stdout_is_broken() -> bool:
    try:
        _flush()
    except OSError:
        return True
    return False


def _leave(code: Any) -> NoReturn:
    # What stdout could not take (a pipe without a reader, a full disk) is still in its buffer, and
    # Python would try, fail and complain once more while it shuts down.
    if _stdout_is_broken():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)

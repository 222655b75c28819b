"""How every script starts: flags from a typed dataclass, user errors in one line, exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

# How long an OpenMP thread spins before it sleeps. GNU's default of 300,000 rounds is right for an
# idle machine; with one busy neighbour on 2 cores a training step became 9 times slower with it, 3
# times with 20,000 and twice with 5,000, which cost 7% on the idle machine. This value lies between
# and was not timed itself. The runtime reads it when torch loads it, so it is set first.
SPIN_COUNT = "10000"

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


def run(
    main: Callable[[Any], object],
    config_type: type[Any],
    defaults: Callable[[], Any] | None = None,
) -> NoReturn:
    """Parses the command line into `config_type`, calls `main` with it, and exits.

    The flags start from what `defaults` gives, or from the defaults of `config_type`.

    What a user can cause (ValueError, and OSError with its kinds: files, permissions, network) is
    printed as one line on stderr, with exit code 2; Ctrl-C exits with 130. Anything else is a
    bug of ours and keeps its traceback. tyro answers an unknown flag itself, with code 2.
    """
    import tyro

    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        if defaults is None:
            config = tyro.cli(config_type)
        else:
            config = tyro.cli(config_type, default=defaults())
        main(config)
    except BrokenPipeError:
        # The reader has had enough (`| head`): nothing is wrong, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(0)

"""How every script starts: flags from a typed dataclass, user errors in one line, exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

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

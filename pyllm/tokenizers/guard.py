"""What can go wrong at the files and in the library, as a ValueError of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyllm._checks import one_line

RETRAIN = "train one with scripts/train_tokenizer.py"


@contextmanager
def panic_as_value_error(remedy: str = RETRAIN) -> Iterator[None]:
    """Turn a Rust panic into a ValueError.

    It arrives as a BaseException, which no `except Exception` stops. Those that are known are
    headed off, for a panic has written to the terminal by now.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"the tokenizers library gave up ({one_line(error)}); the tokenizer is damaged: "
            f"{remedy}"
        ) from None


def read_text(file: Path, what: str, remedy: str) -> str:
    """The text of a file that must hold `what`.

    Raises:
        ValueError: there is none, or it is a folder, not UTF-8 or empty; ends with the remedy.
    """
    if not file.exists():
        raise ValueError(f"{file}: no {what} there; {remedy}")
    if file.is_dir():
        raise ValueError(f"{file}: a folder, where a {what} file was expected; {remedy}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}; {remedy}") from error
    if not text.strip():
        raise ValueError(f"{file}: empty, where a {what} was expected; {remedy}")
    return text

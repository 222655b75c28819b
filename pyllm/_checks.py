"""Checks of plain values that many doors make: one line of what was given and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from operator import index
from typing import Any

LONGEST = 80
"""Characters of a given value that a message repeats."""


def shown(value: object) -> str:
    """How a message repeats a value: its repr on one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of over 4,300 digits, or whatever an object's own repr does
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, for use inside a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def check_size(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number from ``least`` to ``most``, as an int; NumPy's integers are taken, too.

    Raises:
        ValueError: it is not (True, 3.0 and "3" are none).
    """
    try:
        size = index(value)
    except TypeError:
        size = None
    beyond = size is not None and (size < least or (most is not None and size > most))
    if size is None or isinstance(value, bool) or beyond:
        allowed = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise ValueError(f"{name} must be a whole number {allowed}, got {shown(value)}")
    return size


def check_number(
    name: str, value: Any, least: float, most: float = math.inf, *, above: bool = False
) -> float:
    """A finite number from ``least`` (or only ``above`` it) to ``most``, as a float.

    Raises:
        ValueError: it is not (True and "3" are none).
    """
    if not is_finite(value) or not least <= value <= most or (above and value == least):
        allowed = f"finite number {'above' if above else 'of at least'} {least:g}"
        if most < math.inf:
            allowed = f"number from {least:g} to {most:g}"
        raise ValueError(f"{name} must be a {allowed}, got {shown(value)}")
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of some words.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
    return value


def check_text(text: Any, where: str = "the text") -> str:
    """A string that has a UTF-8 form.

    Raises:
        ValueError: it is not a str, or it holds a lone surrogate.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has no UTF-8 form: character {error.start} is {text[error.start]!r}, "
            "a lone surrogate; decode the bytes it came from with errors='replace'"
        ) from None
    return text


def check_texts(texts: Iterable[Any]) -> Iterator[str]:
    """Each of some documents, checked as it comes.

    Raises:
        ValueError: one is not a text, or ``texts`` is a single str, whose characters would pass
            for documents.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(
            f"texts must be a list or stream of str, got {shown(texts)}; put one text in a list"
        )
    return (check_text(text, f"text {number}") for number, text in enumerate(texts))


def is_finite(value: Any) -> bool:
    """Is it a number that a float can hold, and neither NaN nor infinite? (True is no number.)"""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of more than 308 digits
        return False

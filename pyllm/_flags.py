"""The command line, read by tyro into a typed dataclass; what tyro refuses is told in one line.

tyro answers a wrong flag with a box of several lines and exits, and its hooks for another answer
are private. So what it writes is caught, and the words that matter are picked out of the box.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import tyro

from pyllm._checks import shown

LONGEST, HINT = 300, 160
"""Characters of tyro's message and of each hint; more come only from long values."""


def read_flags(config_type: type[Any], arguments: Sequence[str], **options: Any) -> Any:
    """What `tyro.cli` gives for the arguments, with its options.

    Raises:
        ValueError: tyro or the config refuses them.
        SystemExit: --help was asked for, and given.
    """
    _check(arguments)
    try:
        with _caught() as said:
            return tyro.cli(config_type, args=arguments, **options)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_picked_from(said.getvalue(), config_type)) from None
    except (ValueError, AssertionError) as error:  # of the config; of tyro's shell completion
        raise ValueError(_with_flag_names(str(error), "", config_type)) from None
    return tyro.cli(config_type, args=arguments, **options)  # --help, now for the terminal


def _check(arguments: Sequence[str]) -> None:
    """No flag here has a use for an empty value: `--resume ""` would start a new run.

    Raises:
        ValueError: a value is empty, or an argument is not UTF-8.
    """
    for before, argument in zip(("", *arguments), arguments, strict=False):
        name, equals, value = argument.partition("=")
        if not argument or (name.startswith("--") and equals and not value):
            flag = (name or before or "the first argument")[:100]
            raise ValueError(
                f"{flag} has an empty value (a shell makes that of a variable that is not set); "
                "expected a value, or leave the flag out"
            )
        # Python hands over bytes that are no UTF-8 as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ValueError(f"argument {shown(argument)} is not UTF-8; expected text in UTF-8")


@contextlib.contextmanager
def _caught() -> Iterator[io.StringIO]:
    """What is written meanwhile, as on a terminal so wide that no word is broken."""
    said, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000000"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _picked_from(box: str, config_type: type[Any]) -> str:
    """tyro's message, and its hint: the nearest flag, or the one whose value is wrong.

    Rules divide a box into a title, the message, hints with a heading each, and a footer. If it is
    ever another, all of its words are the message.
    """
    sections = re.split(r"\n *-{20,} *\n", re.sub("[\u2500-\u257f]", " ", box))
    message, *hints = sections[1:-1] or [" ".join(" ".join(sections).split())]
    message = " ".join(re.split(r"\n *\n", message)[0].split()).rstrip(".")
    if refused := re.match(r"Error parsing ([A-Za-z]\w*): ([A-Z]\w*: )?", message):
        return _with_flag_names(message[refused.end() :], refused[1], config_type)
    message = re.sub(r"(\S{100})\S+", r"\1...", message)
    parts = [_cut(message, LONGEST)]
    parts += [_cut(" ".join(" ".join(hint.split("\n")[:2]).split()), HINT) for hint in hints]
    _, unknown, strays = message.partition("Unrecognized options: ")
    if unknown and not hints:
        words = strays.split(", ")
        flags = [word for word in words if word.startswith("-")]
        if flags:
            near = get_close_matches(flags[0], _known_flags(config_type), 1, 0)
        else:
            choices = _known_choices(config_type)
            near = [f"{choices[word]} {word}" for word in get_close_matches(words[0], choices, 1)]
        hint = "every other value follows a flag; quote a text with spaces"
        parts += [f"Perhaps you meant: {near[0]}" if near else hint]
    return "; ".join([*parts, "--help lists the flags"])


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."


def _with_flag_names(message: str, group: str, config_type: type[Any]) -> str:
    """A config's complaint about `top_k`, or `train.seq_len`, in the words of who typed flags."""
    names = {flag[2:].replace("-", "_"): flag for flag in _known_flags(config_type)}

    def name(word: re.Match[str]) -> str:
        return names.get(f"{group}.{word[0]}") or names.get(word[0]) or word[0]

    # Not within a path, a flag or a quoted value.
    return re.sub(r"(?<![\w./'\"-])[a-z][\w.]*\w(?![\w/'\"-])", name, message)


def _known_flags(config_type: type[Any]) -> list[str]:
    return re.findall(r"(?:  |, )(--[a-z][\w.-]*)", _help(config_type))


def _known_choices(config_type: type[Any]) -> dict[str, str]:
    """Words that a flag takes, and the flag."""
    found = re.findall(r"(--[a-z][\w.-]*) \[?\{([^{}\n]+)\}", _help(config_type))
    return {word: flag for flag, words in found for word in words.split(",")}


def _help(config_type: type[Any]) -> str:
    with _caught() as said, contextlib.suppress(SystemExit):
        tyro.cli(config_type, args=["--help"])
    return said.getvalue()

"""The faults of ``source_mutants``, for C++: every operator, number and statement, spoilt once.

No parser is needed: clang-format puts spaces around binary operators and nowhere else, so that
`` * `` is a product and ``*p`` or ``T* p`` is none, `` < `` compares and ``f<T>`` does not.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SWAPS = {
    " + ": " - ",
    " - ": " + ",
    " * ": " + ",
    " / ": " * ",
    " % ": " / ",
    " < ": " <= ",
    " <= ": " < ",
    " > ": " >= ",
    " >= ": " > ",
    " == ": " != ",
    " != ": " == ",
    " && ": " || ",
    " || ": " && ",
    " += ": " = ",
    "-INFINITY": "INFINITY",
    "true": "false",
    "false": "true",
}
_OPERATOR = re.compile("|".join(re.escape(token) for token in sorted(_SWAPS, key=len)[::-1]))
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.]|\s*:)")
# An assignment, an addition or a call that is a line of its own; a declaration is not.
_STATEMENT = re.compile(r"^\s+(\*?[a-z]\w*[\w.\[\]()+\-*/ ]*? \+?= .*|[a-z]\w*\(.*\)|continue);$")

# How much a thread gets at a time: speed, not numbers.
_TUNING = re.compile(r"k\w+PerRange\b|\bgrain = |\bper_token = ")


@dataclass(frozen=True)
class KernelMutant:
    """A C++ source with one place spoilt."""

    name: str
    """File, line number, the line before and after."""
    source: str


def kernel_mutants(file_name: str, source: str) -> Iterator[KernelMutant]:
    """Every spoilt variant of the code in ``source``: not of comments, types or directives."""
    lines = source.splitlines()
    inside = False
    for number, line in enumerate(lines):
        inside |= line.startswith("namespace ")
        code = line.partition("//")[0].rstrip()
        if not inside or not code or _is_declarative(code) or _TUNING.search(code):
            continue
        for spoilt in _spoilt(code):
            changed = [*lines[:number], spoilt, *lines[number + 1 :]]
            what = f"{code.strip()} -> {spoilt.strip() or 'nothing'}"
            yield KernelMutant(f"{file_name}:{number + 1}: {what}", "\n".join(changed) + "\n")


def _is_declarative(code: str) -> bool:
    start = code.lstrip()
    return start.startswith(("#", "template", "using", "namespace", "struct", "static_assert"))


def _spoilt(code: str) -> Iterator[str]:
    for match in _OPERATOR.finditer(code):
        yield code[: match.start()] + _SWAPS[match.group()] + code[match.end() :]
    for match in _NUMBER.finditer(code):
        yield code[: match.start()] + str(int(match.group()) + 1) + code[match.end() :]
    if _STATEMENT.match(code):
        yield ""

"""What can happen to the files of a folder, for tests of whatever reads them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Harm = tuple[str, Callable[[bytes, bytes], Any]]
"""A file's name, and a function from its bytes and another version's to what is there afterwards:
bytes, None for nothing, a dict for a folder."""


@st.composite
def harms(draw: st.DrawFn, names: Sequence[str]) -> Harm:
    """One of the files, cut, flipped, overwritten, emptied, doubled, swapped or removed."""
    name = draw(st.sampled_from(names))
    where = draw(st.floats(0, 1, exclude_max=True))
    # The header of a safetensors file is a tenth of it, and where its parser is.
    where = where / 10 if draw(st.booleans()) else where
    blob = draw(st.binary(min_size=1, max_size=8))
    bit = draw(st.integers(0, 7))

    def flip(old: bytes, other: bytes) -> bytes:
        at = int(where * len(old))
        return old[:at] + bytes([old[at] ^ 1 << bit]) + old[at + 1 :]

    def splice(old: bytes, other: bytes) -> bytes:
        at = int(where * len(old))
        return old[:at] + blob + old[at + len(blob) :]

    kinds: list[Callable[[bytes, bytes], Any]] = [
        flip,
        splice,
        lambda old, other: old[: int(where * len(old))],
        lambda old, other: old[int(where * len(old)) :],
        lambda old, other: old[: int(where * len(old))] + blob + old[int(where * len(old)) :],
        lambda old, other: old + blob,
        lambda old, other: old * 2,
        lambda old, other: blob,
        lambda old, other: b"",
        lambda old, other: bytes(len(old)),
        lambda old, other: other,
        lambda old, other: None,
        lambda old, other: {},
    ]
    return name, draw(st.sampled_from(kinds))


@contextmanager
def changed(path: Path, content: Any) -> Iterator[None]:
    """For a while, ``content`` of a :data:`Harm` stands where the file was."""
    old = path.read_bytes()
    path.unlink()
    if isinstance(content, dict):
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    try:
        yield
    finally:
        if isinstance(content, dict):
            path.rmdir()
        path.write_bytes(old)


def digests(folder: Path) -> dict[str, str]:
    """Every file below the folder and its sha256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }

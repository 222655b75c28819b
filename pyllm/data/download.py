"""Data sets of the hub as plain text files: data/<name>/train.txt and valid.txt."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pyllm._checks import check_size, shown
from pyllm.data.texts import SEPARATOR, read_texts


@dataclass(frozen=True)
class HubDataset:
    """Where a data set lies on the hub.

    Attributes:
        hub_name: owner/name.
        valid_split: its validation split, or None: then every `VALID_EVERY`th document is held
            out of the train split.
        max_documents: read by default; None is all of them.
    """

    hub_name: str
    valid_split: str | None
    max_documents: int | None


VALID_EVERY = 100
DATASETS = {
    "tinystories": HubDataset("roneneldan/TinyStories", "validation", None),
    "openwebtext": HubDataset("Skylion007/openwebtext", None, 100_000),
}


def download(name: str, folder: str | Path, max_documents: int | None = None) -> dict[str, int]:
    """Streams a data set into `folder`/train.txt and valid.txt; returns the documents in each.

    Each document is followed by a line `<|endoftext|>`. The files appear whole or not at all.

    Args:
        name: a key of `DATASETS`.
        folder: made where it is missing.
        max_documents: of the train split, by default the data set's own limit.

    Raises ValueError for an unknown name or a limit below 2, ConnectionError without network.
    """
    if not isinstance(name, str) or name not in DATASETS:
        raise ValueError(f"unknown data set {shown(name)}; known are {', '.join(DATASETS)}")
    if max_documents is not None:
        max_documents = check_size("max_documents", max_documents, 2, 10**12)
    source = DATASETS[name]
    folder = Path(folder)
    limit = max_documents or source.max_documents
    train = itertools.islice(read_texts(source.hub_name, "train", streaming=True), limit)
    if source.valid_split is not None:
        valid = read_texts(source.hub_name, source.valid_split, streaming=True)
        counts = {"valid.txt": _write([folder / "valid.txt"], ((0, text) for text in valid))[0]}
        counts["train.txt"] = _write([folder / "train.txt"], ((0, text) for text in train))[0]
        return counts
    # The first document is held out, and so is one of every VALID_EVERY after it.
    numbered = ((int(index % VALID_EVERY > 0), text) for index, text in enumerate(train))
    n_valid, n_train = _write([folder / "valid.txt", folder / "train.txt"], numbered)
    return {"valid.txt": n_valid, "train.txt": n_train}


def _write(paths: list[Path], documents: Iterable[tuple[int, str]]) -> list[int]:
    """Writes each (number of the path, text); returns how many went where."""
    counts = [0] * len(paths)
    temporary = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in paths]
    streams: list[TextIO] = []
    try:
        for which, text in documents:
            if not streams:  # only now: without network not even the folder is made
                paths[0].parent.mkdir(parents=True, exist_ok=True)
                streams = [path.open("w", encoding="utf-8", newline="\n") for path in temporary]
            streams[which].write(f"{text}\n{SEPARATOR}\n")
            counts[which] += 1
        for stream, source, path in zip(streams, temporary, paths, strict=True):
            stream.flush()
            os.fsync(stream.fileno())
            source.replace(path)
    finally:
        for stream, source in zip(streams, temporary, strict=False):
            stream.close()
            source.unlink(missing_ok=True)
    return counts

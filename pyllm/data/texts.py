"""Documents from a text file, JSON lines, Parquet or the Hugging Face hub; one at a time."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyllm.tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".text", ".md", "")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_texts(
    path_or_hub_name: str | Path,
    split: str | None = None,
    streaming: bool = False,
    text_column: str = "text",
) -> Iterator[str]:
    """The documents of a file or of a data set on the hub; empty ones are left out.

    A `.txt` file is cut at the lines that read `<|endoftext|>` (without such a line it is one
    document); a document is exactly what stands between two such lines, without the newline
    before the second. `.jsonl` and `.parquet` files and data sets give their `text_column`.

    Args:
        path_or_hub_name: a file, or `owner/name` on the hub.
        split: of a data set on the hub, by default "train"; a file has none.
        streaming: read a data set from the hub without storing it; files are always streamed.
        text_column: the column, or JSON key, that holds the text.

    Raises ValueError, at the call where it can: no such file, a folder, empty, not UTF-8, a row
    without the column. ConnectionError where the hub cannot be reached.
    """
    path = Path(path_or_hub_name)
    name = str(path_or_hub_name)
    known = (*TEXT_SUFFIXES[:-1], ".jsonl", ".parquet")
    if not path.exists():
        if HUB_NAME.fullmatch(name) and path.suffix not in known:
            return _not_empty(_hub_texts(name, split or "train", streaming, text_column), name)
        raise ValueError(
            f"{name}: no such file; give an existing {', '.join(known)} file, "
            "or a data set of the Hugging Face hub as owner/name"
        )
    if path.is_dir():
        raise ValueError(f"{name}: a folder; give one of the files in it ({', '.join(known)})")
    if split is not None:
        raise ValueError(f"{name}: split {split!r} was asked of a file, which has no splits")
    if path.stat().st_size == 0:
        raise ValueError(f"{name}: the file is empty; expected documents")
    if path.suffix == ".jsonl":
        return _not_empty(_jsonl_texts(path, text_column), name)
    if path.suffix == ".parquet":
        return _not_empty(_parquet_texts(path, text_column), name)
    if path.suffix in TEXT_SUFFIXES:
        return _not_empty(_text_documents(path), name)
    raise ValueError(f"{name}: unknown kind of file {path.suffix!r}; expected {', '.join(known)}")


def split_documents(
    texts: Iterable[str], fraction: float = 0.02, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Cuts documents into train and validation, both in their old order.

    The validation part is `fraction` of the different documents, at least one, drawn with `seed`.
    Copies of a document fall on the same side (and validation keeps one), so that no text is in
    both. Raises ValueError for a fraction outside (0, 1) or fewer than two different documents.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the validation fraction is {fraction}; expected between 0 and 1")
    texts = list(texts)
    different = list(dict.fromkeys(texts))
    if len(different) < 2:
        raise ValueError(
            f"found {len(different)} different document(s); a train and a validation part need "
            f"at least 2: separate documents by lines {SEPARATOR}, or give a validation file"
        )
    n_valid = min(max(1, round(fraction * len(different))), len(different) - 1)
    chosen = set(random.Random(seed).sample(different, n_valid))
    train = [text for text in texts if text not in chosen]
    return train, [text for text in different if text in chosen]


def story_windows(
    texts: Iterable[str], tokenizer: Tokenizer, max_bytes: int = 1024
) -> list[tuple[list[int], int]]:
    """What `val_bpb` is measured on: the start of each story, tokenised by itself.

    Each text is cut to its first `max_bytes` bytes of UTF-8, cut back to a whole character.
    Returns (token ids, bytes) for each, with no end-of-text on either side; the one who scores
    puts it in front as the empty context. Empty texts are left out.
    """
    if max_bytes < 4:
        raise ValueError(f"max_bytes is {max_bytes}; expected 4 or more, the longest character")
    # errors="ignore" can only drop the one character that the cut went through.
    cut = [text.encode("utf-8")[:max_bytes].decode("utf-8", errors="ignore") for text in texts]
    cut = [text for text in cut if text]
    ids = tokenizer.encode_batch(cut)
    return [(ids_, len(text.encode("utf-8"))) for ids_, text in zip(ids, cut, strict=True)]


def _not_empty(texts: Iterator[str], name: str) -> Iterator[str]:
    found = False
    for text in texts:
        if text.strip():
            found = True
            yield text
    if not found:
        raise ValueError(f"{name}: no document in it that is not empty")


def _text_documents(path: Path) -> Iterator[str]:
    separator = SEPARATOR.encode()
    lines: list[bytes] = []
    start = position = 0
    with path.open("rb") as stream:
        if stream.read(3) != b"\xef\xbb\xbf":  # a byte order mark, as Windows editors write it
            stream.seek(0)
        position = start = stream.tell()
        for line in stream:
            position += len(line)
            if line.strip() == separator:
                yield _decode(b"".join(lines), path, start)
                lines, start = [], position
            else:
                lines.append(line)
        yield _decode(b"".join(lines), path, start)


def _decode(document: bytes, path: Path, start: int) -> str:
    """The text of a document that begins at byte `start` of the file, less its last newline."""
    try:
        text = document.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {start + error.start} "
            f"({document[error.start]:#04x}); convert the file to UTF-8"
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def _column(row: object, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no column {column!r}; found {found}: name the text column")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: column {column!r} holds {type(text).__name__}; expected a string"
        )
    return text


def _jsonl_texts(path: Path, column: str) -> Iterator[str]:
    # By hand, where `datasets` would do: an error then names the line, and nothing is cached.
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8; convert the file") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error}); expected one object a line"
                ) from error
            yield _column(row, column, f"{path}, line {number}")


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    # pyarrow comes with `datasets`, which would log an error of its own beside ours.
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ValueError(f"{path}: not a readable Parquet file ({_one_line(error)})") from error
    names = file.schema_arrow.names
    if column not in names:
        _column(dict.fromkeys(names), column, str(path))
    number = 0
    for batch in file.iter_batches(columns=[column]):
        for text in batch.column(0).to_pylist():
            yield _column({column: text}, column, f"{path}, row {number}")
            number += 1


def _hub_texts(name: str, split: str, streaming: bool, column: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = iter(load_dataset(name, split=split, streaming=streaming))
    except Exception as error:
        # Offline, no such data set and no such split come as unrelated types, some of them
        # ValueError; what the reader can do about them is the same.
        raise ConnectionError(
            f"{name}: split {split!r} could not be read from the Hugging Face hub "
            f"({_one_line(error)}); check the name and the network, or give a local file"
        ) from error
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise ConnectionError(
                f"{name}: reading from the Hugging Face hub broke off after {number:,} documents "
                f"({_one_line(error)}); check the network and start again"
            ) from error
        if row is None:
            return
        yield _column(row, column, f"{name}, row {number}")
        number += 1


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__

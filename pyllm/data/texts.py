"""Documents from a text file, JSON lines, Parquet or the Hugging Face hub; one at a time."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllm._checks import check_size, check_text, check_texts, one_line, shown

if TYPE_CHECKING:
    from pyllm.tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".text", ".md", "")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # as Windows editors write it
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: a Path makes one of two


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
    Suffixes may be in capitals.

    Args:
        path_or_hub_name: a file, or `owner/name` on the hub.
        split: of a data set on the hub, by default "train"; a file has none.
        streaming: read a data set from the hub without storing it; files are always streamed.
        text_column: the column, or JSON key, that holds the text.

    Raises ValueError, at the call where it can: no such file, a folder, empty, not UTF-8, damaged,
    a row without the column. ConnectionError where the hub cannot be reached.
    """
    path = Path(path_or_hub_name)
    name = str(path_or_hub_name)
    known = (*TEXT_SUFFIXES[:-1], ".jsonl", ".parquet")
    suffix = path.suffix.lower()
    if not path.exists():
        if URL.match(name):
            raise ValueError(
                f"{name}: URLs are not read; download the file and give its path, or name a data "
                "set of the Hugging Face hub as owner/name"
            )
        if HUB_NAME.fullmatch(name) and suffix not in known:
            return _not_empty(_hub_texts(name, split or "train", streaming, text_column), name)
        raise ValueError(
            f"{name}: no such file; give an existing {', '.join(known)} file, "
            "or a data set of the Hugging Face hub as owner/name"
        )
    if path.is_dir():
        raise ValueError(f"{name}: a folder; give one of the files in it ({', '.join(known)})")
    if split is not None:
        raise ValueError(f"{name}: split {split!r} was asked of a file, which has no splits")
    if not path.is_file():  # a pipe or a device: it is read several times, and has no size
        raise ValueError(f"{name}: not a regular file; write what it gives into one first")
    if path.stat().st_size == 0:
        raise ValueError(f"{name}: the file is empty; expected documents")
    if suffix == ".jsonl":
        return _not_empty(_jsonl_texts(path, text_column), name)
    if suffix == ".parquet":
        return _not_empty(_parquet_texts(path, text_column), name)
    if suffix in TEXT_SUFFIXES:
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
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ValueError(f"the validation fraction is {shown(fraction)}; expected between 0 and 1")
    seed = check_size("seed", seed, 0)
    texts = list(check_texts(texts))
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
    puts it in front as the empty context. Empty texts are left out. Raises ValueError for texts
    that are no str, and for max_bytes below 4, the bytes of the longest character.
    """
    max_bytes = check_size("max_bytes", max_bytes, 4)
    # errors="ignore" can only drop the one character that the cut went through.
    cut = [
        text.encode("utf-8")[:max_bytes].decode("utf-8", errors="ignore")
        for text in check_texts(texts)
    ]
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
        if stream.read(3) != BYTE_ORDER_MARK:
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
    if "\0" in text:
        at = start + document.index(b"\0")
        raise ValueError(
            f"{path}: a zero byte at byte {at}, as in UTF-16 and in files that are no text; "
            "convert the file to UTF-8"
        )
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _column(row: object, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        found = shown(list(row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no column {column!r}; found {found}: name the text column")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: column {column!r} holds {type(text).__name__}; expected a string"
        )
    return check_text(text, f"{where}: column {column!r}")


def _jsonl_texts(path: Path, column: str) -> Iterator[str]:
    # By hand, where `datasets` would do: an error then names the line, and nothing is cached.
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8; convert the file") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({one_line(error)}); expected one object "
                    "a line"
                ) from error
            yield _column(row, column, f"{path}, line {number}")


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    number = 0
    for values in _parquet_columns(path, column):
        for text in values:
            yield _column({column: text}, column, f"{path}, row {number}")
            number += 1


def _parquet_columns(path: Path, column: str) -> Iterator[list[Any]]:
    """The values of one column, batch by batch; nothing that pyarrow raises leaves as it is."""
    # pyarrow comes with `datasets`, which would log an error of its own beside ours.
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    # OSError is what damaged pages are to it, KeyError and IndexError what a wrong schema is.
    damage = (ArrowException, ValueError, OSError, KeyError, IndexError, TypeError, MemoryError)
    with path.open("rb") as stream:  # so that a file that may not be read is an error of its own
        try:
            file = parquet.ParquetFile(stream, page_checksum_verification=True)
            names = file.schema_arrow.names
            batches = file.iter_batches(columns=[column])
        except damage as error:
            raise ValueError(f"{path}: not a readable Parquet file ({one_line(error)})") from error
        if column not in names:
            _column(dict.fromkeys(names), column, str(path))
        while True:
            try:
                batch = next(batches, None)
                values = None if batch is None else batch.column(column).to_pylist()
            except damage as error:
                raise ValueError(
                    f"{path}: not a readable Parquet file ({one_line(error)}); it is damaged: "
                    "write it again"
                ) from error
            if values is None:
                return
            yield values


def _hub_texts(name: str, split: str, streaming: bool, column: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = iter(load_dataset(name, split=split, streaming=streaming))
    except Exception as error:
        # Offline, no such data set and no such split come as unrelated types, some of them
        # ValueError; what the reader can do about them is the same.
        raise ConnectionError(
            f"{name}: split {split!r} could not be read from the Hugging Face hub "
            f"({one_line(error)}); check the name and the network, or give a local file"
        ) from error
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise ConnectionError(
                f"{name}: reading from the Hugging Face hub broke off after {number:,} documents "
                f"({one_line(error)}); check the network and start again"
            ) from error
        if row is None:
            return
        yield _column(row, column, f"{name}, row {number}")
        number += 1

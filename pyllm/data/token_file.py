"""Token files: ids of many documents on disk, memory-mapped, with a JSON sidecar.

`train.bin` holds the ids one after another as little-endian uint16 or uint32, each document
followed by end-of-text. `train.json` beside it says what they are; its keys are the fields of
`Sidecar`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllm._checks import check_size, check_texts, one_line, shown
from pyllm._durable import write_file

if TYPE_CHECKING:
    from pyllm.tokenizers import Tokenizer

DTYPES = ("uint16", "uint32")
BATCH_DOCUMENTS = 1000
# A batch ends at this many characters too, so that long documents don't fill the memory.
BATCH_CHARACTERS = 4_000_000
REMEDY = "write it again from its text"
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Sidecar:
    """What the JSON beside a token file says.

    Attributes:
        dtype: of the ids, "uint16" or "uint32".
        count: number of ids, end-of-text ones included.
        documents: number of documents.
        vocab_size: every id is below it.
        end_of_text_id: follows each document.
        tokenizer_hash: `Tokenizer.hash` of the tokenizer that made the ids.
        sha256: of the .bin file, in hex.
    """

    dtype: str
    count: int
    documents: int
    vocab_size: int
    end_of_text_id: int
    tokenizer_hash: str
    sha256: str


class TokenFile:
    """An open token file: `tokens` is a read-only memory map, `sidecar` describes it."""

    def __init__(self, path: Path, tokens: np.memmap[Any, Any], sidecar: Sidecar) -> None:
        self.path = path
        self.tokens = tokens
        self.sidecar = sidecar

    @property
    def end_of_text_id(self) -> int:
        """The id that follows each document."""
        return self.sidecar.end_of_text_id

    def __len__(self) -> int:
        return self.sidecar.count

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> TokenFile:
        """Maps a token file into memory.

        Checks the sidecar, and the size of the file against it; with `verify` also the sha256 and
        that every id is in the vocabulary, which reads the whole file. Raises ValueError with the
        file, what was found and the remedy.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path}: a folder, where a token file (.bin) was expected")
        if not path.exists():
            raise ValueError(f"{path}: no such token file; {REMEDY}")
        sidecar = _read_sidecar(sidecar_path(path))
        itemsize = np.dtype(sidecar.dtype).itemsize
        size = path.stat().st_size
        if size != sidecar.count * itemsize:
            raise ValueError(
                f"{path}: {size:,} bytes, but its sidecar promises {sidecar.count:,} ids of "
                f"{itemsize} bytes; the file was cut or changed: {REMEDY}"
            )
        little_endian = np.dtype(sidecar.dtype).newbyteorder("<")
        tokens = np.memmap(path, dtype=little_endian, mode="r")
        if verify:
            _verify(path, tokens, sidecar)
        return cls(path, tokens, sidecar)

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless the ids were made by `tokenizer`."""
        if tokenizer.hash != self.sidecar.tokenizer_hash:
            raise ValueError(
                f"{self.path}: made by another tokenizer (hash "
                f"{self.sidecar.tokenizer_hash[:12]}, {self.sidecar.vocab_size} ids) than the one "
                f"given (hash {tokenizer.hash[:12]}, {tokenizer.vocab_size} ids); {REMEDY}"
            )


def sidecar_path(path: str | Path) -> Path:
    """Where the sidecar of a token file lies: `train.bin` has `train.json`."""
    return Path(path).with_suffix(".json")


def write_tokens(
    texts: Iterable[str], tokenizer: Tokenizer, path: str | Path, dtype: str | None = None
) -> TokenFile:
    """Tokenises documents into a token file and opens it.

    The texts are a stream: about a thousand are held at a time. The file is written under a
    temporary name, synced and renamed, so that a kill leaves no half file under the name.

    Args:
        texts: the documents; empty ones are left out, and special tokens in them are text.
        tokenizer: makes the ids, and gives the end-of-text id.
        path: of the .bin file; its folder is made where it is missing.
        dtype: "uint16" or "uint32"; by default the smaller one that holds the vocabulary.

    Raises ValueError for a vocabulary that does not fit `dtype`, a path that does not end in
    .bin or is a folder, and texts that are no str or hold no document.
    """
    path = Path(path)
    dtype = _choose_dtype(tokenizer.vocab_size, dtype)
    if path.suffix != ".bin" or path.is_dir():
        raise ValueError(f"{path}: expected the name of a file that ends in .bin")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    documents_of = check_texts(texts)
    count = documents = 0
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as stream:
            for batch in _batches(documents_of):
                ids: list[int] = []
                for document in tokenizer.encode_batch(batch):
                    ids.extend(document)
                    ids.append(tokenizer.end_of_text_id)
                block = np.asarray(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
                digest.update(block)
                stream.write(block)
                count += len(ids)
                documents += len(batch)
            stream.flush()
            os.fsync(stream.fileno())
        if documents == 0:
            raise ValueError(f"{path}: there is no document to write")
        sidecar = Sidecar(
            dtype=dtype,
            count=count,
            documents=documents,
            vocab_size=tokenizer.vocab_size,
            end_of_text_id=tokenizer.end_of_text_id,
            tokenizer_hash=tokenizer.hash,
            sha256=digest.hexdigest(),
        )
        # An old sidecar goes first: a kill in between leaves ids without one, which is an error
        # that is seen, and never new ids beside an old description.
        sidecar_path(path).unlink(missing_ok=True)
        temporary.replace(path)
        write_file(sidecar_path(path), json.dumps(dataclasses.asdict(sidecar), indent=2) + "\n")
    finally:
        temporary.unlink(missing_ok=True)
    return TokenFile.open(path)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in filter(None, texts):
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _choose_dtype(vocab_size: int, dtype: str | None) -> str:
    if dtype is None:
        return "uint16" if vocab_size <= 2**16 else "uint32"
    try:
        name = np.dtype(dtype).name
    except (TypeError, ValueError):
        name = shown(dtype)
    if name not in DTYPES:
        raise ValueError(f"token files hold {' or '.join(DTYPES)}, not {name}")
    dtype = name
    if vocab_size > np.iinfo(dtype).max + 1:
        raise ValueError(
            f"a vocabulary of {vocab_size:,} ids does not fit {dtype}, which holds "
            f"{np.iinfo(dtype).max + 1:,}; ask for uint32"
        )
    return dtype


def _read_sidecar(path: Path) -> Sidecar:
    if not path.is_file():
        raise ValueError(f"{path}: no such sidecar, without which ids mean nothing; {REMEDY}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # json's and unicode's are ValueErrors
        raise ValueError(f"{path}: not JSON ({one_line(error)}); {REMEDY}") from error
    wanted = {field.name: field.type for field in dataclasses.fields(Sidecar)}
    if not isinstance(fields, dict) or not wanted.keys() <= fields.keys():
        found = shown(sorted(fields)) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{path}: expected the keys {sorted(wanted)}, found {found}; {REMEDY}")
    sidecar = Sidecar(**{name: fields[name] for name in wanted})
    _check_sidecar(sidecar, path)
    return sidecar


def _check_sidecar(sidecar: Sidecar, path: Path) -> None:
    """What it says can be true, whatever the ids are."""
    if not isinstance(sidecar.dtype, str) or sidecar.dtype not in DTYPES:
        raise ValueError(
            f"{path}: dtype is {shown(sidecar.dtype)}; expected {' or '.join(DTYPES)}; {REMEDY}"
        )
    try:
        check_size("vocab_size", sidecar.vocab_size, 1, np.iinfo(sidecar.dtype).max + 1)
        check_size("end_of_text_id", sidecar.end_of_text_id, 0, sidecar.vocab_size - 1)
        check_size("count", sidecar.count, 1)
        check_size("documents", sidecar.documents, 1, sidecar.count)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {REMEDY}") from None
    for name in ("tokenizer_hash", "sha256"):
        value = getattr(sidecar, name)
        if not isinstance(value, str) or not SHA256.fullmatch(value):
            raise ValueError(
                f"{path}: {name} is {shown(value)}; expected 64 hexadecimal digits; {REMEDY}"
            )


def _verify(path: Path, tokens: np.memmap[Any, Any], sidecar: Sidecar) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    if digest.hexdigest() != sidecar.sha256:
        raise ValueError(
            f"{path}: its sha256 is {digest.hexdigest()[:12]}, the sidecar says "
            f"{sidecar.sha256[:12]}; the file was changed: {REMEDY}"
        )
    largest = int(tokens.max())
    if largest >= sidecar.vocab_size:
        raise ValueError(
            f"{path}: holds the id {largest}, outside its vocabulary of {sidecar.vocab_size}; "
            f"{REMEDY}"
        )

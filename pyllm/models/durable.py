"""Files that survive a kill, a full disk, a bad sector: written whole or not at all, and checked.

``manifest.json`` of a folder holds the sha256 of its files. safetensors checks its header only: a
flipped bit among the numbers, or the weights of another step, would load without a word.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyllm._durable import named_errors as named_errors
from pyllm._durable import sync
from pyllm._durable import write_file as write_file

MANIFEST = "manifest.json"


def write_folder(folder: Path, fill: Callable[[Path], None], manifest: bool = True) -> None:
    """Write a folder so that a kill at any moment leaves either the old one or the new one whole.

    ``fill`` writes into a temporary folder beside it; a manifest is added, unless other programs
    shall be free to change the files, and every file is synced; then the two are exchanged by
    renaming. :func:`settle_folder` finishes an exchange that was cut short.

    Raises:
        OSError: the disk is full or the place cannot be written; the old folder stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(folder.name + ".tmp")
    previous = folder.with_name(folder.name + ".old")
    settle_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        if manifest:
            files = [path for path in temporary.rglob("*") if path.is_file()]
            write_manifest(temporary, [path.relative_to(temporary).as_posix() for path in files])
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        settle_folder(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def settle_folder(folder: Path) -> None:
    """If a kill fell between the two renames of :func:`write_folder`, bring the old folder back."""
    previous = folder.with_name(folder.name + ".old")
    if not folder.exists() and previous.exists():
        previous.rename(folder)


def readable_folder(folder: Path) -> Path:
    """The folder itself, or the old one if a kill (or the trainer, right now) is between the two
    renames of :func:`write_folder`. A reader renames nothing: the writer may be at work."""
    previous = folder.with_name(folder.name + ".old")
    return previous if not folder.exists() and previous.exists() else folder


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # "I/O error: No space left on device (os error 28)", and nothing else to tell it by.
        number = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1] or number[2])
        raise OSError(code, os.strerror(code), str(path)) from None


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ValueError: missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a model folder holds model.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: missing, not JSON, or not an object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a model folder, such as runs/<name>/best")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # Notepad puts a BOM in front
    except (ValueError, RecursionError) as error:  # both json's and unicode's are ValueErrors
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write ``manifest.json``: the sha256 of these files of the folder."""
    digests = {name: _sha256(folder / name) for name in sorted(names)}
    write_file(folder / MANIFEST, json.dumps({"sha256": digests}, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, str] | None:
    """File names and their sha256; None where there is no manifest.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    digests = read_json(path).get("sha256")
    if not isinstance(digests, Mapping):
        raise ValueError(f"{path}: damaged: no object 'sha256' of files in it; restore it")
    return dict(digests)


def check_manifest(folder: Path, names: Iterable[str], remedy: str | None = None) -> None:
    """Compare files with the folder's manifest; a folder without one passes.

    Hashing takes time in proportion: 45 MB took 33 ms (a processor with SHA instructions).

    Args:
        folder: holds the manifest and the files.
        names: of the files, relative to the folder.
        remedy: what to do; by default to restore the file.

    Raises:
        ValueError: a file is missing, changed, or not of this folder.
    """
    names = list(names)
    digests = read_manifest(folder)
    if digests is None:
        return
    for name in names:
        path = folder / name
        if digests.get(name) == (found := _sha256(path) if path.is_file() else "no such file"):
            continue
        if read_manifest(folder) not in (digests, None):
            # The trainer has put a newer folder here in the meantime.
            return check_manifest(folder, names, remedy)
        raise ValueError(
            f"{path}: not the file that was saved here ({found[:12]}, while {MANIFEST} has "
            f"{str(digests.get(name, 'none'))[:12]}); "
            + (remedy or f"restore it, or, if you changed it yourself, delete {folder / MANIFEST}")
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()

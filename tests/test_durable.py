"""A file is written whole or not at all, and nothing is left beside it."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyllm._durable import write_file
from pyllm.data.token_file import sidecar_path, write_tokens
from pyllm.tokenizers import train_bpe

TOKENIZER = train_bpe(["the cat and the hat"] * 3, 275)


def write_text(path: Path) -> Path:
    write_file(path, "new")
    return path


def save_tokenizer(path: Path) -> Path:
    return TOKENIZER.save(path)


def write_sidecar(path: Path) -> Path:
    write_tokens(["the cat"], TOKENIZER, path.with_suffix(".bin"))
    return sidecar_path(path)


WRITERS = [write_text, save_tokenizer, write_sidecar]


@pytest.mark.parametrize("write", WRITERS)
def test_file_and_folder_are_synced_around_the_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append(f"to {Path(target).name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    write(tmp_path / "a.json")
    assert events[-3:] == ["file", "to a.json", "folder"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("write", WRITERS)
def test_a_failure_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], Path],
    step: str,
) -> None:
    path = tmp_path / "a.json"
    names = {write(path).name, *os.listdir(tmp_path)}
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space left on device"):
        write(path)
    left = set(os.listdir(tmp_path))
    assert left <= names
    if path.exists():  # the description of ids goes before new ids come
        assert path.read_bytes() == before
    else:
        assert write is write_sidecar


@pytest.mark.skipif(os.name == "nt", reason="no harmless way to ask for a process on Windows")
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    # One of a process that lives may be in use, and what is not ours to name is not ours.
    kept = {f"a.json.{os.getppid()}.tmp", "a.json.old.tmp", f"b.json.{dead}.tmp", "a.json"}
    for name in {*kept, f"a.json.{dead}.tmp"}:
        (tmp_path / name).write_text("half")
    write_file(tmp_path / "a.json", "new")
    assert set(os.listdir(tmp_path)) == kept


def test_a_sidecar_that_fails_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def only_ids(self: Path, target: Path) -> Path:
        if Path(target).suffix == ".json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", only_ids)
    with pytest.raises(OSError, match="a.json"):
        write_tokens(["the cat"], TOKENIZER, tmp_path / "a.bin")
    assert os.listdir(tmp_path) == ["a.bin"]

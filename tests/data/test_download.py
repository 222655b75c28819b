"""The two data scripts: what they write, and one line with exit code 2 when it goes wrong."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyllm.data import download, read_texts

ROOT = Path(__file__).parents[2]


def script(name, *flags, cwd, **env):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, flags)],
        env={**os.environ, "PYTHONPATH": path, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", ["train_tokenizer.py", "download_data.py"])
def test_help_is_quick(name, tmp_path):
    start = time.perf_counter()
    result = script(name, "--help", cwd=tmp_path)
    assert (result.returncode, "--out" in result.stdout) == (0, True)
    assert time.perf_counter() - start < 2
    assert script(name, "--no-such-flag", cwd=tmp_path).returncode == 2


def test_without_network_one_line_and_exit_2(tmp_path):
    result = script("download_data.py", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: roneneldan/TinyStories: split 'validation' could not")
    assert "check the name and the network" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_train_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("so it was and so it was\n" * 50)
    flags = ("--data", "a.txt", "--vocab-size", 270, "--out", "tok")
    result = script("train_tokenizer.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tok" / "tokenizer.json").is_file()
    result = script("train_tokenizer.py", "--data", "b.txt", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: b.txt: no such file")


def test_download_writes_both_files(tmp_path, monkeypatch):
    def fake(name, split, streaming):
        return (f"{split} {i}" for i in range(300))

    monkeypatch.setattr(download, "read_texts", fake)
    counts = download.download("tinystories", tmp_path / "t", max_documents=10)
    assert counts == {"valid.txt": 300, "train.txt": 10}
    assert list(read_texts(tmp_path / "t" / "train.txt")) == [f"train {i}" for i in range(10)]
    assert download.download("openwebtext", tmp_path / "o", 201) == {
        "valid.txt": 3,
        "train.txt": 198,
    }
    assert list(read_texts(tmp_path / "o" / "valid.txt")) == ["train 0", "train 100", "train 200"]
    assert len(list(tmp_path.rglob("*"))) == 6


def test_download_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'pile'; known are tinystories"):
        download.download("pile", tmp_path)
    for name in (None, ["tinystories"]):
        with pytest.raises(ValueError, match="unknown data set .*; known are tinystories"):
            download.download(name, tmp_path)
    for limit in (10.0, True, 10**20):
        with pytest.raises(
            ValueError, match="max_documents must be a whole number from 2 to .*, g"
        ):
            download.download("tinystories", tmp_path, max_documents=limit)
    with pytest.raises(
        ValueError, match="max_documents must be a whole number from 2 to .*, got 1"
    ):
        download.download("tinystories", tmp_path, 1)

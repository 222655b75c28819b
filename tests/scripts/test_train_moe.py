"""What is wrong with the data, the folders and the tokenizer of a run is told before the work."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyllm.train import TRAIN_PRESETS

from .conftest import Refusal, script_path


@pytest.fixture
def error(refusal: Refusal) -> Refusal:
    """Start a training with these flags, expect exit code 2; the one line it says."""

    def run(*flags: object) -> str:
        return refusal("train_moe", *flags)

    return run


def test_missing_data_leaves_no_run_folder(error: Refusal, tmp_path: Path) -> None:
    assert "absent.txt: no such file" in error("--data", "absent.txt", "--out", "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_as_data(error: Refusal, tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    assert "stories: a folder; give one of the files in it" in error("--data", "stories")


def test_empty_data(error: Refusal, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "empty.txt: the file is empty" in error("--data", "empty.txt")


def test_data_that_is_not_utf8(error: Refusal, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("Ein Bär.\n<|endoftext|>\nEin Hase.".encode("latin-1"))
    message = error("--data", "latin1.txt", "--out", "run")
    assert "latin1.txt: not UTF-8 at byte 5 (0xe4); convert the file to UTF-8" in message
    assert not (tmp_path / "run").exists()


def test_one_document_cannot_be_split(error: Refusal, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("One story only.")
    assert "or give a validation file" in error("--data", "one.txt")


def test_missing_validation_text_is_found_before_the_work(error: Refusal, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("A story.\n<|endoftext|>\nAnother one.\n")
    message = error("--data", "train.txt", "--valid", "absent.txt", "--out", "run")
    assert "absent.txt: no such file" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run(error: Refusal, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    message = error("--out", "run")
    assert "run already holds a run; give another --out, or --resume run" in message
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_resuming_what_is_no_run(error: Refusal) -> None:
    assert "nowhere: not a run folder (no config.json)" in error("--resume", "nowhere")


def test_missing_tokenizer(error: Refusal) -> None:
    assert "absent.json" in error("--tokenizer", "absent.json")


def test_text_shorter_than_one_sequence(error: Refusal, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A story.\n<|endoftext|>\nAnother one.\n")
    assert f"but one block needs {TRAIN_PRESETS['moe-tiny'].seq_len}" in error(
        "--data", "short.txt"
    )


@pytest.mark.parametrize("mode", [["--mode", "benchmark"], ["--mode=benchmark"]])
def test_the_benchmark_mode_is_the_other_script(mode: list[str], tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "train_moe.py"
    command = [sys.executable, str(script), "--preset", "moe-tinny", *mode, "--new-tokens", "4"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "unknown preset 'moe-tinny'; did you mean 'moe-tiny'" in result.stderr
    flags = [*command[:2], *mode, "--train.seed", "1"]
    result = subprocess.run(flags, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "Unrecognized options: --train.seed" in result.stderr


BENCHMARK = """
import os, sys, time
from dataclasses import dataclass
from pyllm._cli import run

@dataclass
class Config:
    new_tokens: int = 0

def main(config):
    print(os.getpid(), config.new_tokens, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    run(main, Config)
"""


@pytest.mark.skipif(os.name != "posix", reason="one process takes the other's place on POSIX only")
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, -signal.SIGTERM, "")],
)
def test_a_signal_reaches_the_benchmark(
    tmp_path: Path, number: signal.Signals, code: int, told: str
) -> None:
    """With a script in its place that waits: no traceback of a second process, and no orphan."""
    shutil.copy(script_path("train_moe"), tmp_path)
    (tmp_path / "benchmark.py").write_text(BENCHMARK)
    command = [sys.executable, "train_moe.py", "--mode", "benchmark", "--new-tokens", "4"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        pid, new_tokens = map(int, process.stdout.readline().split())
        try:
            assert (pid, new_tokens) == (process.pid, 4)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
            if pid != process.pid:  # the orphan that there should not be
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert (process.returncode, stderr) == (code, told)


def test_a_mode_that_there_is_not(error: Refusal) -> None:
    assert "Expected one of ('train', 'benchmark')" in error("--mode", "benchmrk")

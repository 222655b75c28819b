"""Two processes and one run folder: the second is refused in one line, the first goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest
from rich.console import Console

from pyllm.train import RunConfig, Trainer, run_training
from pyllm.train.lock import LOCK, run_lock
from pyllm.train.log import read_metrics

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_moe.py"
STEPS = 8

pytest.importorskip("fcntl", reason="no file locks on Windows")

# Holds the folder until its stdin is closed, or until it is killed.
HOLD = """
import sys
from pathlib import Path
from pyllm.train.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


@pytest.fixture
def config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_run: Callable[..., RunConfig]
) -> RunConfig:
    monkeypatch.setattr("pyllm.train.trainer.matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr("pyllm.train.run.STORY_TOKENS", 4)
    config = make_run(tmp_path, max_steps=STEPS, save_every=3, sample_every=0)
    return replace(config, out=str(tmp_path / "new" / "run"))


def test_a_second_process_is_refused_and_the_first_goes_on(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is started on the folder of a run in the middle of its seventh step."""
    run, done = Path(config.out), []
    step = Trainer.step

    def and_again(self: Trainer, number: int) -> dict[str, object]:
        if number == 6:
            for flags in (["--resume", str(run)], ["--out", str(run)]):
                command = [sys.executable, str(SCRIPT), *flags]
                done.append(subprocess.run(command, capture_output=True, text=True))
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", and_again)
    run_training(config, Console(quiet=True))
    assert len(done) == 2
    for second in done:
        assert second.returncode == 2
        assert second.stderr == (
            f"error: {run}: another process (pid {os.getpid()}) is training there; wait for its "
            "end, or stop it, or start a new run with another --out\n"
        )
    assert [row["step"] for row in read_metrics(run)] == list(range(1, STEPS + 1))
    assert not (run / LOCK).exists()


def test_a_new_run_is_refused_where_one_is_starting(config: RunConfig) -> None:
    """There is nothing but the lock yet."""
    run = Path(config.out)
    with hold(run) as first:
        with pytest.raises(ValueError, match=rf"{run}: another process \(pid {first.pid}\) is tr"):
            run_training(config, Console(quiet=True))
        assert os.listdir(run) == [LOCK]
        (run / LOCK).write_bytes(b"\xff\n")
        with pytest.raises(ValueError, match=f"{run}: another process is training there; wait"):
            run_training(config, Console(quiet=True))
    assert not run.parent.exists()
    run_training(config, Console(quiet=True))


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    with hold(tmp_path) as killed:
        killed.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).read_text() == str(killed.pid)
    with run_lock(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert os.listdir(tmp_path) == []


def test_a_failure_gives_the_folder_back(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one process, too; and no folder is left where no run began."""

    def fail(*arguments: object) -> None:
        raise ValueError("no such text")

    with monkeypatch.context() as patch:
        patch.setattr("pyllm.train.run.prepare_text", fail)
        for _ in range(2):
            with pytest.raises(ValueError, match="no such text"):
                run_training(config, Console(quiet=True))
    assert not Path(config.out).parent.exists()


def test_a_file_removed_between_opening_and_locking_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process before ends just then: a lock on its file would keep nobody out."""
    from pyllm.train import lock

    flock, calls = lock.fcntl.flock, list[int]()

    def slow(file: FileIO, kind: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(kind)
        flock(file, kind)

    monkeypatch.setattr(lock.fcntl, "flock", slow)
    with run_lock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="is training there"), run_lock(tmp_path):
            pass


@pytest.mark.parametrize("lacking", ["fcntl", "flock"])
def test_without_locks_training_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """Windows; and a network file system, whose answer is an OSError."""

    def unsupported(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    if lacking == "fcntl":
        monkeypatch.setattr("pyllm.train.lock.fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", unsupported)
    with run_lock(tmp_path / "run"), run_lock(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_full_disk_takes_no_number_and_the_lock_holds(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no file size limit on Windows")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with (
            run_lock(tmp_path),
            pytest.raises(ValueError, match="another process is training there"),
            run_lock(tmp_path),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_folder_is_held_before_the_text_is_prepared(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(*arguments: object) -> None:
        seen.append((Path(config.out) / LOCK).read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr("pyllm.train.run.prepare_text", look)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, Console(quiet=True))
    assert seen == [str(os.getpid())]

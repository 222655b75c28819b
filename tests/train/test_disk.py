"""A full disk, a read-only folder: one line, exit code 2, and all that was saved is still there."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from pyllm.models import durable
from pyllm.testing.damage import digests
from pyllm.train import RunConfig, Trainer, run_training
from pyllm.train.log import Board, GrowingFile, read_metrics
from pyllm.train.run_folder import saved_progress

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_moe.py"
STEPS = 12
CheckpointCall = Callable[[Trainer, Path], None]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllm.train.trainer.matmul_peak", lambda device, dtype: 1e11)


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., RunConfig]
) -> RunConfig:
    folder = tmp_path_factory.mktemp("disk")
    return make_run(folder, max_steps=STEPS, eval_every=4, save_every=3, sample_every=5)


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Path:
    run_training(config, Console(quiet=True))
    return Path(config.out)


def assert_same(folder: Path, whole: Path) -> None:
    rows = [read_metrics(folder), read_metrics(whole)]
    for row in rows[0] + rows[1]:
        del row["tok_per_sec"], row["mfu"]
    assert rows[0] == rows[1]
    assert (folder / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    for file in ("model.safetensors", "train_state/optimizer.safetensors"):
        ours, theirs = load_file(folder / "last" / file), load_file(whole / "last" / file)
        assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_every_failing_call_of_a_checkpoint_leaves_the_one_before(
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: CheckpointCall,
    load: CheckpointCall,
) -> None:
    """The n-th call that writes, syncs or renames fails, for every n there is."""
    trainer = make_trainer()
    save(trainer, tmp_path / "last")
    before = digests(tmp_path)
    trainer.step(0)
    calls = count = 0
    left = []

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return call

    while True:
        count, calls = count + 1, 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync))
            patch.setattr(durable, "save_file", failing(durable.save_file))
            for name in ("mkdir", "write_text", "open", "rename"):
                patch.setattr(Path, name, failing(getattr(Path, name)))
            try:
                save(trainer, tmp_path / "last")
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                break
        load(make_trainer(), tmp_path / "last")
        left.append(digests(tmp_path) == before)
    # The very last call syncs the folder above: the new checkpoint is in its place by then.
    assert len(left) > 20 and all(left[:-1]) and not left[-1]
    assert os.listdir(tmp_path) == ["last"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_an_error_of_safetensors_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    from safetensors import SafetensorError

    def fail(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: it said (os error {code})")

    monkeypatch.setattr(durable, "save_file", fail)
    with pytest.raises(OSError, match=rf"\[Errno {code}\] .*: '.*/x.safetensors'"):
        durable.save_tensors({}, tmp_path / "x.safetensors")


# What is written where: the function that fails, and the call of it.
WRITERS = {
    "tokens": ("pyllm.train.prepare.write_tokens", 1, None),
    "metrics": ("pyllm.train.log.GrowingFile.write", 2 + 2 * 8, 6),
    "tensorboard": ("pyllm.train.log.Board.scalars", 8, 6),
    "samples": ("pyllm.train.log.RunLog.sample", 2, 9),
    "checkpoint": ("pyllm.train.checkpoint.save_tensors", 4, 6),
    "pictures": ("pyllm.train.run.draw", 1, STEPS),
    "result": ("pyllm.train.run.write_file", 1, STEPS),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_ends_the_run_in_one_line_with_what_is_safe(
    config: RunConfig,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writer: str,
) -> None:
    name, number, step = WRITERS[writer]
    owner, _, attribute = name.rpartition(".")
    module, _, kind = owner.rpartition(".")
    place = sys.modules[owner] if owner in sys.modules else getattr(sys.modules[module], kind)
    original, counter = getattr(place, attribute), iter(range(1, 10**6))

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(counter) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the/file")
        return original(*args, **kwargs)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(place, attribute, full)
        with pytest.raises(OSError, match="the disk is full: the/file could not") as caught:
            run_training(replace(config, out=str(run)), Console(quiet=True))
    message = str(caught.value)
    assert "\n" not in message and f"make room and go on with --resume {run}" in message
    if step is None:
        assert "there was no checkpoint yet" in message
    else:
        assert f"the checkpoint of step {step} in {run / 'last'} is whole" in message
    run_training(RunConfig(resume=str(run)), Console(quiet=True))
    assert_same(run, whole)


def test_an_almost_full_disk_takes_half_a_row(tmp_path: Path) -> None:
    """A write may take a part of what it is given; the next one then fails."""
    resource = pytest.importorskip("resource", reason="no file size limit on Windows")
    file = GrowingFile(tmp_path / "metrics.jsonl")
    file.write(b'{"step": 1}\n')
    mark = file.mark()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large: '.*metrics.jsonl'"):
            file.write(b'{"step": 2}\n')
        with pytest.raises(OSError, match="File too large: '.*tfevents"):
            Board(tmp_path / "tensorboard", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").stat().st_size == 20
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert GrowingFile(tmp_path / "metrics.jsonl", mark).mark() == mark


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with these options; a mount needs rights."""
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_really_fills_up(
    config: RunConfig, whole: Path, small_disk: Callable[[str], Path]
) -> None:
    """The disk leaves room for less and less: every time it fills at another place."""
    disk = small_disk("size=16m")
    run, ballast = disk / "run", disk / "ballast"
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    failures = set()
    for share in (0.05, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15):
        free = shutil.disk_usage(disk).free
        with ballast.open("wb") as file:
            file.write(b"\0" * max(free - int(share * needed), 0))
        resume = (run / "config.json").exists()
        safe = saved_progress(run / "last")
        before = digests(run / "last")
        try:
            run_training(
                RunConfig(resume=str(run)) if resume else replace(config, out=str(run)),
                Console(quiet=True),
            )
        except (OSError, ValueError) as error:
            message = str(error)
            assert "\n" not in message
            assert "disk is full" in message or "No space left" in message, message
            failures.add(message)
            after = saved_progress(run / "last")
            if after is not None:
                assert f"the checkpoint of step {after.step} in {run / 'last'} is whole" in message
                if safe is not None and after.step == safe.step:
                    assert digests(run / "last") == before
            else:
                assert safe is None
        ballast.unlink()
    assert len(failures) > 3, failures
    run_training(RunConfig(resume=str(run)), Console(quiet=True))
    assert_same(run, whole)


def script(*flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, flags)], capture_output=True, text=True
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]


def test_the_script_on_a_full_disk(config: RunConfig, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=600k")
    data = ["--data", config.data.data, "--valid", config.data.valid]
    model = "--model.vocab-size 300 --model.n-layers 1 --model.d-model 32 --model.d-ff 32"
    train = "--train.max-steps 20 --train.batch-size 2 --train.seq-len 16 --train.device cpu"
    done = script(*data, *model.split(), *train.split(), "--out", disk / "run")
    assert_one_line(done, "the disk is full: ", str(disk / "run"), "make room and go on with")


def test_a_folder_that_cannot_be_written_costs_no_training(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path through a file fails for everyone, root too."""
    (tmp_path / "file").write_text("a file")

    def train(*args: Any) -> None:
        raise AssertionError("a tokenizer was trained first")

    monkeypatch.setattr("pyllm.train.prepare.train_bpe", train)
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises((ValueError, OSError), match="cannot write into"):
            run_training(replace(config, out=str(out)), Console(quiet=True))
    assert (tmp_path / "file").read_text() == "a file"


def test_a_read_only_disk(
    config: RunConfig,
    whole: Path,
    small_disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = small_disk("size=16m")
    shutil.copytree(whole, disk / "old")
    before = digests(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    def train(*args: Any) -> None:
        raise AssertionError("a tokenizer was trained first")

    monkeypatch.setattr("pyllm.train.prepare.train_bpe", train)
    for settings in (
        replace(config, out=str(disk / "run")),
        RunConfig(resume=str(disk / "old")),
    ):
        with pytest.raises(ValueError, match=r"cannot write into .*Read-only file system"):
            run_training(settings, Console(quiet=True))
    assert_one_line(script("--out", disk / "run"), "cannot write into", "Read-only file system")
    assert digests(disk) == before


def test_nothing_of_an_old_run_is_overwritten(
    config: RunConfig, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = digests(run)
    with pytest.raises(
        ValueError, match=f"already holds a run; give another --out, or --resume {run}"
    ):
        run_training(replace(config, out=str(run)), Console(quiet=True))
    assert digests(run) == before
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"already holds last of a run, without its config.json"):
        run_training(replace(config, out=str(run)), Console(quiet=True))
    with pytest.raises(ValueError, match="not a run folder"):
        run_training(RunConfig(resume=str(run)), Console(quiet=True))
    assert digests(run) == {k: v for k, v in before.items() if k != "config.json"}


def test_json_of_the_result_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    durable.write_file(path, json.dumps({"val_loss": 1.0}))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*result.json'"):
        durable.write_file(path, json.dumps({"val_loss": 2.0}))
    assert os.listdir(tmp_path) == ["result.json"]
    assert json.loads(path.read_text()) == {"val_loss": 1.0}

"""Ctrl-C and SIGTERM at any moment: a checkpoint, a summary, an exit code; then it is resumed."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from pyllm.train import RunConfig, run_training
from pyllm.train.interrupt import Terminated
from pyllm.train.log import read_metrics
from pyllm.train.run_folder import saved_progress

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_moe.py"
STEPS = 12
# Where the signal comes, the call of it that is hit, and the step of the checkpoint it leaves.
MOMENTS = {
    "pyllm.train.prepare.train_bpe": (1, None),
    "pyllm.train.prepare.write_tokens": (2, None),
    "pyllm.train.run.fits_val_bpb": (1, None),
    "pyllm.train.trainer.Trainer.step": (7, 7),
    "pyllm.train.trainer.Trainer.validate": (2, 8),
    "pyllm.train.trainer.Trainer.sample": (1, 5),
    "pyllm.train.trainer.save_checkpoint": (2, 7),
    "pyllm.train.run.draw": (1, STEPS),
    "pyllm.train.run.bits_per_byte": (1, STEPS),
    "pyllm.train.run.report": (1, STEPS),
}
SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., RunConfig]
) -> RunConfig:
    folder = tmp_path_factory.mktemp("interrupts")
    return make_run(folder, max_steps=STEPS, eval_every=4, save_every=6, sample_every=5)


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Path:
    run_training(config, Console(quiet=True))
    return Path(config.out)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllm.train.trainer.matmul_peak", lambda device, dtype: 1e11)


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def signal_at(patch: pytest.MonkeyPatch, moment: str, call: int, act: Callable[[], None]) -> None:
    """Let `act` happen in the middle of a call: after its work, before its result is used."""
    owner, _, name = moment.rpartition(".")
    module, _, kind = owner.rpartition(".")
    place: Any = sys.modules[owner] if owner in sys.modules else getattr(sys.modules[module], kind)
    original, counter = getattr(place, name), iter(range(1, 10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if next(counter) == call:
            act()
        return result

    patch.setattr(place, name, wrapped)


def run_and_stop(config: RunConfig, stop: type[BaseException]) -> str:
    said = io.StringIO()
    with pytest.raises(stop):
        run_training(config, Console(file=said, width=200))
    return said.getvalue()


def assert_same(folder: Path, whole: Path) -> None:
    rows = []
    for each in (folder, whole):
        every = read_metrics(each)
        rows.append(
            [{k: v for k, v in r.items() if k not in ("tok_per_sec", "mfu")} for r in every]
        )
    assert rows[0] == rows[1]
    assert (folder / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    for file in ("last/model.safetensors", "last/train_state/optimizer.safetensors"):
        ours, theirs = load_file(folder / file), load_file(whole / file)
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    stories = [json.loads((each / "result.json").read_text())["story"] for each in (folder, whole)]
    assert stories[0] == stories[1]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_the_run_and_resume_finishes_it(
    config: RunConfig,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    number: int,
) -> None:
    call, step = MOMENTS[moment]
    config = replace(config, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        signal_at(patch, moment, call, lambda: signal.raise_signal(number))
        said = run_and_stop(config, SIGNALS[number])
    begun = (tmp_path / "run" / "config.json").exists()
    if not begun:
        assert "stopped before the run began; nothing of it is kept" in said
        run_training(config, Console(quiet=True))
    else:
        progress = saved_progress(tmp_path / "run" / "last")
        if step is None:
            assert progress is None and "stopped before the first checkpoint" in said
        else:
            assert progress and progress.step == step
            assert f"stopped: {step} of {STEPS} steps are saved" in said
            assert "0 skipped" in said and "train_loss" in said
            assert (tmp_path / "run" / "loss.png").is_file()
        assert f"--resume {tmp_path / 'run'}" in said
        run_training(RunConfig(resume=str(tmp_path / "run")), Console(quiet=True))
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("moment", ["step", "validate", "save"])
def test_a_second_ctrl_c_stops_at_once_and_harms_nothing(
    config: RunConfig,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    config = replace(config, out=str(tmp_path / "run"))
    places = {
        "step": ("pyllm.train.muon.Muon.step", 8),
        "validate": ("pyllm.train.trainer.Trainer.validate", 2),
        "save": ("pyllm.train.checkpoint.save_tensors", 3),  # half of `last` is there
    }

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        signal_at(patch, *places[moment], twice)
        said = run_and_stop(config, KeyboardInterrupt)
    assert ("of 12 steps are saved" in said) and "7 of" not in said
    assert not list((tmp_path / "run").glob("*.tmp"))
    run_training(RunConfig(resume=str(tmp_path / "run")), Console(quiet=True))
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_codes(config: RunConfig, tmp_path: Path, number: int, code: int) -> None:
    """The script, with the signal from outside, as a terminal or a batch system sends it."""
    model = {"vocab-size": 300, "n-layers": 1, "d-model": 16, "d-ff": 16}
    train = {"max-steps": 100_000, "batch-size": 2, "seq-len": 16, "save-every": 10}
    train |= {"eval-every": 100_000, "device": "cpu", "dtype": "float32", "threads": 1}
    flags = [f"--model.{name}={value}" for name, value in model.items()]
    flags += [f"--train.{name}={value}" for name, value in train.items()]
    flags += ["--data", config.data.data, "--valid", config.data.valid]
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run" / "last").exists():
        assert run.poll() is None, run.communicate()
    os.kill(run.pid, number)
    said, complained = run.communicate(timeout=60)
    assert run.returncode == code, complained
    assert "steps are saved" in said and "--resume" in said
    assert "Traceback" not in complained
    assert "stopping after this step, with a checkpoint" in complained

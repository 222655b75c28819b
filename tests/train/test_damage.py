"""Each file of a run is cut, changed, emptied, removed, swapped: --resume refuses it, or it ends
as the undamaged run does. Nothing that was saved is lost by trying."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pyllm.models import load_model
from pyllm.models.durable import MANIFEST, write_manifest
from pyllm.testing.damage import digests
from pyllm.train import RunConfig, Trainer, run_training
from pyllm.train.checkpoint import OPTIMIZER, STATE, WEIGHTS
from pyllm.train.log import read_metrics

STEPS, STOP = 8, 5
CheckpointCall = Callable[[Trainer, Path], None]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllm.train.trainer.matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr("pyllm.train.run.STORY_TOKENS", 4)
    monkeypatch.setattr("pyllm.train.run.draw", lambda folder: None)
    monkeypatch.setattr("pyllm.train.run_folder.draw", lambda folder: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., RunConfig]) -> Path:
    """`whole`; `stopped` after its fifth step; `other`, stopped there too, with another seed."""
    folder = tmp_path_factory.mktemp("damage")
    config = make_run(folder, max_steps=STEPS, eval_every=3, save_every=5, sample_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyllm.train.trainer.matmul_peak", lambda device, dtype: 1e11)
        patch.setattr("pyllm.train.run.STORY_TOKENS", 4)
        run_training(config, Console(quiet=True))
        step = Trainer.step

        def stopped(self: Trainer, number: int) -> dict[str, Any]:
            if number == STOP + 1:  # after the checkpoint and one step more
                raise KeyboardInterrupt
            return step(self, number)

        patch.setattr(Trainer, "step", stopped)
        for name, seed in (("stopped", 0), ("other", 1)):
            settings = replace(
                config, out=str(folder / name), train=replace(config.train, seed=seed)
            )
            with pytest.raises(KeyboardInterrupt):
                run_training(settings, Console(quiet=True))
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run, to damage."""
    return Path(shutil.copytree(runs / "stopped", tmp_path / "run"))


def assert_same(folder: Path, whole: Path) -> None:
    rows = [read_metrics(folder), read_metrics(whole)]
    for row in rows[0] + rows[1]:
        del row["tok_per_sec"], row["mfu"]
    assert rows[0] == rows[1][-len(rows[0]) :] and len(rows[0]) >= STEPS - STOP
    for file in ("last/" + WEIGHTS, "last/" + OPTIMIZER, "best/" + WEIGHTS):
        ours, theirs = load_file(folder / file), load_file(whole / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file


def flip(old: bytes, other: bytes) -> bytes:
    at = len(old) * 2 // 3
    return old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :]


HARMS: dict[str, Callable[[bytes, bytes], Any]] = {
    "cut": lambda old, other: old[: len(old) * 2 // 3],
    "flipped": flip,
    "emptied": lambda old, other: b"",
    "removed": lambda old, other: None,
    "a folder": lambda old, other: {},
    "of another run": lambda old, other: other,
}
CHECKPOINT = (WEIGHTS, "config.json", "tokenizer.json", OPTIMIZER, STATE, MANIFEST)
FILES = (
    "config.json",
    MANIFEST,
    "metrics.jsonl",
    "samples.txt",
    *(f"tokens/{name}" for name in ("train.bin", "train.json", "valid.bin", "valid.json")),
    "tokens/tokenizer.json",
    *(f"last/{name}" for name in CHECKPOINT),
    *(f"best/{name}" for name in CHECKPOINT),
)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_run_is_refused_or_ends_as_the_whole_one(
    runs: Path, run: Path, name: str, harm: str
) -> None:
    path = run / name
    old = path.read_bytes()
    new = HARMS[harm](old, (runs / "other" / name).read_bytes())
    path.unlink()
    if isinstance(new, dict):
        path.mkdir()
    elif new is not None:
        path.write_bytes(new)
    before = digests(run)
    try:
        run_training(RunConfig(resume=str(run)), Console(quiet=True))
    except (ValueError, OSError) as error:
        message = str(error)
        assert "\n" not in message
        named = Path(name).stem
        assert str(run) in message and named in message, message
        after = digests(run)
        # The log file that could not be opened comes last; then the others were opened before.
        for file in before:
            if file not in ("metrics.jsonl", "samples.txt") and file in after:
                assert after[file] == before[file], file
        assert {file for file in before if file.startswith(("last", "best"))} <= after.keys()
        return
    # Token files are made again; of a manifest, a line may be hit that nobody reads.
    assert new is None or new == old or name.startswith("tokens/") or name.endswith(MANIFEST)
    assert_same(run, runs / "whole")


def refused(run: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        run_training(RunConfig(resume=str(run)), Console(quiet=True))
    assert "\n" not in str(caught.value)


def test_a_damaged_last_can_be_replaced_by_best(runs: Path, run: Path) -> None:
    weights = run / "last" / WEIGHTS
    weights.write_bytes(flip(weights.read_bytes(), b""))
    refused(run, f"{WEIGHTS}: not the file .*; or move .*/last away to go on from .*/best, step 6")
    shutil.move(run / "last", run.parent / "damaged")
    run_training(RunConfig(resume=str(run)), Console(quiet=True))
    assert_same(run, runs / "whole")


def test_with_both_damaged_the_way_out_is_the_beginning(runs: Path, run: Path) -> None:
    for name in ("last", "best"):
        (run / name / OPTIMIZER).unlink()
    refused(run, "optimizer.safetensors: not the file .*no such file.*start again at step 0")
    for name in ("last", "best"):
        shutil.rmtree(run / name)
    run_training(RunConfig(resume=str(run)), Console(quiet=True))
    assert_same(run, runs / "whole")


def test_a_lost_best_is_made_anew_and_said(run: Path) -> None:
    shutil.rmtree(run / "best")
    console = Console(record=True, quiet=False, width=300, file=open("/dev/null", "w"))  # noqa: SIM115
    run_training(RunConfig(resume=str(run)), console)
    console.file.close()
    assert "is gone (val_loss" in console.export_text()
    load_model(run / "best")


def test_a_checkpoint_of_another_run_is_refused(runs: Path, run: Path) -> None:
    """The whole folder, which belongs together in itself."""
    shutil.rmtree(run / "last")
    shutil.copytree(runs / "other" / "last", run / "last")
    refused(run, r"last: made by another run \(train.seed was 1, here 0\)")


def test_changed_settings_are_refused_by_name(run: Path) -> None:
    """Without the manifest of the run too: the checkpoint knows its settings."""
    (run / MANIFEST).unlink()
    path = run / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    refused(run, r"made by another run \(model.rope_theta was 10000.0, here 10001.0\)")


def test_a_text_that_changed_is_refused(runs: Path, run: Path, tmp_path: Path) -> None:
    """Lost token files are made again from the text, if it is still the same."""
    shutil.rmtree(run / "tokens")
    text = runs / "train.txt"
    old = text.read_text()
    text.write_text(old.replace("the", "The", 1))
    try:
        refused(run, "the text has changed since; start a new run")
    finally:
        text.write_text(old)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (STATE, b"{", "not a JSON file"),
        (STATE, b"{}", "made by another run"),
        (OPTIMIZER, b"\x08\0\0\0\0\0\0\0{}      ", "not the state of a training run"),
        (OPTIMIZER, b"", "damaged or not a safetensors file"),
        (WEIGHTS, b"\x08\0\0\0\0\0\0\0{}      ", "missing tensors"),
    ],
)
def test_what_the_manifest_vouches_for_is_still_checked(
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    save: CheckpointCall,
    load: CheckpointCall,
    name: str,
    content: bytes,
    message: str,
) -> None:
    trainer = make_trainer()
    trainer.step(0)
    save(trainer, tmp_path / "last")
    (tmp_path / "last" / name).write_bytes(content)
    write_manifest(tmp_path / "last", [each for each in CHECKPOINT if each != MANIFEST])
    with pytest.raises(ValueError, match=message):
        load(make_trainer(), tmp_path / "last")


def test_a_checkpoint_without_a_manifest_is_a_model_but_not_resumed(
    make_trainer: Callable[..., Trainer], tmp_path: Path, save: CheckpointCall, load: CheckpointCall
) -> None:
    save(make_trainer(), tmp_path / "last")
    (tmp_path / "last" / MANIFEST).unlink()
    load_model(tmp_path / "last")
    with pytest.raises(ValueError, match="no manifest.json, so nothing tells whether its files"):
        load(make_trainer(), tmp_path / "last")


def test_misshapen_optimizer_state_is_refused(
    make_trainer: Callable[..., Trainer], tmp_path: Path, save: CheckpointCall, load: CheckpointCall
) -> None:
    trainer = make_trainer()
    trainer.step(0)
    state = trainer.optimizers[1].state
    state[next(iter(state))]["momentum_buffer"] = torch.zeros(3, 2)
    save(trainer, tmp_path / "last")
    with pytest.raises(ValueError, match=r"1.0.momentum_buffer has shape \(3, 2\) and .*expected"):
        load(make_trainer(), tmp_path / "last")

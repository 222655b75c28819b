"""A run that is killed and resumed leaves bit for bit what an uninterrupted one leaves.

Each way to die is a program of its own, which ends itself with SIGKILL (or gets Ctrl-C) at a
chosen point; all of them run side by side.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pyllm.data import write_stories
from pyllm.train import RunConfig, TrainConfig, run_training
from pyllm.train.log import GrowingFile, read_metrics
from pyllm.train.run_folder import read_run_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_moe.py"
STEPS = 16
FLAGS = f"""
--model.vocab-size 300 --model.max-seq-len 1024 --model.n-layers 2 --model.d-model 32
--model.d-ff 32 --model.n-experts 4 --train.max-steps {STEPS} --train.batch-size 4
--train.accumulation 2 --train.seq-len 32 --train.warmup-steps 4 --train.learning-rate 1e-2
--train.eval-every 3 --train.eval-tokens 256 --train.save-every 5 --train.sample-every 7
--train.dtype float32 --train.device cpu --train.threads 1
""".split()

# The script, but for one call that is replaced by one that dies.
DYING_RUN = """
import os, runpy, signal, sys
from pathlib import Path

from pyllm.data import token_file
from pyllm.tokenizers import Tokenizer
from pyllm.train import Muon, Trainer, checkpoint

where, script, *flags = sys.argv[1:]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, number, act):
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


if where == "before_the_tokenizer_is_there":
    at_call(Tokenizer, "save", 1, die)
elif where == "before_the_sidecar_is_there":
    at_call(token_file, "write_file", 2, die)
elif where == "between_checkpoints":
    at_call(Trainer, "step", 9, die)
elif where == "in_the_middle_of_a_checkpoint":
    save_tensors = checkpoint.save_tensors

    def half_a_file(tensors, path):
        save_tensors(tensors, path)
        if "last.tmp" in str(path) and Path(path).parents[2].joinpath("last").exists():
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    checkpoint.save_tensors = half_a_file
elif where == "between_two_renames":
    rename = Path.rename

    def rename_and_die(self, target):
        rename(self, target)
        if self.name == "last":
            die()

    Path.rename = rename_and_die
elif where == "ctrl_c_in_a_step":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Muon's turn is second: AdamW's half of the step is done by then.
    at_call(Muon, "step", 8, lambda: signal.raise_signal(signal.SIGINT))

sys.argv = [script, *flags]
runpy.run_path(script, run_name="__main__")
"""
# Exit code, and the step the resumed run begins with.
DEATHS = {
    "before_the_tokenizer_is_there": (-signal.SIGKILL, 0),
    "before_the_sidecar_is_there": (-signal.SIGKILL, 0),
    "between_checkpoints": (-signal.SIGKILL, 5),
    "in_the_middle_of_a_checkpoint": (-signal.SIGKILL, 5),
    "between_two_renames": (-signal.SIGKILL, 5),
    "ctrl_c_in_a_step": (130, 8),
}

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on Windows")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run folders of all the dead, and `whole`, which nobody touched."""
    folder = tmp_path_factory.mktemp("runs")
    for name, count in (("train", 60), ("valid", 6)):
        stories = write_stories(count, 0, name)
        text = "".join(f"{story}\n<|endoftext|>\n" for story in stories)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    data = ["--data", str(folder / "train.txt"), "--valid", str(folder / "valid.txt")]
    running = {}
    for name in ("whole", *DEATHS):
        command = [sys.executable, "-c", DYING_RUN, name, str(SCRIPT), *data, *FLAGS]
        running[name] = subprocess.Popen(
            [*command, "--out", str(folder / name)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    for name, process in running.items():
        output = process.communicate(timeout=300)[0]
        expected = DEATHS[name][0] if name in DEATHS else 0
        assert process.returncode == expected, f"{name}: {output}"
    return folder


def rows_without_times(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in ("tok_per_sec", "mfu")}
        for row in read_metrics(folder)
    ]


def assert_same_run(folder: Path, whole: Path) -> None:
    assert rows_without_times(folder) == rows_without_times(whole)
    for file in (
        "last/model.safetensors",
        "last/train_state/optimizer.safetensors",
        "best/model.safetensors",
    ):
        ours, theirs = load_file(folder / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{file}: {name}"
    results = [json.loads((place / "result.json").read_text()) for place in (folder, whole)]
    for name in ("val_loss", "val_bpb", "story"):
        assert results[0][name] == results[1][name]


def test_the_whole_run(runs: Path) -> None:
    rows = read_metrics(runs / "whole")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6, 9, 12, 15, 16]
    for name in ("loss.png", "expert_load.png", "samples.txt", "result.json"):
        assert (runs / "whole" / name).is_file()
    assert any((runs / "whole" / "tensorboard").iterdir())


@pytest.mark.parametrize("death", DEATHS)
def test_resumed_equals_uninterrupted(runs: Path, death: str) -> None:
    folder, step = runs / death, DEATHS[death][1]
    state = folder / "last" / "train_state" / "state.json"
    if death == "between_two_renames":
        assert not state.exists(), "it died where the name is free"
    elif step:
        assert json.loads(state.read_text())["progress"]["step"] == step
    if death == "between_checkpoints":  # once as a user does it
        command = [sys.executable, str(SCRIPT), "--resume", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "at step 5" in " ".join(done.stdout.split())
    else:
        run_training(RunConfig(resume=str(folder)), Console(quiet=True))
    assert_same_run(folder, runs / "whole")
    leftovers = {path.name for path in folder.iterdir() if path.suffix in (".tmp", ".old")}
    assert not leftovers


def test_resuming_a_finished_run_changes_nothing(runs: Path) -> None:
    before = rows_without_times(runs / "whole")
    run_training(RunConfig(resume=str(runs / "whole")), Console(quiet=True))
    assert rows_without_times(runs / "whole") == before


def test_the_saved_settings_are_the_chosen_ones(runs: Path) -> None:
    train = json.loads((runs / "whole" / "config.json").read_text())["train"]
    assert (train["device"], train["dtype"], train["threads"]) == ("cpu", "float32", 1)


def test_other_flags_beside_resume_are_refused(runs: Path) -> None:
    config = RunConfig(resume=str(runs / "whole"), train=TrainConfig(max_steps=99))
    with pytest.raises(ValueError, match="leave the other flags out"):
        run_training(config, Console(quiet=True))


def test_resumed_at_the_default_precision_and_threads(runs: Path, tmp_path: Path) -> None:
    """What a user has: the machine's own dtype, all cores; killed after a checkpoint."""
    data = ["--data", str(runs / "train.txt"), "--valid", str(runs / "valid.txt")]
    flags = FLAGS[: FLAGS.index("--train.dtype")]
    for name, death in (("whole", "whole"), ("dead", "between_checkpoints")):
        done = subprocess.run(
            [sys.executable, "-c", DYING_RUN, death, str(SCRIPT), *data, *flags]
            + ["--out", str(tmp_path / name)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if name == "whole" else -signal.SIGKILL), done.stderr
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--resume", str(tmp_path / "dead")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "dead", tmp_path / "whole")


def test_what_was_written_after_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = GrowingFile(path)
    file.write(b'{"step": 1}\n{"step": 2}\n')
    mark = file.mark()
    file.write(b'{"step": 3}\n{"step": 4, "trai')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3], "half a row is none"
    again = GrowingFile(path, mark)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    again.write(b'{"step": 3}\n')
    assert GrowingFile(path, again.mark()).mark() == again.mark()
    GrowingFile(path)
    assert path.read_bytes() == b"", "a run that has no checkpoint begins with no rows"


def test_settings_of_a_run_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a run folder \(no config.json\)"):
        read_run_config(tmp_path)
    for content in ("{", "[]", "{}", '{"preset": "x", "model": {"depth": 1}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="not the settings of a run"):
            read_run_config(tmp_path)

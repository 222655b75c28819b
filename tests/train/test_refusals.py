"""A run that is refused before its first step leaves nothing; what is no run says what it is."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pyllm.data import write_stories
from pyllm.models import ModelConfig
from pyllm.tokenizers import train_bpe
from pyllm.train import DataConfig, RunConfig, TrainConfig, Trainer, run_training
from pyllm.train.prepare import tokenizer_place
from pyllm.train.run_folder import require_run_folder

MODEL = ModelConfig(vocab_size=300, max_seq_len=1024, n_layers=1, d_model=16, d_ff=16)


@pytest.fixture
def config(tmp_path: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run into ``out``, which is there already and holds a note."""
    monkeypatch.setattr("pyllm.train.trainer.matmul_peak", lambda device, dtype: 1e11)
    for name, count in (("train", 30), ("valid", 2)):
        text = "\n<|endoftext|>\n".join(write_stories(count, 0, name))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    train_bpe(write_stories(30, 0), 300).save(tmp_path / "tokenizer.json")
    (tmp_path / "bad.txt").write_bytes(b"A story.\n<|endoftext|>\nB\xff")
    (tmp_path / "one.txt").write_text("One story.")
    (tmp_path / "short.txt").write_text("A.\n<|endoftext|>\nB.")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    data = DataConfig(data=str(tmp_path / "train.txt"), valid=str(tmp_path / "valid.txt"))
    train = TrainConfig(**quick | {"threads": 1})
    return RunConfig(out=str(tmp_path / "out"), model=MODEL, data=data, train=train)


def refused(config: RunConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        run_training(config, Console(quiet=True))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"data": "bad.txt", "tokenizer": "tokenizer.json"}, "bad.txt: not UTF-8 at byte 24"),
        ({"valid": "bad.txt"}, "bad.txt: not UTF-8 at byte 24"),
        ({"data": "short.txt"}, r"short.txt: .* block needs 32; .*--data.*--train.seq-len"),
        ({"data": "one.txt", "valid": ""}, r"one.txt: found 1 different .*file \(--valid\)"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_refused_text_leaves_no_run(
    config: RunConfig, tmp_path: Path, data: dict[str, Any], message: str, there: bool
) -> None:
    out = Path(config.out)
    if not there:
        shutil.rmtree(out)
    places: dict[str, Any] = {name: file and str(tmp_path / file) for name, file in data.items()}
    wrong = replace(config, data=replace(config.data, **places))
    for _ in range(2):
        refused(wrong, message)
    assert (os.listdir(out) == ["note"]) if there else not out.exists()


def test_a_batch_too_large_is_refused_before_the_text(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: object) -> None:
        raise AssertionError("a tokenizer was trained first")

    monkeypatch.setattr("pyllm.train.run.prepare_text", prepare)
    train = replace(config.train, batch_size=10**7)
    refused(
        replace(config, train=train),
        "--train.batch-size 10,000,000 x --train.seq-len 32 is too large: .*268,435,456",
    )


@pytest.mark.parametrize(
    ("error", "step", "kept"),
    [
        (ValueError("no"), 0, False),
        (ValueError("no"), 1, True),  # one row of metrics
        (OSError(errno.EIO, "no"), 0, True),
        (KeyboardInterrupt(), 0, True),
    ],
)
def test_only_a_value_error_before_the_first_step_takes_a_run_back(
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    step: int,
    kept: bool,
) -> None:
    original = Trainer.step

    def fail(self: Trainer, number: int) -> dict[str, Any]:
        if number == step:
            raise error
        return original(self, number)

    monkeypatch.setattr(Trainer, "step", fail)
    with pytest.raises(type(error)):
        run_training(config, Console(quiet=True))
    out = Path(config.out)
    assert (out / "config.json").exists() == (out / "tokens").exists() == kept
    assert (out / "note").read_text() == "mine" and (kept or os.listdir(out) == ["note"])
    if kept:  # a resumed run is never taken back
        before = sorted(os.listdir(out))
        monkeypatch.setattr("pyllm.train.run.prepare_text", lambda *arguments: 1 / len(""))
        with pytest.raises(ZeroDivisionError):
            run_training(RunConfig(resume=str(out)), Console(quiet=True))
        monkeypatch.setattr("pyllm.train.run.prepare_text", lambda *arguments: int("no"))
        refused(RunConfig(resume=str(out)), "no")
        assert sorted(os.listdir(out)) == before


@pytest.mark.parametrize("name", ["tokens", "samples.txt", "tensorboard", "manifest.json"])
def test_what_a_run_would_write_over_is_refused(config: RunConfig, name: str) -> None:
    (Path(config.out) / name).write_text("mine")
    refused(config, f"out already holds {name} of a run, without its config.json; give another")
    assert (Path(config.out) / name).read_text() == "mine"


def test_what_is_no_run_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate("dbac"):
        run = tmp_path / "runs" / name
        (run / "last").mkdir(parents=True)
        for file in ("config.json", "manifest.json", "last/config.json", "last/model.safetensors"):
            (run / file).write_text("{}")
        os.utime(run / "config.json", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    for given, message in (
        ("runs/a/last", "^runs/a/last: a checkpoint of a run, not the run; give --resume runs/a$"),
        ("runs/a/config.json", "a part of a run, not the run; give --resume runs/a$"),
        ("runs/a/last/config.json", "a part of a run, not the run; give --resume runs/a$"),
        ("runs", "^runs: a folder of runs; .*newest first: runs/d, runs/b, runs/a$"),
        ("runs/e", r"^runs/e: not a run folder \(no config.json\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run_training(RunConfig(resume=given), Console(quiet=True))
    require_run_folder(Path("runs/a"))
    monkeypatch.chdir(tmp_path / "runs" / "a" / "last")
    with pytest.raises(ValueError, match=f"a checkpoint of a run.*--resume {tmp_path}/runs/a$"):
        require_run_folder(Path("."))
    shutil.move(tmp_path / "runs" / "a" / "last", tmp_path / "model")
    with pytest.raises(ValueError, match="model: a model without its run"):
        require_run_folder(tmp_path / "model")


def test_the_tokenizer_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    file = tmp_path / "tokens" / "tokenizer.json"
    assert tokenizer_place(str(tmp_path)) == tmp_path
    file.touch()
    assert tokenizer_place(str(tmp_path)) == file
    assert tokenizer_place(str(file)) == file
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_place(str(tmp_path)) == tmp_path

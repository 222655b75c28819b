"""What a user gets wrong is answered in one line with the remedy and exit code 2."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyllm.train import TRAIN_PRESETS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_moe.py"
Answer = Callable[..., str]


@pytest.fixture
def error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Answer:
    """Run the script with these flags, expect exit code 2, and return the one line it says."""

    def run(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert stop.value.code == 2
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
        assert "Traceback" not in captured.out
        return lines[0]

    return run


def test_unknown_preset(error: Answer) -> None:
    assert "unknown preset 'moe-tinny'; did you mean 'moe-tiny'?" in error("--preset", "moe-tinny")


def test_missing_data_leaves_no_run_folder(error: Answer, tmp_path: Path) -> None:
    assert "absent.txt: no such file" in error("--data", "absent.txt", "--out", "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_as_data(error: Answer, tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    assert "stories: a folder; give one of the files in it" in error("--data", "stories")


def test_empty_data(error: Answer, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "empty.txt: the file is empty" in error("--data", "empty.txt")


def test_data_that_is_not_utf8(error: Answer, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("Ein Bär.\n<|endoftext|>\nEin Hase.".encode("latin-1"))
    message = error("--data", "latin1.txt", "--out", "run")
    assert "latin1.txt: not UTF-8 at byte 5 (0xe4); convert the file to UTF-8" in message
    assert not (tmp_path / "run").exists()


def test_one_document_cannot_be_split(error: Answer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("One story only.")
    assert "or give a validation file" in error("--data", "one.txt")


def test_missing_validation_text_is_found_before_the_work(error: Answer, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("A story.\n<|endoftext|>\nAnother one.\n")
    message = error("--data", "train.txt", "--valid", "absent.txt", "--out", "run")
    assert "absent.txt: no such file" in message
    assert not (tmp_path / "run").exists()


def test_validation_text_without_training_text(error: Answer, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("A story.")
    assert "--valid is given without --data" in error("--valid", "valid.txt")


def test_a_folder_that_holds_a_run(error: Answer, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    message = error("--out", "run")
    assert "run already holds a run; give another --out, or --resume run" in message
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_resuming_what_is_no_run(error: Answer) -> None:
    assert "nowhere: not a run folder (no config.json)" in error("--resume", "nowhere")


def test_missing_tokenizer(error: Answer) -> None:
    assert "absent.json" in error("--tokenizer", "absent.json")


def test_sequences_longer_than_the_context(error: Answer) -> None:
    message = error(
        "--n-stories",
        50,
        "--model.vocab-size",
        300,
        "--model.max-seq-len",
        64,
        "--train.seq-len",
        65,
    )
    assert "train.seq_len (65) exceeds the model's context: raise --model.max-seq-len" in message


def test_text_shorter_than_one_sequence(error: Answer, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A story.\n<|endoftext|>\nAnother one.\n")
    assert f"but one block needs {TRAIN_PRESETS['moe-tiny'].seq_len}" in error(
        "--data", "short.txt"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.max-steps", 0], "train.max_steps must be at least 1, got 0"),
        (["--model.n-heads", 3], "d_model (256) must be a multiple of n_heads (3)"),
        (["--train.learning-rate", "nan"], "train.learning_rate must be at least 0, got nan"),
    ],
)
def test_settings_that_cannot_work(
    flags: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # tyro builds the settings, so the message may come in its box: exit code and words count.
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    words = " ".join((captured.err + captured.out).replace("\u2502", " ").split())
    assert message in words and "Traceback" not in words


def test_a_flag_that_does_not_exist() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--train.max-step", "5"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--train.max-steps" in done.stderr + done.stdout and "Traceback" not in done.stderr

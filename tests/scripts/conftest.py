"""Running a script as a user does, in this process."""

import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pyllm.models import ModelConfig, Transformer, save_model
from pyllm.tokenizers import train_bpe

ROOT = Path(__file__).resolve().parents[2]
Refusal = Callable[..., str]


def script_path(name: str) -> Path:
    """``generate`` or ``benchmarks/ops``, as a file."""
    return ROOT / (f"{name}.py" if "/" in name else f"scripts/{name}.py")


def load_script(name: str) -> ModuleType:
    """The module, without running its main."""
    path = script_path(name)
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Refusal:
    """Run a script with these flags in an empty folder, expect exit code 2; the one line it says.

    What it leaves in the folder stays there for the test to look at.
    """

    def run(name: str, *flags: object) -> str:
        path = script_path(name)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, flags)])
        monkeypatch.setattr(sys, "path", [*sys.path])  # benchmarks add to it
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        captured = capsys.readouterr()
        assert stop.value.code == 2, captured.err
        return one_error(captured.err)

    return run


def one_error(stderr: str) -> str:
    """The only line on stderr: `error: ...`, with nothing that a terminal would obey."""
    assert stderr.endswith("\n")
    line = stderr[:-1]
    assert line.startswith("error: ") and line.isprintable(), stderr
    return line


@pytest.fixture(scope="session")
def fox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small untrained model; tests that damage it copy it first."""
    tokenizer = train_bpe(["Once there was a fox, and the fox was red. "] * 20, 290)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=64, n_layers=2, d_model=32, d_ff=16
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "fox"
    save_model(folder, Transformer(config), tokenizer)
    return folder

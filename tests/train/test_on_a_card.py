"""Training and generation on a card that is none (tests/fake_card.py): no operation mixes devices.

A machine without a card can show no more of them; the kernels have tests of their own.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("--n-stories", "200", "--model.n-layers", "2", "--model.d-model", "32", "--model.d-ff", "32"),
    *("--model.max-seq-len", "64", "--train.seq-len", "32", "--train.batch-size", "4"),
    *("--train.max-steps", "2", "--train.eval-tokens", "512", "--train.device", "cuda"),
)


def run_on_card(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/fake_card.py", script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run in float16 with scaled gradients, where the layers are computed twice."""
    out = str(tmp_path_factory.mktemp("card") / "run")
    options = ("--train.recompute", "--train.optimizer", "muon", "--train.accumulation", "2")
    result = run_on_card("scripts/train_moe.py", *SMALL, *options, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "cuda, float16" in result.stdout and "val_loss" in result.stdout
    return out


def test_a_checkpoint_is_read(trained: str) -> None:
    result = run_on_card("scripts/train_moe.py", "--resume", trained)
    assert result.returncode == 0, result.stderr
    assert "val_loss" in result.stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "float16", "--kv-cache-dtype", "int8", "--greedy"),
        ("--show-experts", "--stats", "--repetition-penalty", "1.2", "--top-k", "5"),
    ],
    ids=["int8", "experts"],
)
def test_generation(trained: str, options: tuple[str, ...]) -> None:
    words = ("--model", trained, "--device", "cuda", "--prompt", "Once", "--max-new-tokens", "6")
    result = run_on_card("scripts/generate.py", *words, *options)
    assert result.returncode == 0, result.stderr
    assert "Once" in result.stdout


REFUSED = {
    "torch.ones(3, device='cuda') + torch.ones(3)": "on the card and on the CPU",
    "torch.ones(3)[torch.tensor([1]).to('cuda')]": "an index on the card",
    "torch.ones(3).to('cuda').numpy()": "can't convert cuda:0",
    "torch.nn.Linear(3, 2).to('cuda')(torch.ones(1, 3))": "on the card and on the CPU",
    "torch.cuda.get_per_process_memory_fraction(torch.device('cuda'))": "a specified index",
}


def test_what_a_card_refuses_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    lines = ["import torch"]
    for line in REFUSED:
        lines += ["try:", f"    {line}", "except Exception as error:", "    print(error)"]
    script.write_text("\n".join(lines), encoding="utf-8")
    result = run_on_card(str(script))
    assert result.returncode == 0, result.stderr
    messages = result.stdout.splitlines()
    for message, part in zip(messages, REFUSED.values(), strict=True):
        assert part in message

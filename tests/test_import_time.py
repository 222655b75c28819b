"""`import pyllm` and `--help` are quick because they load nothing heavy."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "numpy", "datasets", "matplotlib", "rich", "triton")


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys, pyllm; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_a_model_runs_without_the_compiler() -> None:
    """PyTorch's takes 150 MB and a second; only torch.compile needs it."""
    code = (
        "import sys, torch, pyllm.generate\n"
        "from pyllm.models import ModelConfig, Transformer\n"
        "model = Transformer(ModelConfig(n_layers=1))\n"
        "config = pyllm.generate.SamplingConfig(max_new_tokens=2)\n"
        "print(len(list(pyllm.generate.generate_ids(model, [1, 2], config))))\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", "False"]


@pytest.mark.parametrize(
    "script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem
)
def test_help_explains_without_torch(script: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(script)!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "print('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    *help_text, torch_loaded = result.stdout.splitlines()
    assert any("usage" in line.lower() for line in help_text), result.stdout
    assert torch_loaded == "False", "--help imports torch"

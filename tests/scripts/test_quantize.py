"""scripts/quantize.py: what it writes, where, and what it refuses."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

import pyllm

from .conftest import Refusal, script_path


def test_the_newest_run_becomes_a_folder_beside_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    fox: Path,
) -> None:
    shutil.copytree(fox, tmp_path / "runs" / "tale" / "best")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quantize.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script_path("quantize")), run_name="__main__")
    captured = capsys.readouterr()
    assert (stop.value.code, captured.err) == (0, "")
    sizes, place = captured.out.splitlines()
    assert Path(place) == tmp_path / "runs" / "tale" / "best-int8"
    before, after = (
        (tmp_path / "runs" / "tale" / name / "model.safetensors").stat().st_size / 1e6
        for name in ("best", "best-int8")
    )
    assert sizes == f"{before:.1f} MB of weights became {after:.1f} MB"
    assert after < before / 2
    monkeypatch.chdir(tmp_path / "runs" / "tale" / "best")
    monkeypatch.setattr(sys, "argv", ["quantize.py", "--model", ".", "--out", "../again"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script_path("quantize")), run_name="__main__")
    assert stop.value.code == 0
    monkeypatch.chdir(tmp_path)
    text = pyllm.load(place).generate("a fox", max_new_tokens=9, greedy=True)
    assert text == pyllm.load(fox, dtype="int8").generate("a fox", max_new_tokens=9, greedy=True)


def test_what_is_refused(refusal: Refusal, fox: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    line = refusal("quantize", "--model", fox, "--out", "there")
    assert line == "error: there: already there; remove it or name another place with --out"
    assert "no trained model under runs/" in refusal("quantize")
    pyllm.models.quantize_folder(fox, tmp_path / "ints")
    line = refusal("quantize", "--model", tmp_path / "ints")
    assert "its weights are int8 already" in line
    line = refusal("generate", "--model", tmp_path / "ints", "--dtype", "float32")
    assert "its weights are int8, got dtype torch.float32; load it as it is" in line
    line = refusal("export", "--model", tmp_path / "ints")
    assert "the model's weights are int8, a form of pyllm's own; export the model that" in line

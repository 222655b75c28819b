"""Benchmarks run as a user runs them, in this process and into a folder of the test's own."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run a benchmark with these flags; its exit code, and what it wrote or None."""

    def run(name: str, *flags: object) -> tuple[int, dict[str, Any] | None]:
        results = tmp_path / "results"
        words = [name, *map(str, flags), "--results", str(results)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "path", [*sys.path])
        threads = torch.get_num_threads()
        try:
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        files = sorted(results.glob("*.json"))
        if not files:
            return stop.value.code, None
        [file] = files
        content = json.loads(file.read_text(encoding="utf-8"))
        assert content["machine"]["torch"] == torch.__version__ and content["machine"]["commit"]
        return stop.value.code, content

    return run


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """A benchmark's functions by name."""

    def names(name: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "path", [*sys.path])
        return runpy.run_path(str(BENCHMARKS / name))

    return names

"""benchmarks/micro.py: pytest-benchmark times the faces, and nobody who did not ask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parents[2]


def run_pytest(*arguments: object) -> str:
    command = [sys.executable, "-m", "pytest", "-q", *map(str, arguments)]
    # pytest-benchmark times nothing in what takes itself for a worker of pytest-xdist.
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    # The faces of a GPU, interpreted and executed on the CPU, would take a minute.
    environment.pop("TRITON_INTERPRET", None)
    environment["PYLLM_CUDA_EXTENSION"] = ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_micro_benchmarks_run_under_pytest_benchmark(tmp_path):
    file = tmp_path / "times.json"
    flags = ("--benchmark-max-time", 0.001, "--benchmark-min-rounds", 1, "--benchmark-json", file)
    run_pytest(
        "benchmarks/micro.py", "-p", "no:cacheprovider", "-k", "rms_norm-moe-tiny-fp32", *flags
    )
    times = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    groups = {(each["group"], each["params"]["face"]) for each in times}
    assert {face for _, face in groups} >= {"peer"}
    assert {group.split()[-1] for group, _ in groups} == {"forward", "backward"}
    assert all(each["stats"]["median"] > 0 for each in times)


def test_an_ordinary_run_does_not_collect_them():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'testpaths = ["tests"]' in pyproject
    assert not list((ROOT / "benchmarks").glob("test_*.py"))

"""The Triton kernels compiled for real cards on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""Bytes a block may have (CUDA C++ programming guide, table of compute capabilities)."""


@pytest.mark.slow
def test_kernels_fit_the_cards(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_compile.py"))],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    built = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["capability"] for row in built} == set(SHARED_MEMORY)
    for row in built:
        assert row["shared"] <= SHARED_MEMORY[row["capability"]], row
        assert row["spilled"] == 0, row

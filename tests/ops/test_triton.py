"""The Triton kernels compiled for real cards on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyllm.ops import available_faces
from pyllm.ops._registry import face_module
from pyllm.testing import OPERATIONS, check_face

pytest.importorskip("triton", reason="triton is not installed")

CAPABILITIES = {80, 86, 89, 90}
A_PART = {"fp32": ("80",), "fp16": ("86", "odd"), "bf16": ("90", "even"), "fp64": ("90",)}
"""What is compiled without ``--all-cards``, which takes six times as long: of the two dtypes of 16
bits every other variant each."""
SECONDS = 900


def _compile(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_compile.py")), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


SERVED = [op for op in OPERATIONS if "triton" in available_faces(op)]
COMPILED = [
    *((op, dtype) for op in SERVED for dtype in ("fp32", "bf16", "fp16")),
    *((op, "fp64") for op in SERVED if op in ("moe_ffn", "linear_cross_entropy")),
]
"""Triton 3.6 adds products of float64 up in float32 unless told, which is an error: these ask."""


@pytest.mark.slow
@pytest.mark.parametrize(("op", "dtype"), COMPILED)
def test_every_configuration_fits_the_cards(
    op: str, dtype: str, pytestconfig: pytest.Config
) -> None:
    """Each within the card's shared memory, without spills, on tensor cores where it says so."""
    whole = pytestconfig.getoption("--all-cards")
    part = tuple(map(str, sorted(CAPABILITIES))) if whole else A_PART[dtype]
    cards = CAPABILITIES.intersection(int(word) for word in part if word.isdigit())
    rows = _compile(op, dtype, *part)
    compiled = [row for row in rows if row["compiled"]]
    assert len(compiled) >= 2
    for row in compiled:
        assert row["shared"] <= row["limit"], row
        assert not row["estimate"] or row["shared"] <= row["estimate"], row
        # float64 is there to compare with, not to be fast.
        assert row["spilled"] <= (16 if dtype == "fp64" else 0), row
        assert row["mma"] > 0 or not row["wants_mma"], row
        # What feeds tensor cores comes 16 bytes at a time, and in the background.
        assert row["narrow"] == 0 or not (row["wants_mma"] and row["aligned"]), row
    # A kernel must have a configuration on every card.
    kernels = {row["kernel"] for row in rows}
    chosen = {(row["kernel"], row["capability"]) for row in rows if row["chosen"]}
    assert chosen == {(kernel, capability) for kernel in kernels for capability in cards}


@pytest.mark.skipif(torch.cuda.is_available(), reason="listens to Triton's interpreter")
@pytest.mark.parametrize("op", SERVED)
def test_every_launch_says_how_to_multiply_and_add(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.9 warns where ``enable_fp_fusion`` is left to it, and 3.10 changes what it does."""
    from triton.runtime import interpreter

    launches: list[bool] = []
    launch = interpreter.GridExecutor.__call__

    def listen(self: Any, *arguments: Any, **named: Any) -> None:
        launches.append(named.get("enable_fp_fusion") is True)
        launch(self, *arguments, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", listen)
    case = OPERATIONS[op].case(OPERATIONS[op].tiny)
    check_face(case, face_module(op, "triton"), torch.float32)
    assert len(launches) >= 2
    assert all(launches)

"""The operations under pytest-benchmark: its statistics, its comparison of saved runs, its JSON.

    pytest benchmarks/micro.py -k moe_ffn
    pytest benchmarks/micro.py --benchmark-save before   # and later: --benchmark-compare

The C++ face and what a PyTorch user would call instead (``_peers.py``), at the sizes that the
declarations name. An ordinary ``pytest`` does not collect this file. ``ops.py`` times the same
calls, but in turns, which a drifting clock does not mislead: README's figures are from there.
"""

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from pyllm._cli import ENVIRONMENT

os.environ.update({**ENVIRONMENT, **os.environ})  # as for every script, before torch is loaded
sys.path.insert(0, str(Path(__file__).resolve().parent))

from ops import DTYPES, prepare

from pyllm.testing import OPERATIONS

CASES = [
    pytest.param(op, name, dtype, stage, face, id=f"{op}-{name}-{dtype}-{stage}-{face}")
    for op, operation in OPERATIONS.items()
    for name in operation.bench
    for dtype in ("fp32", "bf16")
    for stage in operation.stages
    for face in ("cpu", "peer")
]


@lru_cache(maxsize=1)  # the stages and faces of a case come one after the other
def prepared(op: str, name: str, dtype: str) -> Any:
    """See :func:`ops.prepare`."""
    operation = OPERATIONS[op]
    return prepare(operation.case(operation.bench[name]), DTYPES[dtype], "cpu")


@pytest.mark.parametrize(("op", "name", "dtype", "stage", "face"), CASES)
def test_operation(benchmark: Any, op: str, name: str, dtype: str, stage: str, face: str) -> None:
    forward, backward, rows = prepared(op, name, dtype)
    functions = forward if stage == "forward" else backward
    if face not in functions:
        reasons = [row["skipped"] for row in rows if row["face"] == face]
        pytest.skip(reasons[0] if reasons else f"{op} has no face {face} here")
    benchmark.group = f"{op} {name} {dtype} {stage}"
    benchmark(functions[face])

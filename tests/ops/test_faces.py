"""The law of faces: one signature, and how a face is chosen."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

from pyllm.ops import available_faces, rms_norm
from pyllm.ops._registry import FACE_PACKAGES, choose_face, face_module
from pyllm.testing import OPERATIONS

STAGES = [
    (op, face, stage)
    for op in OPERATIONS
    for face in available_faces(op)
    for stage in OPERATIONS[op].stages
    if face != "reference"
]


def _shape(function: object) -> list[tuple[str, object]]:
    """Parameters in order, the shape suffix of a tensor's name left off, with their kinds."""
    return [
        (name.split("_")[0] if name[-1:].isupper() or name[-1:].isdigit() else name, item.kind)
        for name, item in inspect.signature(function).parameters.items()
    ]


@pytest.mark.parametrize(("op", "face", "stage"), STAGES)
def test_one_signature(op: str, face: str, stage: str) -> None:
    name = f"{op}_{stage}"
    expected = getattr(face_module(op, "reference"), name)
    assert _shape(getattr(face_module(op, face), name)) == _shape(expected)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_has_a_reference(op: str) -> None:
    assert "reference" in available_faces(op)


def test_an_unknown_face() -> None:
    with pytest.raises(ValueError, match="rms_norm has no face 'cobol' here for tensors on cpu"):
        rms_norm(torch.ones(1, 2), torch.ones(2), face="cobol")


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_face_gets_no_foreign_tensors(op: str) -> None:
    for face in ("cpu", "triton"):
        if face not in available_faces(op):
            continue
        device = "cuda" if face == "cpu" else "mps"
        with pytest.raises(ValueError, match=f"no face '{face}' here for tensors on {device}"):
            choose_face(op, device, face)
        assert choose_face(op, device, None) != face


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_environment_forces_a_face() -> None:
    code = "from pyllm.ops._registry import choose_face as c; print(c('attention', 'cpu', None))"
    for face in ("reference", "torch"):
        assert _python(code, PYLLM_FACE=face).stdout.strip() == face


def test_the_environment_names_an_unknown_face() -> None:
    result = _python("import pyllm.ops", PYLLM_FACE="cobol")
    assert result.returncode != 0
    expected = f"PYLLM_FACE='cobol' is not a face; expected one of {', '.join(FACE_PACKAGES)}"
    assert expected in result.stderr


def test_an_explicit_face_wins() -> None:
    code = "from pyllm.ops._registry import choose_face as c; print(c('rope', 'cpu', 'reference'))"
    assert _python(code, PYLLM_FACE="torch").stdout.strip() == "reference"

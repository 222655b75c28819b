"""``pytest -m gpu``: every face of every operation on the card, by the same declarations."""

import pytest
import torch

from pyllm import ops
from pyllm.ops._registry import available_faces, choose_face, face_module
from pyllm.testing import OPERATIONS, check_door, check_face
from pyllm.testing.suite import faces_on

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACES = [(op, face) for op in OPERATIONS for face in faces_on("cuda", available_faces(op))]


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """TF32 would give products ten bits of mantissa, and no budget for float32 covers that."""
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "face"), FACES)
def test_face(op: str, face: str, dtype: torch.dtype) -> None:
    for case in OPERATIONS[op].hostile_cases:
        check_face(case, face_module(op, face), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "face"), [*FACES, *((op, None) for op in OPERATIONS)])
def test_door(op: str, face: str | None, dtype: torch.dtype) -> None:
    for case in OPERATIONS[op].smoke_cases:
        check_door(case, getattr(ops, op), face, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_card_and_processor_draw_the_same_inputs(op: str, dtype: torch.dtype) -> None:
    case = OPERATIONS[op].smoke_cases[2]
    here, there = case.make_inputs(dtype), case.make_inputs(dtype, "cuda")
    for name, value in here.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, there[name].cpu()), name


def test_triton_is_chosen_and_deterministic() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert choose_face("rms_norm", "cuda", None) == "triton"
    case = OPERATIONS["rms_norm"].case({"N": 8192, "D": 257})
    inputs = case.make_inputs(torch.float32, "cuda")
    face = face_module("rms_norm", "triton")
    y, rstd = face.rms_norm_forward(*inputs.values())
    first = face.rms_norm_backward(y, inputs["x"], inputs["weight"], rstd)
    for _ in range(10):
        again = face.rms_norm_backward(y, inputs["x"], inputs["weight"], rstd)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

"""The CUDA kernels on the CPU between fences: what they write and use lies in their tensors.

Without the minutes that test_races.py takes; of a read that changes nothing, only that one knows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyllm._native import cuda_on_cpu
from pyllm.cuda_kernels import _launch, _routing
from pyllm.ops import available_faces
from pyllm.ops._registry import face_module
from pyllm.testing import OPERATIONS, OpCase, run_face
from pyllm.testing.check import expectations

pytestmark = pytest.mark.skipif(not cuda_on_cpu(), reason="the CUDA kernels here are not the CPU's")

MOE_FFN = {"D": 33, "E": 3, "A": 2, "load": "even", "act": "swiglu"}
CASES = [
    *(
        case
        for op in OPERATIONS
        if "cuda" in available_faces(op)
        for case in OPERATIONS[op].smoke_cases
    ),
    OPERATIONS["moe_ffn"].case({**MOE_FFN, "N": 4, "F": 21}),  # few tokens
    OPERATIONS["moe_ffn"].case({**MOE_FFN, "N": 9, "F": 70}),  # two tiles of hidden numbers
]
FENCE = 2**16
"""Bytes of 255 on either side: NaN, or -1."""


def _fenced(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy at an address that 16 divides, and all that lies around it."""
    around = torch.full((tensor.nbytes + 2 * FENCE,), 255, dtype=torch.uint8)
    inside = around[FENCE : FENCE + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return inside.copy_(tensor), around


def _launch_between_fences(kernel: str, *arguments: Any) -> None:
    given, fences = list(arguments), {}
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.is_contiguous():
            given[i], fences[i] = _fenced(argument)
    _launch.launch(kernel, *given)
    for i, around in fences.items():
        assert (around[:FENCE] == 255).all(), f"{kernel}: written before argument {i}"
        assert (around[around.numel() - FENCE :] == 255).all(), f"{kernel}: behind argument {i}"
        arguments[i].copy_(given[i])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.label}")
def test_nothing_outside_is_written_or_used(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    face = face_module(case.op, "cuda")
    for limit in ("MOST_WARPS", "MOST_BLOCKS"):  # several rows for each of them, the last has fewer
        if hasattr(face, limit):
            monkeypatch.setattr(face, limit, 4 if limit == "MOST_WARPS" else 3)
    for dtype in (torch.float32, torch.float16):
        inputs, upstreams = case.make_inputs(dtype), expectations(case, dtype, "cpu", 0)[2]
        with monkeypatch.context() as fenced:
            for module in (face, _routing):
                fenced.setattr(module, "launch", _launch_between_fences)
            again = run_face(case, face, inputs, upstreams)
        right = run_face(case, face, inputs, upstreams)
        for values, others in ((right.outputs, again.outputs), (right.gradients, again.gradients)):
            for name, value in values.items():
                assert torch.equal(value.nan_to_num(0.5), others[name].nan_to_num(0.5)), name

"""What `pytest -m gpu` asks of a card is work, and the files it reads are those with such tests."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from pyllm.ops import available_faces
from pyllm.testing import OPERATIONS
from pyllm.testing.suite import faces_on

TESTS = Path(__file__).resolve().parents[1]
GPU: dict[str, Any] = runpy.run_path(str(TESTS / "test_gpu.py"), run_name="test_gpu")


@pytest.mark.parametrize("op", OPERATIONS)
def test_streams_and_graphs_are_tried_with_kernels_to_launch(op: str) -> None:
    """A graph without one is a warning of PyTorch's, and an error of these tests."""
    for face in faces_on("cpu", available_faces(op)):
        inputs = GPU["one_case"](op, face, torch.float16, "cpu").make_inputs(torch.float16)
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        assert all(value.numel() for value in tensors.values()), (face, list(tensors))

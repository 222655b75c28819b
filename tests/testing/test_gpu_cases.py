"""What `pytest -m gpu` asks of a card is work, and the files it reads are those with such tests."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyllm.ops import available_faces
from pyllm.testing import OPERATIONS
from pyllm.testing.suite import faces_on

TESTS = Path(__file__).resolve().parents[1]
GPU: dict[str, Any] = runpy.run_path(str(TESTS / "test_gpu.py"), run_name="test_gpu")
CONFTEST = TESTS / "conftest.py"


@pytest.mark.parametrize("op", OPERATIONS)
def test_streams_and_graphs_are_tried_with_kernels_to_launch(op: str) -> None:
    """A graph without one is a warning of PyTorch's, and an error of these tests."""
    for face in faces_on("cpu", available_faces(op)):
        inputs = GPU["one_case"](op, face, torch.float16, "cpu").make_inputs(torch.float16)
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        assert all(value.numel() for value in tensors.values()), (face, list(tensors))


@pytest.mark.parametrize(
    ("marked", "name", "left_out"),
    [
        ("gpu", "test_gpu.py", False),
        ("gpu", "generate/test_gpu.py", False),
        ("gpu", "generate", False),
        ("gpu", "generate/small.py", False),
        ("gpu", "conftest.py", False),
        ("gpu", "train/test_trainer.py", True),
        ("gpu", "train", True),
        ("not gpu", "train", False),
        ("", "train/test_trainer.py", False),
    ],
)
def test_files_without_a_test_for_a_card_are_not_read(
    request: pytest.FixtureRequest, marked: str, name: str, left_out: bool
) -> None:
    """Thousands of other tests take a while to find, and need libraries that a machine with a card
    may lack."""
    conftest = request.config.pluginmanager.get_plugin(str(CONFTEST))
    config = SimpleNamespace(option=SimpleNamespace(markexpr=marked))
    assert bool(conftest.pytest_ignore_collect(TESTS / name, config)) == left_out

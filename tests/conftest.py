"""Fixtures and rules for all tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyllm._cli import SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # before torch loads the runtime that reads it

import torch

ROOT = Path(__file__).resolve().parent.parent

# Triton reads this when it is first imported: without a card its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts: PYLLM_SHARED_DATA, by default ../shared/data beside the repo."""
    folder = Path(os.environ.get("PYLLM_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; PYLLM_SHARED_DATA names its folder")
    return folder


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

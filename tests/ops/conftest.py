"""Parameters of the operations' tests from their declarations."""

from collections.abc import Iterator

import pytest
import torch

from pyllm.ops import available_faces
from pyllm.testing.suite import parameters


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    operation = getattr(metafunc.cls, "operation", None)
    if operation is None:
        return
    for name in metafunc.fixturenames:
        if name in ("smoke_case", "face", "face_case", "dtype", "mutant", "layout"):
            found = parameters(operation, available_faces(operation.name), name)
            assert found is not None
            metafunc.parametrize(name, found[0], ids=found[1])


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Thousands of small calls: waking a second thread costs more than it helps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

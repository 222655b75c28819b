"""What the tests of the C++ face share."""

from collections.abc import Iterator

import pytest

from pyllm._native import cpu_extension

ISAS = cpu_extension().supported_isas() if cpu_extension() is not None else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    before = cpu_extension().active_isa()
    cpu_extension().set_isa(request.param)
    yield request.param
    cpu_extension().set_isa(before)

"""These models are so small that a second thread costs more than it brings."""

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """On a busy machine, waiting for each other made these tests ten times slower."""
    set_threads(1)

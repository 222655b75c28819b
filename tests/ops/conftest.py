"""Parameters of the operations' tests from their declarations, and the kill rate at the end."""

from collections.abc import Callable, Iterator

import pytest
import torch

from pyllm.ops import available_faces
from pyllm.testing.suite import parameters

_VERDICTS = pytest.StashKey[dict[tuple[str, str], bool]]()


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


@pytest.fixture
def record_mutant(request: pytest.FixtureRequest) -> Callable[[str, str, bool], None]:
    """Write down whether a planted fault was seen, for the summary."""
    verdicts = request.config.stash.setdefault(_VERDICTS, {})

    def record(operation: str, mutant: str, killed: bool) -> None:
        verdicts[operation, mutant] = killed

    return record


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    verdicts = config.stash.get(_VERDICTS, {})
    if not verdicts:
        return
    killed = sum(verdicts.values())
    terminalreporter.write_line(f"mutants killed: {killed} of {len(verdicts)}")
    for (operation, mutant), seen in verdicts.items():
        if not seen:
            terminalreporter.write_line(f"  alive: {operation}: {mutant}", red=True)

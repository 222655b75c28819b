"""How many processes `pytest -m gpu` takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"


@pytest.fixture
def conftest(request: pytest.FixtureRequest) -> Any:
    return request.config.pluginmanager.get_plugin(str(CONFTEST))


@pytest.mark.parametrize(
    ("gibibytes", "cores", "workers"), [(139, 16, 8), (4, 8, 0), (24, 16, 3), (139, 2, 0)]
)
def test_what_a_card_has_room_for(conftest: Any, gibibytes: int, cores: int, workers: int) -> None:
    assert conftest.gpu_workers(gibibytes * 2**30, cores) == workers


@pytest.mark.parametrize(
    ("told", "marked", "worker", "expected"),
    [
        (None, "gpu", False, 8),
        (None, "gpu", True, None),  # or each of them would start as many
        (None, "not gpu", False, None),
        (2, "gpu", False, 2),
    ],
)
def test_only_where_nothing_was_said(
    conftest: Any,
    monkeypatch: pytest.MonkeyPatch,
    told: int | None,
    marked: str,
    worker: bool,
    expected: int | None,
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    card = SimpleNamespace(total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    option = SimpleNamespace(numprocesses=told, usepdb=False, markexpr=marked)
    conftest.pytest_cmdline_main(SimpleNamespace(option=option))
    assert option.numprocesses == expected

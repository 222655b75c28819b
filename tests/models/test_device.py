"""A device is what its name says, or refused with what the machine has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyllm.models import choose_device, named_dtype


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that the machine has so many cards, and mps or not."""

    def pretend(cards: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cards", "mps", "chosen"),
    [(2, True, "cuda"), (1, False, "cuda"), (0, True, "mps"), (0, False, "cpu")],
)
def test_auto_takes_cuda_then_mps_then_cpu(
    machine: Callable[..., None], cards: int, mps: bool, chosen: str
) -> None:
    machine(cards, mps)
    assert choose_device("auto") == choose_device() == torch.device(chosen)
    assert choose_device(chosen) == torch.device(chosen)
    assert choose_device("cpu") == torch.device("cpu")


def test_a_card_by_its_number(machine: Callable[..., None]) -> None:
    machine(2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(
        ValueError, match=r"'cuda:2' is not available .*; here: cuda:0, cuda:1, cpu; auto takes"
    ):
        choose_device("cuda:2")


def test_what_torch_would_take_for_another_card(machine: Callable[..., None]) -> None:
    machine(64)
    assert torch.device("cuda:300").index == 44  # counted modulo 256, and no word about it
    with pytest.raises(ValueError, match="device 'cuda:300' is not available on this machine"):
        choose_device("cuda:300")


@pytest.mark.parametrize(
    "name",
    ["", "gpu", "CPU", " cpu", "cpu:0", "cuda:", "cuda:-1", "cuda:01", "meta", "xpu", None, 0],
)
def test_a_name_that_is_none(machine: Callable[..., None], name: Any) -> None:
    machine(2, True)
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda, cuda:1 or mps, got "):
        choose_device(name)


@pytest.mark.fuzz
@given(name=st.one_of(st.text(), st.from_regex(r"\A(cpu|cuda|mps|auto)(:[0-9]{1,4})?\Z")))
def test_any_name_is_a_device_that_is_here_or_a_value_error(
    watchdog: Callable[[], None], machine: Callable[..., None], name: str
) -> None:
    watchdog()
    machine(3)
    right = {"auto": "cuda", "cpu": "cpu", "cuda": "cuda"} | {
        f"cuda:{i}": f"cuda:{i}" for i in "012"
    }
    if name in right:
        assert str(choose_device(name)) == right[name]
    else:
        with pytest.raises(ValueError, match=r"^device .*\Z") as error:
            choose_device(name)
        assert "\n" not in str(error.value)


def test_dtypes_by_name() -> None:
    assert named_dtype("bfloat16") is torch.bfloat16
    for name in ("int8", "", "auto", None, []):
        with pytest.raises(
            ValueError, match="dtype must be one of float32, bfloat16, float16, got"
        ):
            named_dtype(name)

"""Precision and threads are chosen by what the machine has, or by what was asked for."""

import subprocess
import sys

import pytest
import torch

from pyllm.train import TrainConfig, device


def pretend(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: bf16 or emulated)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)


@pytest.mark.parametrize(
    ("kind", "bf16", "chosen"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),  # emulated bfloat16 is slow: it does not count
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
        ("mps", True, torch.float32),
    ],
)
def test_auto_dtype(
    monkeypatch: pytest.MonkeyPatch, kind: str, bf16: bool, chosen: torch.dtype
) -> None:
    pretend(monkeypatch, bf16=bf16)
    assert device.choose_dtype("auto", torch.device(kind)) == chosen
    assert device.choose_dtype("float16", torch.device(kind)) == torch.float16


def test_autocast_changes_matrix_products_only_when_asked() -> None:
    a = torch.ones(4, 4)
    cpu = torch.device("cpu")
    with device.autocast(cpu, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with device.autocast(cpu, torch.float32):
        assert (a @ a).dtype == torch.float32


def test_matmul_peak_is_a_plausible_rate() -> None:
    assert 1e8 < device.matmul_peak(torch.device("cpu"), torch.float32, size=256) < 1e15


def test_threads_are_set_only_when_asked() -> None:
    torch.set_num_threads(1)
    device.apply_threads(TrainConfig(threads=0))
    assert torch.get_num_threads() == 1
    device.apply_threads(TrainConfig(threads=2))
    assert torch.get_num_threads() == 2


def test_freed_memory_is_kept_and_not_mapped_anew() -> None:
    code = """
import resource, torch
from pyllm.train.device import keep_freed_memory

def faults():  # of ten blocks, each freed before the next
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults() and faults())
"""
    words = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    if words[1] == "False":
        pytest.skip("this system's malloc has no mallopt")
    assert int(words[2]) < int(words[0]) / 5


@pytest.mark.parametrize(("place", "free", "expected"), [("cuda", 9, 9), ("cuda:1", 40, 30)])
def test_what_is_free_of_a_card_without_a_number(
    monkeypatch: pytest.MonkeyPatch, place: str, free: int, expected: int
) -> None:
    """``auto`` chooses "cuda", and PyTorch knows no share of a card without its number."""
    shares = {0: 1.0, 1: 0.5}
    for function in ("_lazy_init", "memory._lazy_init"):
        monkeypatch.setattr(f"torch.cuda.{function}", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getMemoryFraction", shares.__getitem__, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda one: (free, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda one: 20)
    assert device.free_memory(torch.device(place)) == expected

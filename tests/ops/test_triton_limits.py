"""What the Triton faces leave to the next face: chosen by the door, said once, and right."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from pyllm.triton_kernels._tuning import INTERPRETED

from pyllm.ops import _registry, attention, rms_norm
from pyllm.ops._registry import face_module

interpreted = pytest.mark.skipif(not INTERPRETED, reason="only Triton's interpreter runs here")


@pytest.fixture
def triton_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU as on a card, but for the faces between Triton's and the reference."""
    caches = ("_best_face", "_unlimited", "_say_once")
    for op in ("attention", "rms_norm"):
        monkeypatch.setitem(_registry.PREFERENCES[op], "cpu", ("triton", "reference"))
    for name in caches:
        getattr(_registry, name).cache_clear()
    yield
    monkeypatch.undo()
    for name in caches:
        getattr(_registry, name).cache_clear()


def _heads(width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, 3, 1, width, dtype=dtype, requires_grad=True) for _ in range(3)]


BEYOND = {
    "wide heads": (
        *(attention, lambda: _heads(257)),
        "attention runs on the reference face.*heads of 257 channels, not 1 to 256",
    ),
    "float64": (
        *(attention, lambda: _heads(4, torch.float64)),
        "attention runs on the reference face.*no float64",
    ),
    "long rows": (
        *(rms_norm, lambda: [torch.randn(2, 16385, requires_grad=True), torch.ones(16385)]),
        "rms_norm runs on the reference face.*rows of 16385 numbers, more than 16384",
    ),
}


@interpreted
@pytest.mark.parametrize("name", BEYOND)
def test_the_next_face_takes_it_and_says_so_once(triton_first: None, name: str) -> None:
    door, make, message = BEYOND[name]
    inputs = make()
    with pytest.raises(ValueError, match="does not serve this call: triton: "):
        door(*inputs, face="triton")
    with pytest.warns(UserWarning, match=message):
        y = door(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = door(*inputs)
    expected = door(*inputs, face="reference")
    assert torch.equal(y, expected)
    (dx,) = torch.autograd.grad(y.sum(), inputs[:1])
    assert torch.equal(dx, torch.autograd.grad(expected.sum(), inputs[:1])[0])


@interpreted
def test_what_is_within_the_limits_stays(triton_first: None) -> None:
    """Nothing is said: a warning is an error here."""
    attention(*_heads(256))
    rms_norm(torch.randn(2, 16384), torch.ones(16384))


def _far(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _attention(q: Tensor, k: Tensor, scale: float = 1.0) -> list[list[Any]]:
    """The arguments of both stages."""
    forward = [q, k, k, scale, True, 0, 0]
    return [forward, [q, q, k, k, q, _far(*q.shape[:3]), *forward[3:]]]


def _experts(n_experts: int) -> list[list[Any]]:
    x, w = _far(2, 1), _far(n_experts, 1, 1)
    routing = _far(2, 1), _far(2, 1, dtype=torch.int32)
    return [[x, w, w, *routing, "gelu"], [x, x, w, w, routing[0], x, x, x, x, "gelu"]]


def _rows(width: int) -> list[list[Any]]:
    x = _far(2, width)
    return [[x, x[0], 0.0], [x, x, x[0], x[:, 0]]]


def _turned(heads: int, width: int) -> list[list[Any]]:
    x, table = _far(1, 2, heads, width), _far(2, width // 2)
    return [[x, table, table]] * 2


POSITION = _far(1, 1, 1, 8)
LIMITS = [
    ("attention", _attention(POSITION, POSITION), None),
    ("attention", _attention(_far(1, 1, 1, 256), _far(1, 1, 1, 256)), None),
    ("attention", _attention(_far(1, 1, 1, 0), _far(1, 1, 1, 0)), "heads of 0 channels"),
    ("attention", _attention(POSITION.double(), POSITION.double()), "no float64"),
    ("attention", _attention(POSITION, POSITION.expand(1, 2**29 - 1, 1, 8)), None),
    ("attention", _attention(POSITION, POSITION.expand(1, 2**29, 1, 8)), "536870913 positions"),
    ("attention", _attention(POSITION, POSITION, -1e31), "a scale of -1e+31"),
    ("attention", _attention(_far(1, 1, 2**15, 256), POSITION), "32768 heads of 256 channels"),
    ("rms_norm", _rows(16384), None),
    ("rms_norm", _rows(16385), "rows of 16385 numbers"),
    ("rope", _turned(2**15, 254), None),
    ("rope", _turned(2**15, 256), "32768 heads of 256 channels"),
    ("moe_ffn", _experts(65535), None),
    ("moe_ffn", _experts(65536), "65536 experts, more than 65535"),
]


@pytest.mark.parametrize(("op", "stages", "reason"), LIMITS)
def test_limits(op: str, stages: list[list[Any]], reason: str | None) -> None:
    """The backward is left to the next face exactly where the forward is."""
    face = face_module(op, "triton")
    for stage, arguments in zip(("forward", "backward"), stages, strict=True):
        got = face.unserved(stage, *arguments)
        if reason is None:
            assert got is None
        else:
            assert got is not None and got.startswith(reason)

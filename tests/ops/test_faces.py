"""The law of faces: one signature, and how a face is chosen."""

import contextlib
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from pyllm._native import cuda_on_cpu
from pyllm.ops import _registry, available_faces, rms_norm
from pyllm.ops._registry import FACE_PACKAGES, choose_face, face_module
from pyllm.testing import OPERATIONS

STAGES = [
    (op, face, stage)
    for op in OPERATIONS
    for face in available_faces(op)
    for stage in OPERATIONS[op].stages
    if face != "reference"
]


def _shape(function: object) -> list[tuple[str, object]]:
    """Parameters in order, the shape suffix of a tensor's name left off, with their kinds."""
    return [
        (name.split("_")[0] if name[-1:].isupper() or name[-1:].isdigit() else name, item.kind)
        for name, item in inspect.signature(function).parameters.items()
    ]


@pytest.mark.parametrize(("op", "face", "stage"), STAGES)
def test_one_signature(op: str, face: str, stage: str) -> None:
    name = f"{op}_{stage}"
    expected = getattr(face_module(op, "reference"), name)
    assert _shape(getattr(face_module(op, face), name)) == _shape(expected)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_has_a_reference(op: str) -> None:
    assert "reference" in available_faces(op)


def test_an_unknown_face() -> None:
    with pytest.raises(ValueError, match="rms_norm has no face 'cobol' here for tensors on cpu"):
        rms_norm(torch.ones(1, 2), torch.ones(2), face="cobol")


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_face_gets_no_foreign_tensors(op: str) -> None:
    for face in ("cpu", "triton", "cuda"):
        if face not in available_faces(op):
            continue
        device = "cuda" if face == "cpu" or face == "cuda" and cuda_on_cpu() else "mps"
        with pytest.raises(ValueError, match=f"no face '{face}' here for tensors on {device}"):
            choose_face(op, device, face)
        assert choose_face(op, device, None) != face


LIMIT = "rows of more than 4"


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The best face of rms_norm serves short rows only; the calls that it gets."""
    calls: list[str] = []
    sound = face_module("rms_norm", "reference")

    def forward(*arguments: object) -> object:
        calls.append("forward")
        return sound.rms_norm_forward(*arguments)

    def backward(*arguments: object) -> object:
        calls.append("backward")
        return sound.rms_norm_backward(*arguments)

    def unserved(stage: str, *arguments: torch.Tensor) -> str | None:
        assert stage in ("forward", "backward")
        return LIMIT if arguments[0].shape[-1] > 4 else None

    face = SimpleNamespace(rms_norm_forward=forward, rms_norm_backward=backward, unserved=unserved)

    def find(op: str, name: str) -> object:
        return face if (op, name) == ("rms_norm", "torch") else face_module(op, name)

    def forget() -> None:
        for cached in ("_best_face", "_unlimited", "_say_once", "available_faces"):
            getattr(_registry, cached).cache_clear()

    monkeypatch.setattr(_registry, "face_module", find)
    monkeypatch.setitem(_registry.PREFERENCES["rms_norm"], "cpu", ("torch", "reference"))
    forget()
    yield calls
    monkeypatch.undo()
    forget()


def test_a_face_leaves_to_the_next_what_it_does_not_serve(limited: list[str]) -> None:
    assert choose_face("rms_norm", "cpu", None) == "torch,reference"
    short, long = torch.randn(2, 3, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    rms_norm(short, torch.ones(3)).sum().backward()
    assert limited == ["forward", "backward"]
    with pytest.warns(UserWarning, match=f"rms_norm runs on the reference face.*torch: {LIMIT}"):
        y = rms_norm(long, torch.ones(5))
    y.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        again = rms_norm(long, torch.ones(5))
    assert torch.equal(y, again)
    assert torch.equal(y, rms_norm(long, torch.ones(5), face="reference"))
    assert limited == ["forward", "backward"]


def test_a_face_that_was_asked_for_is_not_replaced(limited: list[str]) -> None:
    assert choose_face("rms_norm", "cpu", "torch") == "torch"
    with pytest.raises(ValueError, match=f"rms_norm does not serve this call: torch: {LIMIT}"):
        rms_norm(torch.randn(2, 5), torch.ones(5), face="torch")


def test_a_compiled_call_leaves_it_to_the_next_as_well(limited: list[str]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    long = torch.randn(2, 5)
    with pytest.warns(UserWarning, match=LIMIT):
        y = compiled(long, torch.ones(5))
    assert torch.equal(y, rms_norm(long, torch.ones(5), face="reference"))


@pytest.mark.parametrize(
    ("capability", "faces"),
    [
        ((7, 0), {"triton": False, "cuda": False}),
        ((7, 5), {"triton": False, "cuda": True}),
        ((8, 0), {"triton": True, "cuda": True}),
        ((9, 0), {"triton": True, "cuda": True}),
        (None, {"triton": True, "cuda": True}),
    ],
    ids=str,
)
def test_what_a_card_must_be_capable_of(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, faces: dict[str, bool]
) -> None:
    monkeypatch.setattr(_registry, "_best_capability", lambda: capability)
    monkeypatch.setattr(_registry, "_devices_of", lambda face: ("cuda",))
    monkeypatch.setattr(_registry, "face_module", lambda op, face: SimpleNamespace())
    for face, served in faces.items():
        assert _registry.serves("rms_norm", face, "cuda") is served


def test_each_of_several_cards_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards: what the better one can run was chosen, and the other one gets a call."""
    cards = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(_registry, "_capability", cards.__getitem__)
    face = SimpleNamespace()
    for index, expected in ((0, None), (1, "cuda:1 has compute capability 7.5, not 8.0")):
        card = torch.device("cuda", index)
        monkeypatch.setattr(_registry, "_device_of", lambda values, card=card: card)
        assert _registry._obstacle(face, "forward", "triton", []) == expected
        assert _registry._obstacle(face, "forward", "cuda", []) is None


def test_a_driver_that_is_too_old_leaves_the_other_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension brings CUDA's runtime, which PyTorch's driver may be too old for."""
    reasons = ["CUDA driver version is insufficient for CUDA runtime version", ""]
    entered: list[int] = []

    def device(index: int) -> contextlib.AbstractContextManager[None]:
        entered.append(index)
        return contextlib.nullcontext()

    native = SimpleNamespace(ON_CPU=False, obstacle=lambda: reasons[entered[-1]])
    for name in ("_cuda_obstacle", "_cuda_runs_nowhere"):
        monkeypatch.setattr(_registry, name, getattr(_registry, name).__wrapped__)
    monkeypatch.setattr(_registry, "cuda_extension", lambda: native)
    monkeypatch.setattr(_registry, "_best_capability", lambda: (9, 0))
    monkeypatch.setattr(_registry, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(_registry, "_devices_of", lambda face: ("cuda",))
    monkeypatch.setattr(_registry, "face_module", lambda op, face: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.warns(UserWarning, match="cannot be used: cuda:0: CUDA driver version is insuffi"):
        assert not _registry.serves("rms_norm", "cuda", "cuda")
    assert _registry.serves("rms_norm", "triton", "cuda")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _registry.serves("rms_norm", "cuda", "cuda")
    entered.clear()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _registry.serves("rms_norm", "cuda", "cuda")
    assert entered == [1], "the other card got a context"
    for index, expected in ((0, f"cuda:0: {reasons[0]}"), (1, None)):
        card = torch.device("cuda", index)
        monkeypatch.setattr(_registry, "_device_of", lambda values, card=card: card)
        assert _registry._obstacle(SimpleNamespace(), "forward", "cuda", []) == expected


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_environment_forces_a_face() -> None:
    code = "from pyllm.ops._registry import choose_face as c; print(c('attention', 'cpu', None))"
    for face in ("reference", "torch"):
        assert _python(code, PYLLM_FACE=face).stdout.strip() == face


def test_the_environment_names_an_unknown_face() -> None:
    result = _python("import pyllm.ops", PYLLM_FACE="cobol")
    assert result.returncode != 0
    expected = f"PYLLM_FACE='cobol' is not a face; expected one of {', '.join(FACE_PACKAGES)}"
    assert expected in result.stderr


def test_an_explicit_face_wins() -> None:
    code = "from pyllm.ops._registry import choose_face as c; print(c('rope', 'cpu', 'reference'))"
    assert _python(code, PYLLM_FACE="torch").stdout.strip() == "reference"

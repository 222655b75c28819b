"""The checks see what they are there to see, and declarations are well formed."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyllm.reference import rms_norm as reference
from pyllm.testing import OPERATIONS, Mismatch, check_face, poisoned_memory, run_face
from pyllm.testing.declaration import Operation
from pyllm.testing.layouts import LAYOUTS

CASE = OPERATIONS["rms_norm"].case({"N": 5, "D": 7})


@pytest.mark.parametrize("name", OPERATIONS)
def test_declarations(name: str) -> None:
    operation = OPERATIONS[name]
    assert len(operation.mutants) >= 8
    assert len({mutant.name for mutant in operation.mutants}) == len(operation.mutants)
    labels = [case.label for case in operation.hostile_cases]
    assert len(set(labels)) == len(labels)
    assert set(operation.gradients) <= operation.smoke_cases[0].make_inputs(torch.float32).keys()


def test_inputs_are_a_function_of_the_seed() -> None:
    first, again = CASE.make_inputs(torch.float32), CASE.make_inputs(torch.float32)
    assert torch.equal(first["x"], again["x"])
    assert not torch.equal(first["x"], CASE.make_inputs(torch.float32, seed=1)["x"])
    rounded = CASE.make_inputs(torch.bfloat16)["x"]
    assert torch.equal(first["x"].bfloat16(), rounded)


def test_poisoned_memory() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_poisoned_memory_says_nothing_of_other_operations() -> None:
    """On a card PyTorch warns of every matrix product there, an error under pytest."""
    with poisoned_memory():
        warnings.warn("Deterministic behavior was enabled with either `torch.use_d", stacklevel=1)
        warnings.warn("a does not have a deterministic implementation, but", stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("rms_norm runs on the reference face", stacklevel=1)


def test_a_face_may_not_write_to_its_inputs() -> None:
    def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
        result = reference.rms_norm_forward(x, weight, eps)
        x.clone()
        weight.mul_(1.5)
        return result

    face = SimpleNamespace(
        rms_norm_forward=forward,
        # Undo it, so that the gradients are right and only the write itself is wrong.
        rms_norm_backward=lambda dy, x, weight, rstd: reference.rms_norm_backward(
            dy, x, weight / 1.5, rstd
        ),
    )
    with pytest.raises(Mismatch, match="writes to its input weight"):
        check_face(CASE, face, torch.float32)


def test_a_missing_output() -> None:
    face = SimpleNamespace(rms_norm_forward=lambda x, weight, eps: x)
    with pytest.raises(Mismatch, match="rms_norm_forward returns 1 tensors, expected 2"):
        check_face(CASE, face, torch.float32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_keep_the_values(name: str) -> None:
    for tensor in (torch.randn(3, 4), torch.arange(6).int(), torch.randn(0, 2)):
        assert torch.equal(LAYOUTS[name](tensor), tensor)
    assert not LAYOUTS["transposed"](torch.randn(3, 4)).is_contiguous()
    assert not LAYOUTS["strided"](torch.randn(3, 4)).is_contiguous()
    assert LAYOUTS["offset"](torch.randn(3, 4)).storage_offset() == 3
    assert LAYOUTS["cut"](torch.randn(3, 4)).stride() == (7, 1)


@pytest.mark.parametrize("victim", ["dy", "rstd"])
def test_a_backward_may_not_write_to_what_it_is_given(victim: str) -> None:
    def backward(
        dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        result = reference.rms_norm_backward(dy, x, weight, rstd)
        {"dy": dy, "rstd": rstd}[victim].fill_(float("nan"))
        return result

    face = SimpleNamespace(rms_norm_forward=reference.rms_norm_forward, rms_norm_backward=backward)
    with pytest.raises(Mismatch, match=f"writes to its input {victim}"):
        check_face(CASE, face, torch.float32)
    check_face(CASE, reference, torch.float32)  # the next face gets sound ones


def _appended(change: Callable[[torch.Tensor], torch.Tensor], victim: str) -> SimpleNamespace:
    """``kv_append`` that then changes one of its inputs."""
    operation = OPERATIONS["kv_append"]

    def forward(*values: Any) -> None:
        operation.reference.kv_append_forward(*values)
        names = tuple(operation.smoke_cases[0].make_inputs(torch.float32))
        tensor = values[names.index(victim)]
        tensor.copy_(change(tensor))

    return SimpleNamespace(kv_append_forward=forward)


@pytest.mark.parametrize("victim", ["k", "starts"])
def test_an_operation_that_writes_may_not_write_to_the_rest(victim: str) -> None:
    case = OPERATIONS["kv_append"].smoke_cases[0]
    check_face(case, _appended(lambda tensor: tensor, victim), torch.float32)
    with pytest.raises(Mismatch, match=f"writes to its input {victim}"):
        check_face(case, _appended(lambda tensor: tensor + 1, victim), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_only_moved_must_arrive_unchanged(dtype: torch.dtype) -> None:
    """By the error budget, the last bit of a number would be free."""
    case = OPERATIONS["kv_append"].smoke_cases[0]

    def nudge(cache: torch.Tensor) -> torch.Tensor:
        last = cache.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[0, 0, 0, 0]
        last ^= 1
        return cache

    with pytest.raises(Mismatch, match="v_cache: 1 of 108 entries differ"):
        check_face(case, _appended(nudge, "v_cache"), dtype)


def test_a_case_is_as_it_was_after_a_face_wrote_to_it() -> None:
    case = OPERATIONS["kv_append"].smoke_cases[0]
    inputs, again = (case.make_inputs(torch.float32) for _ in range(2))
    first = run_face(case, case.operation.reference, inputs, {})
    assert all(torch.equal(inputs[name], again[name]) for name in ("k_cache", "v_cache"))
    assert not torch.equal(first.outputs["k_cache"], inputs["k_cache"])


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_inputs_can_be_made_for_any_device(operation: Operation) -> None:
    """The meta device stands for a card: it refuses to be mixed with the CPU, and to be read."""
    cases = [*operation.hostile_cases, operation.case(operation.tiny)]
    for case in cases:
        here, there = case.make_inputs(torch.float16), case.make_inputs(torch.float16, "meta")
        for name, value in here.items():
            if isinstance(value, torch.Tensor):
                found = there[name]
                assert found.device.type == "meta", name
                assert (found.shape, found.dtype) == (value.shape, value.dtype), name
                assert found.stride() == value.stride(), name

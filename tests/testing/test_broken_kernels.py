"""Kernels that are broken outright fail every case that could show it, not only some.

Public suites pass a mixture-of-experts kernel that returns zeros, because their inputs and
tolerances are of one size. Here each hostile case, in each dtype, must refuse it.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyllm.testing import OPERATIONS, Mismatch, OpCase, check_face, mutate
from pyllm.testing.check import expectations
from pyllm.testing.faults import all_zeros
from pyllm.testing.suite import DTYPES


def _zeros(case: OpCase) -> SimpleNamespace:
    """A face that gives zeros of the right shapes and dtypes, forward and backward."""
    return mutate(case.operation, *(all_zeros(stage) for stage in case.operation.stages))


def _could_show(case: OpCase) -> bool:
    """Has the case an output or a gradient that is not zero by right?"""
    truth = expectations(case, torch.float64, "cpu", 0)[1]
    shown = {**truth.outputs, **{f"d{name}": g for name, g in truth.gradients.items()}}
    degenerate = case.operation.degenerate(case.sizes)
    return any(value.count_nonzero() for name, value in shown.items() if name not in degenerate)


def _expect_refused(case: OpCase, face: Any, dtype: torch.dtype) -> None:
    with pytest.raises(Mismatch):
        check_face(case, face, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_zeros_fail_every_case(name: str, dtype: torch.dtype) -> None:
    cases = [case for case in OPERATIONS[name].hostile_cases if _could_show(case)]
    assert len(cases) > len(OPERATIONS[name].hostile_cases) / 2
    for case in cases:
        _expect_refused(case, _zeros(case), dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_zeros_are_among_the_mutants(name: str) -> None:
    names = {mutant.name for mutant in OPERATIONS[name].mutants}
    assert {all_zeros(stage).name for stage in OPERATIONS[name].stages} <= names


def _moe_ffn(change: Callable[[dict[str, Any]], dict[str, Any]]) -> SimpleNamespace:
    reference = OPERATIONS["moe_ffn"].reference

    def forward(*values: Any) -> Any:
        names = ("x", "w_in", "w_out", "weights", "experts", "activation")
        return reference.moe_ffn_forward(*change(dict(zip(names, values, strict=True))).values())

    return SimpleNamespace(moe_ffn_forward=forward, moe_ffn_backward=reference.moe_ffn_backward)


def _swap_gate_and_up(a: dict[str, Any]) -> dict[str, Any]:
    gate, up = a["w_in"].tensor_split(2, dim=1)
    return {**a, "w_in": torch.cat([up, gate], dim=1)}


def _first_expert_only(a: dict[str, Any]) -> dict[str, Any]:
    weights = torch.zeros_like(a["weights"])
    weights[:, 0] = a["weights"][:, 0]
    return {**a, "weights": weights}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("change", "shows"),
    [
        (_swap_gate_and_up, lambda sizes: sizes["act"] == "swiglu"),
        (_first_expert_only, lambda sizes: sizes["A"] > 1),
    ],
)
def test_a_broken_moe_fails_every_case(
    change: Callable[..., Any], shows: Callable[..., bool], dtype: torch.dtype
) -> None:
    operation = OPERATIONS["moe_ffn"]
    cases = [c for c in operation.hostile_cases if c.sizes["N"] and shows(c.sizes)]
    assert len(cases) > 20
    for case in cases:
        _expect_refused(case, _moe_ffn(change), dtype)

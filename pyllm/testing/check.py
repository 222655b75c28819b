"""Run a face or a door on a case and hold every tensor it returns to the error budget."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyllm.testing.budget import Mismatch, compare, compare_exactly
from pyllm.testing.declaration import (
    Arguments,
    Draw,
    Mutant,
    OpCase,
    Output,
    as_tuple,
    mutate,
)

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Result:
    """Outputs and gradients by name."""

    outputs: Values
    gradients: Values


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN (the largest integer for integers) instead of old memory.

    A kernel that leaves an entry unwritten, or adds to a buffer it never cleared, is then seen.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # PyTorch fills new memory only in this mode; other operations should merely go on.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def widen(value: Any) -> Any:
    """Floating tensors to float64, all else as it is."""
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.double()
    return value


def _upstream(case: OpCase, output: Output, value: Tensor, seed: int) -> Tensor:
    """A random gradient for ``output``, in its dtype. Never ones: sums hide permutations."""
    assert output.upstream is not None
    draw = Draw(value.dtype, str(value.device), seed)
    return draw.normal(*value.shape, scale=output.upstream(case.sizes))


def _upstreams(case: OpCase, outputs: Values, seed: int) -> dict[str, Tensor]:
    return {
        "d" + output.name: _upstream(case, output, outputs[output.name], seed + 1 + index)
        for index, output in enumerate(case.operation.outputs)
        if output.upstream is not None
    }


def run_face(
    case: OpCase, face: Any, inputs: Arguments, upstreams: Values | None = None, seed: int = 0
) -> Result:
    """Forward, then backward on what that forward saved; ``face`` has ``<op>_forward`` and so on.

    Raises:
        Mismatch: the face returns another number of outputs or gradients than declared.
    """
    operation = case.operation
    names = tuple(output.name for output in operation.outputs)
    values = as_tuple(getattr(face, f"{case.op}_forward")(*inputs.values()))
    if len(values) != len(names):
        raise Mismatch(f"{case.op}_forward returns {len(values)} tensors, expected {len(names)}")
    outputs = dict(zip(names, values, strict=True))
    if upstreams is None:
        upstreams = _upstreams(case, outputs, seed)
    known = {**outputs, **inputs, **upstreams}
    arguments = [known[name] for name in operation.backward]
    values = as_tuple(getattr(face, f"{case.op}_backward")(*arguments))
    if len(values) != len(operation.gradients):
        raise Mismatch(
            f"{case.op}_backward returns {len(values)} tensors, "
            f"expected {len(operation.gradients)}"
        )
    return Result(outputs, dict(zip(operation.gradients, values, strict=True)))


@lru_cache(maxsize=64)
def expectations(
    case: OpCase, dtype: torch.dtype, device: str, seed: int
) -> tuple[Result, Result, Values]:
    """(reference in ``dtype``, reference in float64, upstream gradients in ``dtype``)."""
    inputs = case.make_inputs(dtype, device, seed)
    reference = case.operation.reference
    forward = as_tuple(getattr(reference, f"{case.op}_forward")(*inputs.values()))
    names = [output.name for output in case.operation.outputs]
    upstreams = _upstreams(case, dict(zip(names, forward, strict=True)), seed)
    plain = run_face(case, reference, inputs, upstreams)
    wide_inputs = {name: widen(value) for name, value in inputs.items()}
    wide_upstreams = {name: widen(value) for name, value in upstreams.items()}
    return plain, run_face(case, reference, wide_inputs, wide_upstreams), upstreams


def judge(case: OpCase, got: Result, plain: Result, truth: Result, dtype: torch.dtype) -> None:
    """Compare what ``got`` holds (a door shows fewer outputs) by the rules of the declaration.

    Raises:
        Mismatch: an integer differs, or a tensor is over its budget.
    """
    degenerate = case.operation.degenerate(case.sizes)
    where = f"{case.op}[{case.label}] "
    for output in case.operation.outputs:
        name = output.name
        if name not in got.outputs:
            continue
        if output.exact:
            compare_exactly(where + name, got.outputs[name], truth.outputs[name])
            continue
        compare(
            where + name,
            got.outputs[name],
            plain.outputs[name],
            truth.outputs[name],
            dtype,
            degenerate=name in degenerate,
        )
    for name in case.operation.gradients:
        compare(
            f"{where}d{name}",
            got.gradients[name],
            plain.gradients[name],
            truth.gradients[name],
            dtype,
            gradient=True,
            degenerate=f"d{name}" in degenerate,
        )


def check_face(
    case: OpCase, face: Any, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> None:
    """A face's forward and backward, called directly, on poisoned memory.

    Raises:
        Mismatch: the face is wrong.
    """
    plain, truth, upstreams = expectations(case, dtype, device, seed)
    inputs = case.make_inputs(dtype, device, seed)
    kept = {name: _copy(value) for name, value in inputs.items()}
    with poisoned_memory():
        got = run_face(case, face, inputs, upstreams)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not torch.equal(value, kept[name]):
            raise Mismatch(f"{case.op}[{case.label}] the face writes to its input {name}")
    judge(case, got, plain, truth, dtype)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def run_door(
    case: OpCase,
    door: Callable[..., Any],
    face: str | None,
    inputs: Arguments,
    upstreams: Values,
) -> Result:
    """The public function and its autograd backward on these inputs."""
    operation = case.operation
    leaves = {name: inputs[name].detach().requires_grad_() for name in operation.gradients}
    values = operation.call(door, {**inputs, **leaves}, face)
    outputs = dict(zip(operation.door_outputs, values, strict=True))
    differentiable = [name for name in outputs if "d" + name in upstreams]
    gradients = torch.autograd.grad(
        [outputs[name] for name in differentiable],
        list(leaves.values()),
        [upstreams["d" + name] for name in differentiable],
    )
    return Result(
        {name: value.detach() for name, value in outputs.items()},
        dict(zip(leaves, gradients, strict=True)),
    )


def check_door(
    case: OpCase,
    door: Callable[..., Any],
    face: str | None,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """The public function with autograd; ``change`` alters the layout of inputs, not their values.

    Raises:
        Mismatch: the door is wrong.
    """
    plain, truth, upstreams = expectations(case, dtype, device, seed)
    inputs = {
        name: change(value) if isinstance(value, Tensor) else value
        for name, value in case.make_inputs(dtype, device, seed).items()
    }
    upstreams = {name: change(value) for name, value in upstreams.items()}
    with poisoned_memory():
        got = run_door(case, door, face, inputs, upstreams)
    judge(case, got, plain, truth, dtype)


def survivors(cases: tuple[OpCase, ...], mutant: Mutant, dtype: torch.dtype) -> list[str]:
    """Labels of the cases on which the check fails to see ``mutant``; it is killed by any one."""
    alive = []
    for case in cases:
        try:
            check_face(case, mutate(case.operation, mutant), dtype)
        except Mismatch:
            continue
        alive.append(case.label)
    return alive


def is_killed(cases: tuple[OpCase, ...], mutant: Mutant, dtype: torch.dtype) -> bool:
    """Whether the check sees the planted fault on at least one of the cases."""
    return len(survivors(cases, mutant, dtype)) < len(cases)

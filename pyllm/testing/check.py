"""Run a face or a door on a case and hold every tensor it returns to the error budget."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    Operation,
    Output,
    as_copy,
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
        with warnings.catch_warnings():
            # On a card: of cuBLAS at every product, of cumsum, scatter_add and others.
            for said in ("Deterministic behavior was enabled", ".*deterministic implementation"):
                warnings.filterwarnings("ignore", said, UserWarning)
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


def unserved(face: Any, inputs: Arguments) -> str | None:
    """Why a face leaves a call with these inputs to the next one; None for a face that takes it."""
    function = getattr(face, "unserved", None)
    return None if function is None else function("forward", *inputs.values())


def run_forward(case: OpCase, face: Any, inputs: Arguments) -> dict[str, Tensor]:
    """The outputs of ``<op>_forward`` by name, among them the inputs it writes to.

    Raises:
        Mismatch: the face returns another number of outputs than declared.
    """
    names = case.operation.given((output.name for output in case.operation.outputs), inputs)
    function = getattr(face, f"{case.op}_forward")
    outputs = case.operation.forward_outputs(function, inputs)
    return _named(f"{case.op}_forward", names, outputs)


def run_backward(
    case: OpCase, face: Any, inputs: Arguments, outputs: Values, upstreams: Values
) -> dict[str, Tensor]:
    """The gradients of ``<op>_backward`` by input, given what a forward saved; none without one.

    Raises:
        Mismatch: the face returns another number of gradients than declared.
    """
    if "backward" not in case.operation.stages:
        return {}
    known = {**outputs, **inputs, **upstreams}
    arguments = [known[name] for name in case.operation.backward]
    function = getattr(face, f"{case.op}_backward")
    gradients = as_tuple(function(*arguments))
    return _named(f"{case.op}_backward", case.operation.gradients, gradients)


def run_face(case: OpCase, face: Any, inputs: Arguments, upstreams: Values) -> Result:
    """Forward, then backward; ``face`` has ``<op>_forward`` and ``<op>_backward``."""
    outputs = run_forward(case, face, case.operation.fresh(inputs))
    return Result(outputs, run_backward(case, face, inputs, outputs, upstreams))


def _named(what: str, names: Sequence[str], values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    if len(values) != len(names):
        raise Mismatch(f"{what} returns {len(values)} tensors, expected {len(names)}")
    return dict(zip(names, values, strict=True))


@lru_cache(maxsize=64)
def expectations(
    case: OpCase, dtype: torch.dtype, device: str, seed: int
) -> tuple[Result, Result, Values]:
    """(reference in ``dtype``, reference in float64, upstream gradients in ``dtype``)."""
    inputs = case.make_inputs(dtype, device, seed)
    reference = case.operation.reference
    outputs = run_forward(case, reference, case.operation.fresh(inputs))
    upstreams = _upstreams(case, outputs, seed)
    plain = run_face(case, reference, inputs, upstreams)
    wide_inputs = {name: widen(value) for name, value in inputs.items()}
    wide_upstreams = {name: widen(value) for name, value in upstreams.items()}
    return plain, run_face(case, reference, wide_inputs, wide_upstreams), upstreams


def judge_outputs(
    case: OpCase,
    got: Values,
    plain: Result,
    truth: Result,
    dtype: torch.dtype,
    generated: bool = False,
) -> None:
    """Compare the outputs that ``got`` holds (a door shows fewer than a face).

    Raises:
        Mismatch: an integer differs, or a tensor is over its budget.
    """
    degenerate = case.operation.degenerate(case.sizes)
    for output in case.operation.outputs:
        if output.name not in got:
            continue
        where = f"{case.op}[{case.label}] {output.name}"
        value, expected = got[output.name], truth.outputs[output.name]
        if output.exact:
            # A number that was only moved survives the way to float64 and back.
            compare_exactly(where, value, expected.to(plain.outputs[output.name].dtype))
        else:
            small = output.name in degenerate
            compare(
                where,
                value,
                plain.outputs[output.name],
                expected,
                dtype,
                degenerate=small,
                generated=generated,
            )


def judge_gradients(
    case: OpCase,
    got: Values,
    plain: Result,
    truth: Result,
    dtype: torch.dtype,
    generated: bool = False,
) -> None:
    """Compare every named gradient.

    Raises:
        Mismatch: a gradient is over its budget.
    """
    degenerate = case.operation.degenerate(case.sizes)
    for name in case.operation.gradients:
        compare(
            f"{case.op}[{case.label}] d{name}",
            got[name],
            plain.gradients[name],
            truth.gradients[name],
            dtype,
            gradient=True,
            degenerate=f"d{name}" in degenerate,
            generated=generated,
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
    given = case.operation.fresh(inputs)
    kept = {name: as_copy(value) for name, value in inputs.items()}
    with poisoned_memory():
        outputs = run_forward(case, face, given)
    # Before the backward: with a wrong permutation saved, it could write anywhere.
    judge_outputs(case, outputs, plain, truth, dtype)
    # Copies of the upstreams: they are kept for the next face, and this one may write to them.
    upstreams = {name: value.clone() for name, value in upstreams.items()}
    kept |= {name: value.clone() for name, value in {**outputs, **upstreams}.items()}
    with poisoned_memory():
        gradients = run_backward(case, face, inputs, outputs, upstreams)
    for name, value in {**given, **outputs, **upstreams}.items():
        if isinstance(value, Tensor) and not _same_bits(value, kept[name]):
            raise Mismatch(f"{case.op}[{case.label}] the face writes to its input {name}")
    judge_gradients(case, gradients, plain, truth, dtype)


def _same_bits(value: Tensor, other: Tensor) -> bool:
    # NaN is not equal to itself, and attention's log-sum-exp of nothing is -inf.
    return torch.equal(value.nan_to_num(0.5), other.nan_to_num(0.5))


def run_door(
    case: OpCase,
    door: Callable[..., Any],
    face: str | None,
    inputs: Arguments,
    upstreams: Values,
) -> Result:
    """The public function and its autograd backward on these inputs, which stay as they are."""
    operation = case.operation
    inputs = operation.fresh(inputs)
    leaves = {name: inputs[name].detach().requires_grad_() for name in operation.gradients}
    values = operation.call(door, {**inputs, **leaves}, face)
    names = operation.given(operation.door_outputs, inputs)
    outputs = dict(zip(names, values, strict=True))
    detached = {name: value.detach() for name, value in outputs.items()}
    if not leaves:
        return Result(detached, {})
    differentiable = [name for name in outputs if "d" + name in upstreams]
    gradients = torch.autograd.grad(
        [outputs[name] for name in differentiable],
        list(leaves.values()),
        [upstreams["d" + name] for name in differentiable],
    )
    return Result(detached, dict(zip(leaves, gradients, strict=True)))


def check_door(
    case: OpCase,
    door: Callable[..., Any],
    face: str | None,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    generated: bool = False,
) -> None:
    """The public function with autograd; ``change`` alters the layout of inputs, not their values.
    What is written to must be contiguous and is left as it is.

    ``generated`` is for generated cases, see :func:`pyllm.testing.budget.compare`.

    Raises:
        Mismatch: the door is wrong.
    """
    plain, truth, upstreams = expectations(case, dtype, device, seed)
    inputs = {
        name: change(value) if may_change(case.operation, name, value) else value
        for name, value in case.make_inputs(dtype, device, seed).items()
    }
    upstreams = {name: change(value) for name, value in upstreams.items()}
    with poisoned_memory():
        got = run_door(case, door, face, inputs, upstreams)
    judge_outputs(case, got.outputs, plain, truth, dtype, generated)
    judge_gradients(case, got.gradients, plain, truth, dtype, generated)


def may_change(operation: Operation, name: str, value: Any) -> bool:
    """Whether an input may come in another memory layout: a tensor that is not written to."""
    return isinstance(value, Tensor) and name not in operation.mutates


def survives(face: Any, cases: Iterable[OpCase], dtypes: Iterable[torch.dtype]) -> bool:
    """Whether a spoilt face passes the check on all cases in all dtypes.

    A face that cannot run at all is seen, too: any exception counts.
    """
    for dtype in dtypes:
        for case in cases:
            try:
                check_face(case, face, dtype)
            except Exception:
                return False
    return True


def survivors(cases: tuple[OpCase, ...], mutant: Mutant, dtype: torch.dtype) -> list[str]:
    """Labels of the cases on which the check fails to see ``mutant``; it is killed by any one."""
    alive = []
    for case in cases:
        if survives(mutate(case.operation, mutant), [case], [dtype]):
            alive.append(case.label)
    return alive


def is_killed(cases: tuple[OpCase, ...], mutant: Mutant, dtype: torch.dtype) -> bool:
    """Whether the check sees the planted fault on at least one of the cases."""
    return len(survivors(cases, mutant, dtype)) < len(cases)

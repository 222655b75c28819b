"""Planted faults that several operations share. The particular ones stand with their operation."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyllm.testing.declaration import Arguments, Mutant, Run

Change = Callable[[Tensor], Tensor]


def given(name: str, stage: str, argument: str, change: Callable[..., object]) -> Mutant:
    """The face is handed a spoilt argument."""

    def spoil(run: Run, a: Arguments) -> tuple[Tensor, ...]:
        return run({**a, argument: change(a[argument])})

    return Mutant(name, stage, spoil)


def returned(name: str, stage: str, index: int, change: Change) -> Mutant:
    """The face spoils its result number ``index``."""

    def spoil(run: Run, a: Arguments) -> tuple[Tensor, ...]:
        results = list(run(a))
        results[index] = change(results[index])
        return tuple(results)

    return Mutant(name, stage, spoil)


def partly(
    name: str, stage: str, index: int, argument: str, change: Callable[..., object]
) -> Mutant:
    """Result number ``index`` alone is computed from a spoilt argument: one term is wrong."""

    def spoil(run: Run, a: Arguments) -> tuple[Tensor, ...]:
        results = list(run(a))
        results[index] = run({**a, argument: change(a[argument])})[index]
        return tuple(results)

    return Mutant(name, stage, spoil)


def all_zeros(stage: str) -> Mutant:
    """Every result is zero."""
    return Mutant(
        f"all zeros ({stage})", stage, lambda run, a: tuple(torch.zeros_like(r) for r in run(a))
    )


def drop_last(tensor: Tensor, dim: int) -> Tensor:
    """The last slice along ``dim`` is zero: a loop that ends one too early."""
    result = tensor.clone()
    if result.shape[dim]:
        result.select(dim, -1).zero_()
    return result


def unwritten_last(tensor: Tensor, dim: int) -> Tensor:
    """The last slice along ``dim`` keeps what the memory held."""
    result = torch.empty_like(tensor)
    kept = tensor.shape[dim] - 1
    if kept > 0:
        result.narrow(dim, 0, kept).copy_(tensor.narrow(dim, 0, kept))
    return result


def never_cleared(tensor: Tensor) -> Tensor:
    """Adds to a buffer that was never cleared."""
    return tensor + torch.empty_like(tensor)


def common(stage: str, index: int, label: str) -> tuple[Mutant, ...]:
    """Last row dropped, last row unwritten, a stale buffer: for one result of any operation."""
    return (
        returned(f"{label}: last row dropped", stage, index, lambda t: drop_last(t, 0)),
        returned(f"{label}: last row unwritten", stage, index, lambda t: unwritten_last(t, 0)),
        returned(f"{label}: stale buffer", stage, index, never_cleared),
    )

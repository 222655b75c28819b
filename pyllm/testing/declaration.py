"""One declaration per operation, read by its tests, gradient check, mutants and benchmark.

An :class:`Operation` says what the inputs are, what comes out, how the backward is called and which
sizes are hostile. An :class:`OpCase` is an operation at one choice of sizes. A :class:`Mutant` is a
planted fault, by which the test itself is tested.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyllm.testing.pairwise import pairwise

Sizes = Mapping[str, Any]
Arguments = dict[str, Any]
Run = Callable[[Arguments], tuple[Tensor, ...]]


class Draw:
    """Random inputs of one dtype and device. The numbers are the same on every device.

    Drawn in float64 on the CPU and rounded afterwards, so that two dtypes see the same problem.
    """

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def wide_dtype(self) -> torch.dtype:
        """float32, or float64 for float64: what tables, routing weights and losses are kept in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def normal(self, *shape: int, scale: float = 1.0, wide: bool = False) -> Tensor:
        """Normal numbers with standard deviation ``scale``."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale
        return self.to(values, wide=wide)

    def uniform(self, *shape: int) -> Tensor:
        """Float64 numbers between 0 and 1 on the CPU, to compute inputs from."""
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in ``[0, high)``."""
        return torch.randint(high, shape, generator=self._generator).to(self.device)

    def to(self, values: Tensor, wide: bool = False) -> Tensor:
        """Round float64 ``values`` to this dtype (or the wide one) on this device."""
        return values.to(self.wide_dtype if wide else self.dtype).to(self.device)


def _one(sizes: Sizes) -> float:
    return 1.0


def _nothing(sizes: Sizes) -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True)
class Output:
    """One output of the forward."""

    name: str
    upstream: Callable[[Sizes], float] | None = _one
    """Standard deviation of the random gradient fed into it; None where it is not differentiable.
    A mean over N rows gets N, so that the gradient behind it is of order one."""
    exact: bool = False
    """Integers, or numbers that are only moved: compared exactly."""


@dataclass(frozen=True)
class Mutant:
    """A planted fault: ``change(run, arguments)`` calls the sound face and spoils its work.

    ``run`` takes the arguments by name and returns a tuple; so does ``change``.
    """

    name: str
    stage: str
    """``forward`` or ``backward``: which of the two is spoilt."""
    change: Callable[[Run, Arguments], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Operation:
    """The declaration of one operation."""

    name: str
    inputs: Callable[[Sizes, Draw], Arguments]
    """Inputs by name, in the order of ``<op>_forward``'s arguments."""
    outputs: tuple[Output, ...]
    gradients: tuple[str, ...]
    """The inputs whose gradients ``<op>_backward`` returns, in its order; none: no backward."""
    backward: tuple[str, ...]
    """Arguments of ``<op>_backward``: ``d`` + an output, an input, or a saved output."""
    call: Callable[[Callable[..., Any], Arguments, str | None], tuple[Tensor, ...]]
    """Call the public door with these inputs and this face; its outputs as a tuple, what it wrote
    to first."""
    door_outputs: tuple[str, ...]
    """Which outputs the door hands out, in order."""
    axes: Mapping[str, Sequence[Any]]
    """Hostile values of each axis, combined pairwise."""
    tiny: Sizes
    """For gradcheck, opcheck and compilation."""
    smoke: tuple[Sizes, ...]
    """A few cases that a slow face (an interpreter) can afford, and that every mutant must fail."""
    bench: Mapping[str, Sizes]
    """Named sizes for the benchmark."""
    work: Callable[[Sizes, int], tuple[float, float]]
    """(floating-point operations, bytes that must move) of a forward, given the item size."""
    mutants: tuple[Mutant, ...]
    extra: tuple[Sizes, ...] = ()
    """Single cases beyond the pairs: a long reduction, an empty input."""
    resolve: Callable[[Sizes], Sizes] = dict
    """Axes as drawn to sizes, e.g. a top-k that cannot exceed the number of experts."""
    blocks: Mapping[str, int] = field(default_factory=dict)
    """Constants by which the cpu face's launcher cuts its work, here so small that every case is
    cut: chunks and blocks that only large inputs reach are otherwise tested by one case."""
    degenerate: Callable[[Sizes], frozenset[str]] = _nothing
    """Outputs and gradients that are zero but for rounding at these sizes."""
    equivalents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Reason to names of source mutants that nothing can tell from the sound reference."""
    mutates: tuple[str, ...] = ()
    """Inputs that the forward writes to; they are its first outputs, before what it returns."""

    @property
    def stages(self) -> tuple[str, ...]:
        """``forward``, and ``backward`` where there is one."""
        return ("forward", "backward") if self.gradients else ("forward",)

    def fresh(self, inputs: Arguments) -> Arguments:
        """The inputs with copies of what is written to, so that they can be used again."""
        copies = {name: as_copy(inputs[name]) for name in self.mutates}
        return {**inputs, **copies}

    def given(self, names: Iterable[str], inputs: Arguments) -> tuple[str, ...]:
        """The names without those of inputs that may be None, and are."""
        return tuple(name for name in names if name not in inputs or inputs[name] is not None)

    def forward_outputs(self, function: Callable[..., Any], inputs: Arguments) -> tuple[Any, ...]:
        """Call ``<op>_forward``: what it wrote to, then what it returned."""
        returned = as_tuple(function(*inputs.values()))
        return (*(inputs[name] for name in self.given(self.mutates, inputs)), *returned)

    def case(self, sizes: Sizes) -> "OpCase":
        """This operation at ``sizes``."""
        return OpCase(self, self.resolve(sizes))

    @cached_property
    def hostile_cases(self) -> tuple["OpCase", ...]:
        """Pairwise over the axes, then the extra and the smoke cases; none twice."""
        cases = [self.case(sizes) for sizes in (*pairwise(self.axes), *self.extra, *self.smoke)]
        return tuple({case.label: case for case in cases}.values())

    @cached_property
    def smoke_cases(self) -> tuple["OpCase", ...]:
        """The named subset for slow faces."""
        return tuple(self.case(sizes) for sizes in self.smoke)

    @property
    def reference(self) -> ModuleType:
        """The textbook face."""
        return importlib.import_module(f"pyllm.reference.{self.name}")


@dataclass(frozen=True, eq=False)
class OpCase:
    """An operation at one choice of sizes."""

    operation: Operation
    sizes: Sizes = field(default_factory=dict)

    @property
    def op(self) -> str:
        """Name of the operation."""
        return self.operation.name

    @property
    def label(self) -> str:
        """Readable test id, such as ``N3-D31``."""
        return "-".join(f"{axis}{size}" for axis, size in self.sizes.items())

    def make_inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Arguments:
        """Inputs by name; the same values for a seed whatever the device, rounded to ``dtype``.

        Put together on the CPU, where declarations may write and read single numbers.
        """
        inputs = self.operation.inputs(self.sizes, Draw(dtype, "cpu", seed))
        return {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """Faces with one output return a bare tensor, those that only write None."""
    if result is None:
        return ()
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def as_copy(value: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def mutate(operation: Operation, *mutants: Mutant) -> SimpleNamespace:
    """A face that is the reference with a planted fault, or one for each stage."""
    functions = {
        f"{operation.name}_{stage}": getattr(operation.reference, f"{operation.name}_{stage}")
        for stage in operation.stages
    }
    for mutant in mutants:
        name = f"{operation.name}_{mutant.stage}"
        spoil = _spoilt_forward if mutant.stage == "forward" else _spoilt_backward
        functions[name] = spoil(operation, mutant, functions[name])
    return SimpleNamespace(**functions)


def _spoilt_forward(
    operation: Operation, mutant: Mutant, sound: Callable[..., Any]
) -> Callable[..., Any]:
    draw = Draw(torch.float32, "cpu", 0)
    names = tuple(operation.inputs(operation.case(operation.tiny).sizes, draw))

    def run(arguments: Arguments) -> tuple[Tensor, ...]:
        return operation.forward_outputs(sound, operation.fresh(arguments))

    def spoilt(*values: Any) -> Any:
        arguments = dict(zip(names, values, strict=True))
        outputs = mutant.change(run, arguments)
        written = operation.given(operation.mutates, arguments)
        for name, wrong in zip(written, outputs, strict=False):
            arguments[name].copy_(wrong)
        returned = outputs[len(written) :]
        return returned if len(returned) > 1 else next(iter(returned), None)

    return spoilt


def _spoilt_backward(
    operation: Operation, mutant: Mutant, sound: Callable[..., Any]
) -> Callable[..., Any]:
    def spoilt(*values: Any) -> Any:
        arguments = dict(zip(operation.backward, values, strict=True))
        outputs = mutant.change(lambda a: as_tuple(sound(*a.values())), arguments)
        return outputs if len(outputs) > 1 else outputs[0]

    return spoilt

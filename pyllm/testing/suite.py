"""A declaration as pytest tests: subclass :class:`OperationSuite` and name operation and door.

An operation without a backward gets :class:`InferenceSuite` instead.

The parameters ``case``, ``smoke_case``, ``face``, ``dtype``, ``mutant`` and ``layout`` are filled
in by ``parameters``, which a ``conftest.py`` calls from ``pytest_generate_tests``.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pyllm._native import cuda_on_cpu
from pyllm.testing.check import (
    Result,
    check_door,
    check_face,
    expectations,
    is_killed,
    may_change,
    run_door,
    run_face,
    survives,
    unserved,
)
from pyllm.testing.declaration import Arguments, Mutant, OpCase, Operation
from pyllm.testing.layouts import LAYOUTS
from pyllm.testing.source_mutants import SourceMutant, source_mutants

MUTANT_VOLUME = 100_000
"""Product of a case's sizes up to which it is tried on source mutants that small cases miss."""
INTERPRETED = ("triton", "cuda")
"""Faces of a card, which are slow here: Triton's interpreter, a fiber for each thread of CUDA."""
TILED = ("moe_ffn", "attention", "linear_cross_entropy")
"""Operations whose CUDA kernels multiply tiles, whole ones however small the case is."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def faces_on(device: str, available: Sequence[str]) -> list[str]:
    """The faces that can run on ``device``.

    On a CPU, Triton only through its interpreter, and CUDA kernels only if compiled for it.
    """
    if device != "cpu":
        return [face for face in available if face != "cpu"]
    absent = set()
    if os.environ.get("TRITON_INTERPRET") != "1":
        absent.add("triton")
    if not cuda_on_cpu():
        absent.add("cuda")
    return [face for face in available if face not in absent]


def cases_of(face: str, operation: Operation) -> tuple[OpCase, ...]:
    """The hostile cases; for a slow face the smoke subset, with the chosen ones of ``extra``."""
    if face == "triton":
        return operation.smoke_cases
    if face == "cuda" and operation.name in TILED:
        return operation.smoke_cases + tuple(operation.case(sizes) for sizes in operation.extra)
    return operation.hostile_cases


def parameters(
    operation: Operation, available: Sequence[str], name: str
) -> tuple[list[Any], list[str]] | None:
    """Values and ids of a test's parameter, or None for a parameter of another kind.

    ``smoke_case`` is for what is slow; ``face_case`` are pairs of a face and one of its cases.
    """
    faces = faces_on("cpu", available)
    if name == "face_case":
        pairs = [(face, case) for face in faces for case in cases_of(face, operation)]
        # The expectations of a case are kept for a while: put its faces side by side.
        pairs.sort(key=lambda pair: pair[1].label)
        return pairs, [f"{face}-{case.label}" for face, case in pairs]
    if name == "smoke_case":
        return list(operation.smoke_cases), [case.label for case in operation.smoke_cases]
    if name == "face":
        return list(faces), list(faces)
    if name == "dtype":
        return list(DTYPES), [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    if name == "mutant":
        return list(operation.mutants), [mutant.name for mutant in operation.mutants]
    if name == "layout":
        return list(LAYOUTS), list(LAYOUTS)
    return None


class TinySuite:
    """What is tried at the smallest size alone."""

    operation: ClassVar[Operation]
    door: ClassVar[Callable[..., Any]]
    find_face: ClassVar[Callable[[str, str], Any]]
    """``(operation name, face name)`` to the face's module."""

    def tiny(self, dtype: torch.dtype, seed: int = 0) -> tuple[OpCase, Arguments]:
        """The smallest case, with its inputs."""
        case = self.operation.case(self.operation.tiny)
        return case, case.make_inputs(dtype, seed=seed)

    def run(self, inputs: Arguments, face: str | None = None) -> tuple[Tensor, ...]:
        """The door on ``inputs``; all of its outputs."""
        return self.operation.call(type(self).door, inputs, face)

    def serving(self, face: str, case: OpCase, dtype: torch.dtype) -> Any:
        """The face's module.

        Raises:
            SkipTest: it leaves this case to the next face, with its reason.
        """
        module = type(self).find_face(self.operation.name, face)
        reason = unserved(module, case.make_inputs(dtype)) if hasattr(module, "unserved") else None
        if reason is not None:
            raise SkipTest(f"the {face} face leaves this to the next one: {reason}")
        return module

    def differentiable(self, inputs: Arguments) -> Arguments:
        """The same inputs, those with a gradient as leaves that require it."""
        leaves = {name: inputs[name].detach().requires_grad_() for name in self.operation.gradients}
        return {**inputs, **leaves}

    def test_opcheck(self, face: str) -> None:
        """Schema, autograd registration, fake tensors and AOT dispatch, as PyTorch checks them.

        On transposed inputs: results must have the strides the fakes promise all the same.
        """
        _, inputs = self.tiny(torch.float32)
        inputs = {
            name: LAYOUTS["transposed"](value) if may_change(self.operation, name, value) else value
            for name, value in inputs.items()
        }
        arguments = (*self.differentiable(inputs).values(), face)
        name = f"{self.operation.name}_forward"
        torch.library.opcheck(getattr(torch.ops.pyllm, name).default, arguments)

    def test_fake_and_meta(self, dtype: torch.dtype) -> None:
        """Without data, outputs and gradients have the shapes and dtypes they have with it."""
        case, inputs = self.tiny(dtype)
        real = expectations(case, dtype, "cpu", 0)[0]
        upstreams = {
            "d" + output.name: real.outputs[output.name]
            for output in self.operation.outputs
            if output.upstream is not None
        }
        meta = run_door(
            case, type(self).door, "reference", _each(inputs, _to_meta), _each(upstreams, _to_meta)
        )
        with FakeTensorMode() as mode:
            fake = run_door(
                case,
                type(self).door,
                "reference",
                _each(inputs, mode.from_tensor),
                _each(upstreams, mode.from_tensor),
            )
        for got in (meta, fake):
            for have, want in ((got.outputs, real.outputs), (got.gradients, real.gradients)):
                for name, value in have.items():
                    assert (value.shape, value.dtype) == (want[name].shape, want[name].dtype), name

    def test_compile(self) -> None:
        """One graph without breaks, the same numbers forward and backward."""
        case, inputs = self.tiny(torch.float32)
        upstreams = expectations(case, torch.float32, "cpu", 0)[2]
        torch.compiler.reset()
        compiled = torch.compile(type(self).door, fullgraph=True, backend="aot_eager")
        got = run_door(case, compiled, "reference", inputs, upstreams)
        _assert_same_bits(got, run_door(case, type(self).door, "reference", inputs, upstreams))


class ForwardSuite(TinySuite):
    """What every operation must pass, with a backward or without one."""

    def test_face(self, face_case: tuple[str, OpCase], dtype: torch.dtype) -> None:
        """Forward and backward of the face, called directly, are within the error budget."""
        face, case = face_case
        check_face(case, self.serving(face, case, dtype), dtype)

    def test_small_blocks(self, dtype: torch.dtype) -> None:
        """Every case once more on the cpu face, cut into as many pieces as it can be."""
        operation = self.operation
        face = type(self).find_face(operation.name, "cpu")
        if face is None or not operation.blocks:
            raise SkipTest("no cpu face, or one whose launcher cuts nothing")
        before = {name: getattr(face, name) for name in operation.blocks}
        vars(face).update(operation.blocks)
        try:
            for case in operation.hostile_cases:
                check_face(case, face, dtype)
        finally:
            vars(face).update(before)

    def test_life_size(self, face: str) -> None:
        """The sizes of real models, those the benchmark times, in the dtypes they run in."""
        if face == "reference" or face in INTERPRETED:
            raise SkipTest("the truth itself, or a face made for another device")
        for sizes in self.operation.bench.values():
            case = self.operation.case(sizes)
            for dtype in (torch.float32, torch.bfloat16):
                check_face(case, self.serving(face, case, dtype), dtype)
                expectations.cache_clear()  # hundreds of megabytes

    def test_threads(self, dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
        """The cases with most work, on several threads, in every dtype.

        Only the face runs on them: a thread sanitizer cannot see what orders PyTorch's own threads,
        and would report the reference.
        """
        face = type(self).find_face(self.operation.name, "cpu")
        if face is None:
            raise SkipTest("no cpu face")
        set_threads(1)
        largest = sorted(self.operation.hostile_cases, key=_volume)[-4:]
        for threads in (2, 4):
            for case in largest:
                check_face(case, _OnThreads(face, threads), dtype)

    def test_door(self, smoke_case: OpCase, face: str, dtype: torch.dtype) -> None:
        """The same through the public function and autograd."""
        self.serving(face, smoke_case, dtype)
        check_door(smoke_case, type(self).door, face, dtype)

    def test_layout(self, smoke_case: OpCase, face: str, layout: str) -> None:
        """Strided, offset and transposed inputs and upstream gradients change nothing."""
        self.serving(face, smoke_case, torch.float32)
        check_door(smoke_case, type(self).door, face, torch.float32, change=LAYOUTS[layout])

    def test_mutant(self, mutant: Mutant, record_mutant: Callable[[str, str, bool], None]) -> None:
        """The check above sees this planted fault."""
        killed = is_killed(self.operation.smoke_cases, mutant, torch.float32)
        record_mutant(self.operation.name, mutant.name, killed)
        assert killed, f"{self.operation.name}: no case catches the mutant {mutant.name!r}"

    def test_source_mutants(self, record_mutant: Callable[[str, str, bool], None]) -> None:
        """Every operator, constant, index and call of the reference, spoilt, is seen.

        What no case can see, in any dtype, is declared with its reason; nothing else is.
        """
        operation = self.operation
        declared = {name for names in operation.equivalents.values() for name in names}
        alive = set()
        for mutant in source_mutants(operation.reference):
            lives = _lives(mutant, operation)
            if lives:
                alive.add(mutant.name)
            if mutant.name not in declared:
                record_mutant(operation.name, mutant.name, not lives)
        assert alive <= declared, f"not seen: {sorted(alive - declared)}"
        assert declared <= alive, f"declared, and seen all the same: {sorted(declared - alive)}"

    def test_deterministic(self, face: str, set_threads: Callable[[int], None]) -> None:
        """The same bits over ten runs, and on the cpu face over one, two and three threads."""
        case = self.operation.smoke_cases[-1 if face in INTERPRETED else 2]
        if face not in INTERPRETED:
            case = max(self.operation.hostile_cases, key=_volume)
        inputs = case.make_inputs(torch.float32)
        upstreams = expectations(case, torch.float32, "cpu", 0)[2]
        first = run_door(case, type(self).door, face, inputs, upstreams)
        for _ in range(10):
            _assert_same_bits(run_door(case, type(self).door, face, inputs, upstreams), first)
        if face != "cpu":
            return  # PyTorch's own operations split their sums by threads
        for threads in (1, 2, 3):
            set_threads(threads)
            _assert_same_bits(run_door(case, type(self).door, face, inputs, upstreams), first)


class OperationSuite(ForwardSuite):
    """For an operation with a backward. Subclasses set ``operation``, ``door``, ``find_face``."""

    def test_expanded_gradient(self, face: str) -> None:
        """``(...).sum().backward()`` feeds a gradient of stride 0."""
        case, inputs = self.tiny(torch.float32)
        upstreams = {
            "d" + output.name: torch.ones(())
            for output in self.operation.outputs
            if output.upstream is not None
        }
        plain, _, real = expectations(case, torch.float32, "cpu", 0)
        expanded = {name: one.expand(real[name].shape) for name, one in upstreams.items()}
        dense = {name: gradient.contiguous() for name, gradient in expanded.items()}
        door = type(self).door
        got = run_door(case, door, face, inputs, expanded)
        same = run_door(case, door, face, inputs, dense)
        assert plain.outputs.keys() >= got.outputs.keys()
        _assert_same_bits(got, same)

    def test_nan_reaches_the_gradients(self, face: str) -> None:
        """A NaN in an input or an upstream gradient is not hidden: the trainer counts on it."""
        face_module = type(self).find_face(self.operation.name, face)
        for case in self.operation.smoke_cases:
            inputs = case.make_inputs(torch.float32)
            upstreams = expectations(case, torch.float32, "cpu", 0)[2]
            for name in (*self.operation.gradients, *upstreams):
                spoilt = _with_nan({**inputs, **upstreams}, name)
                given = {key: spoilt[key] for key in inputs}
                back = {key: spoilt[key] for key in upstreams}
                wanted = run_face(case, self.operation.reference, given, back).gradients
                got = run_face(case, face_module, given, back).gradients
                for key, gradient in wanted.items():
                    if not bool(gradient.isfinite().all()):
                        where = f"{case.label}: NaN in {name}, none in d{key}"
                        assert not bool(got[key].isfinite().all()), where

    def test_gradcheck(self, face: str) -> None:
        """The backward against finite differences in float64, undefined gradients included."""
        if face == "triton":
            raise SkipTest("hundreds of calls through Triton's interpreter")
        _, inputs = self.tiny(torch.float64)
        leaves = self.differentiable(inputs)
        names = self.operation.gradients

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            outputs = self.run({**inputs, **dict(zip(names, values, strict=True))}, face)
            return tuple(output for output in outputs if output.requires_grad)

        assert torch.autograd.gradcheck(function, tuple(leaves[name] for name in names))


class TinyInferenceSuite(TinySuite):
    """The smallest size of an operation without a backward, which may write to its inputs."""

    def test_gradients_are_refused(self, face: str) -> None:
        """They would stop here without a word; where none are recorded, nothing is refused."""
        _, inputs = self.tiny(torch.float32)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.dtype.is_floating_point:
                wanting = {**inputs, name: value.detach().clone().requires_grad_()}
                assert f"got {name} that require one" in self._refusal(wanting, face)
                with torch.no_grad():
                    self.run(wanting, face)

    def _refusal(self, inputs: Arguments, face: str) -> str:
        try:
            self.run(inputs, face)
        except ValueError as error:
            return str(error)
        return ""

    def test_writes_are_counted(self, face: str) -> None:
        """Autograd sees by a tensor's version that it changed since it was saved."""
        _, inputs = self.tiny(torch.float32)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        before = {name: value._version for name, value in tensors.items()}
        self.run(inputs, face)
        counted = {name for name, value in tensors.items() if value._version > before[name]}
        assert counted == set(self.operation.given(self.operation.mutates, inputs))


class InferenceSuite(TinyInferenceSuite, ForwardSuite):
    """For an operation without a backward."""


class _OnThreads:
    """A face whose functions run with PyTorch's number of threads set, as it was again after."""

    def __init__(self, face: Any, threads: int) -> None:
        self.face, self.threads = face, threads

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.face, name)

        def call(*arguments: Any, **named: Any) -> Any:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                return function(*arguments, **named)
            finally:
                torch.set_num_threads(before)

        return call


def _lives(mutant: SourceMutant, operation: Operation) -> bool:
    """Whether no case sees the mutant: first the few small ones, then all, in every dtype."""
    try:
        face = mutant.module(operation.reference)
    except Exception:
        return False  # it cannot even be imported
    # The few largest cases would take nine tenths of the time.
    cases = [case for case in operation.hostile_cases if _volume(case) <= MUTANT_VOLUME]
    return survives(face, operation.smoke_cases, DTYPES) and survives(face, cases, DTYPES)


def _with_nan(values: Arguments, name: str) -> Arguments:
    """The same, with a NaN at the first place of one tensor."""
    value = values[name].clone()
    if value.numel():
        value.view(-1)[0] = float("nan")
    return {**values, name: value}


def _volume(case: OpCase) -> int:
    product = 1
    for size in case.sizes.values():
        product *= size if isinstance(size, int) and size > 0 else 1
    return product


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _each(values: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    return {
        name: change(value) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _assert_same_bits(got: Result, expected: Result) -> None:
    for have, want in ((got.outputs, expected.outputs), (got.gradients, expected.gradients)):
        for name, value in have.items():
            assert torch.equal(value, want[name]), name

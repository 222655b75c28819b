"""How an operation gets its faces: registration with PyTorch's dispatcher and the choice of face.

An operation ``op`` becomes two dispatcher operations, ``pyllm::op_forward`` and
``pyllm::op_backward``. Both take the name of the face as their last argument, so the choice
travels with the call and the backward runs the same face as the forward.

``torch.library.Library.define / impl`` is used rather than ``custom_op``: a call costs about 3
microseconds instead of 6 to 11.

A face that does not serve everything has a function ``unserved`` beside its two others:
``unserved(stage, *arguments)`` gives the reason why ``<op>_<stage>`` does not serve these
arguments, or None. The next best face then takes the call, and a warning says so once; a face that
was asked for by name raises the reason.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyllm._native import cpu_extension, cuda_extension, cuda_on_cpu

LIBRARY = torch.library.Library("pyllm", "DEF")

FACE_PACKAGES = {
    "reference": "pyllm.reference",
    "cpu": "pyllm.cpu_kernels",
    "triton": "pyllm.triton_kernels",
    "cuda": "pyllm.cuda_kernels",
    "torch": "pyllm.torch_kernels",
}
_DEVICE_KEYS = ("CPU", "CUDA", "MPS")

# The compute capability that a face needs of a card: Triton has dropped Turing.
_CAPABILITY_OF_FACE = {"triton": (8, 0), "cuda": (7, 5)}

# Read once, here: no getenv on the path of a call.
_FORCED_FACE = os.environ.get("PYLLM_FACE") or None
if _FORCED_FACE is not None and _FORCED_FACE not in FACE_PACKAGES:
    raise ValueError(
        f"PYLLM_FACE={_FORCED_FACE!r} is not a face; expected one of {', '.join(FACE_PACKAGES)}"
    )

# operation -> device type -> faces, the fastest first. Filled by `register`.
PREFERENCES: dict[str, dict[str, tuple[str, ...]]] = {}


@cache
def face_module(op: str, face: str) -> ModuleType | None:
    """The module that holds ``<op>_forward`` and ``<op>_backward``, or None where there is none."""
    if face == "cpu" and cpu_extension() is None or face == "cuda" and cuda_extension() is None:
        return None
    name = f"{FACE_PACKAGES[face]}.{op}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only "this face does not exist" or "triton is not installed" mean None.
        if error.name in (name, FACE_PACKAGES[face], "triton"):
            return None
        raise


@cache
def available_faces(op: str) -> tuple[str, ...]:
    """Names of the faces of ``op`` that can be imported on this machine."""
    return tuple(face for face in FACE_PACKAGES if face_module(op, face) is not None)


@cache
def _devices_of(face: str) -> tuple[str, ...] | None:
    """The devices a face is written for: a raw address of another would crash the process.

    None for all of them. Without a card, Triton's interpreter and CUDA kernels that were compiled
    for the CPU run on CPU tensors.
    """
    if face == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return ("cuda", "meta") + ("cpu",) * interpreted
    if face == "cuda":
        return ("cpu" if cuda_on_cpu() else "cuda", "meta")
    return ("cpu", "meta") if face == "cpu" else None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _best_capability() -> tuple[int, int] | None:
    """Of the cards of this machine; None without one."""
    if not torch.cuda.is_available():
        return None
    return max(_capability(index) for index in range(torch.cuda.device_count()))


@cache
def _cuda_obstacle(index: int) -> str | None:
    """Why the CUDA kernels do not run on a card: its driver, or what they were compiled for."""
    native = cuda_extension()
    if native is None or native.ON_CPU:
        return None
    with torch.cuda.device(index):
        reason: str = native.obstacle()
    return f"cuda:{index}: {reason}" if reason else None


@cache
def _cuda_runs_nowhere() -> bool:
    """Warns once, where that is so: calls would end in errors that another face does not have."""
    if not torch.cuda.is_available():
        return False
    # The current card first, and others only if need be: one that is asked gets a context, which is
    # half a gigabyte of it.
    current, obstacles = torch.cuda.current_device(), []
    for index in sorted(range(torch.cuda.device_count()), key=lambda index: index != current):
        obstacle = _cuda_obstacle(index)
        if obstacle is None:
            return False
        obstacles.append(obstacle)
    warnings.warn(
        f"the cuda face cannot be used: {'; '.join(obstacles)}. Update the driver, or "
        "install pyllm again on this machine (`pip install -e .`)",
        UserWarning,
        stacklevel=2,
    )
    return True


def serves(op: str, face: str, device_type: str) -> bool:
    devices = _devices_of(face)
    if devices is not None and device_type not in devices:
        return False
    if device_type == "cuda" and face in _CAPABILITY_OF_FACE:
        best = _best_capability()
        if best is not None and best < _CAPABILITY_OF_FACE[face]:
            return False
        if face == "cuda" and _cuda_runs_nowhere():
            return False
    return face_module(op, face) is not None


@cache
def _best_face(op: str, device_type: str) -> str:
    """The best face, and after commas those that follow while one has limits."""
    preferred = (*PREFERENCES[op].get(device_type, ()), "reference")
    if _FORCED_FACE is not None:
        preferred = (_FORCED_FACE, *preferred)
    best: list[str] = []
    for face in dict.fromkeys(preferred):
        if serves(op, face, device_type):
            best.append(face)
            if _unlimited(op, face) is not None:
                break
    return ",".join(best)


@cache
def _unlimited(op: str, face: str) -> ModuleType | None:
    """The module of a face that serves every call that its device can make; else None."""
    module = None if "," in face else face_module(op, face)
    several_cards = face in _CAPABILITY_OF_FACE and torch.cuda.device_count() > 1
    return None if several_cards or hasattr(module, "unserved") else module


def choose_face(op: str, device_type: str, face: str | None) -> str:
    """Explicit argument, then ``PYLLM_FACE``, then the best face for the device.

    ``PYLLM_FACE`` is a wish: an operation without that face takes the best one it has.

    Returns:
        A face, or several with commas between: the first one that serves the call will take it.

    Raises:
        ValueError: ``face`` names no face of ``op`` on this machine and device.
    """
    if face is None:
        return _best_face(op, device_type)
    here = [known for known in available_faces(op) if serves(op, known, device_type)]
    if not isinstance(face, str) or face not in here:
        raise ValueError(
            f"{op} has no face {face!r} here for tensors on {device_type}; "
            f"expected one of {', '.join(here)}"
        )
    return face


# torch.compile asks once, while tracing. This is what torch.compiler.assume_constant_result sets,
# which would import the compiler: 150 MB and a second of everybody who never compiles.
choose_face._dynamo_marked_constant = True  # type: ignore[attr-defined]


def nothing_between(*tensors: Tensor) -> bool:
    """Would the dispatcher only call the kernel, so that a door may go past it?

    That takes it 10 microseconds. It has to be asked where it does more: for a compiler, a tracer,
    a mode, a function transform, a gradient, a tensor that another one stands behind.
    """
    native = torch._C
    if (
        torch.compiler.is_compiling()
        or native._len_torch_dispatch_stack()
        or native._len_torch_function_stack()
        or native._functorch.peek_interpreter_stack() is not None
        or native._get_tracing_state() is not None
    ):
        return False
    gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.is_neg() or (gradients and tensor.requires_grad):
            return False
    return True


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of an active autocast region on this device, or None outside of one."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def register(
    op: str,
    *,
    forward: str,
    backward: str,
    fake_forward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    gradient: Callable[..., Any],
    faces: dict[str, tuple[str, ...]],
) -> None:
    """Define ``pyllm::<op>_forward`` and ``pyllm::<op>_backward`` and connect them.

    Args:
        forward: schema after the name, with no defaults (the dispatcher drops trailing defaults)
            and ``str face`` last, for example ``"(Tensor x, str face) -> Tensor"``.
        backward: the same for the backward.
        fake_forward, fake_backward: shapes and dtypes only, for FakeTensor and meta tensors.
        setup_context, gradient: as ``torch.library.register_autograd`` wants them.
        faces: device type -> faces, the fastest first; what is missing here is skipped.
    """
    PREFERENCES[op] = faces
    _define(op, f"{op}_forward", forward, fake_forward)
    _define(op, f"{op}_backward", backward, fake_backward)
    n_inputs = forward.partition("->")[0].count(",") + 1

    def gradient_or_none(ctx: Any, *upstream: Any) -> Any:
        # Doors that do not let autograd make zeros are called with None where nothing flows back.
        if all(each is None for each in upstream):
            return (None,) * n_inputs
        return gradient(ctx, *upstream)

    torch.library.register_autograd(
        f"pyllm::{op}_forward", gradient_or_none, setup_context=setup_context, lib=LIBRARY
    )


def register_inference(
    op: str, *, forward: str, fake: Callable[..., Any], faces: dict[str, tuple[str, ...]]
) -> None:
    """Define ``pyllm::<op>_forward`` alone, for an operation without a backward.

    Its door refuses inputs that require a gradient. It may write to inputs that its schema
    declares, such as ``Tensor(a!) cache``; autograd then sees that they changed.

    Args:
        forward, fake, faces: see :func:`register`.
    """
    PREFERENCES[op] = faces
    _define(op, f"{op}_forward", forward, fake)


def _define(op: str, name: str, schema: str, fake: Callable[..., Any]) -> None:
    LIBRARY.define(name + schema)
    arguments = getattr(torch.ops.pyllm, name).default._schema.arguments
    written = tuple(
        place for place, one in enumerate(arguments) if one.alias_info and one.alias_info.is_write
    )
    run = _runner(op, name, written)
    for key in _DEVICE_KEYS:
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"pyllm::{name}", fake, lib=LIBRARY)


def _runner(op: str, name: str, written: tuple[int, ...]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        *values, face = arguments
        module = _unlimited(op, face) or _module_for(op, name, face, values)
        results = getattr(module, name)(*values)
        for place in written:  # a kernel writes past PyTorch, which counts the writes to a tensor
            if arguments[place] is not None:
                increment_version(arguments[place])
        if results is None:
            return None
        # The fakes promise contiguous results, and compiled code relies on their strides.
        if isinstance(results, Tensor):
            return results.contiguous()
        return tuple(result.contiguous() for result in results)

    return run


def _module_for(op: str, name: str, faces: str, values: list[Any]) -> ModuleType:
    """The first of these faces that serves the call, with a warning if it is not the first of all.

    Raises:
        ValueError: none of them does.
    """
    obstacles: list[str] = []
    for face in faces.split(","):
        module = face_module(op, face)
        if module is None:
            raise ValueError(f"{op} has no face {face!r} on this machine")
        obstacle = _obstacle(module, name.removeprefix(f"{op}_"), face, values)
        if obstacle is None:
            if obstacles:
                _say_once(op, face, "; ".join(obstacles))
            return module
        obstacles.append(f"{face}: {obstacle}")
    raise ValueError(f"{op} does not serve this call: {'; '.join(obstacles)}")


def _obstacle(module: ModuleType, stage: str, face: str, values: list[Any]) -> str | None:
    device = _device_of(values)
    if device.type == "cuda" and face in _CAPABILITY_OF_FACE:
        have, need = _capability(device.index), _CAPABILITY_OF_FACE[face]
        if have < need:
            return f"{device} has compute capability {have[0]}.{have[1]}, not {need[0]}.{need[1]}"
        obstacle = _cuda_obstacle(device.index) if face == "cuda" else None
        if obstacle is not None:
            return obstacle
    unserved: Callable[..., str | None] | None = getattr(module, "unserved", None)
    return None if unserved is None else unserved(stage, *values)


def _device_of(values: list[Any]) -> torch.device:
    return next(value.device for value in values if isinstance(value, Tensor))


@cache
def _say_once(op: str, face: str, reason: str) -> None:
    warnings.warn(
        f"{op} runs on the {face} face, which is slower ({reason})", UserWarning, stacklevel=2
    )

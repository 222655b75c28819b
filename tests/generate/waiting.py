"""Finds what would make a GPU's step wait for the host, or differ from run to run, on the CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm.ops import _cache, _checks
from pyllm.ops._registry import PREFERENCES, face_module

READS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
    "lift_fresh",
    "pin_memory",
)
"""Operators that read values on the host, make shapes of them, or bring numbers from the host."""
METHODS = (
    "tolist",
    "numpy",
    "item",
    "cpu",
    "cuda",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)
"""Methods of tensors that do so without an operator, when they are on the CPU."""


class Waits(Exception):
    """This would wait for the device."""


class NoMethods(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS or (name == "where" and len(args) == 1):
            raise Waits(name)
        return func(*args, **(kwargs or {}))


class NoOperators(TorchDispatchMode):
    """Runs an operation of ours on the face that a GPU without compiled kernels takes, with the
    mode on inside of it, too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "pyllm":
            op = name.removesuffix("_forward")
            faces = [face for face in PREFERENCES[op]["cuda"] if face in ("torch", "reference")]
            function = getattr(face_module(op, faces[0]), name)
            with NoMethods(), self:
                found = function(*args[:-1])
            return found
        # Of an integer, repeat_interleave is no operator; of a tensor it makes a shape of values.
        if name in READS:
            raise Waits(name)
        if name.startswith(("index", "_index")):
            picked = args[1] if isinstance(args[1], (list, tuple)) else ()
            if any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in picked):
                raise Waits(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raises :class:`Waits` where a step on a GPU would wait. The doors read values on the CPU
    only, so not here."""
    with monkeypatch.context() as patch, NoMethods(), NoOperators():
        patch.setattr(_checks, "is_readable", lambda indices: False)
        patch.setattr(_cache, "is_readable", lambda indices: False)
        yield

"""Modules without numbers: their names and shapes, and nothing computed for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ACTIVE: ContextVar[bool] = ContextVar("outlined", default=False)


@contextmanager
def outlined() -> Iterator[None]:
    """What is built in here is on the meta device, draws no initial weights and has no tables of
    positions.

    Computing any of that there would change nothing, but import PyTorch's compiler, which takes
    150 MB.
    """
    token = _ACTIVE.set(True)
    try:
        with torch.device("meta"), _NothingDrawn():
            yield
    finally:
        _ACTIVE.reset(token)


def is_outlined() -> bool:
    """Inside of :func:`outlined`?"""
    return _ACTIVE.get()


class _NothingDrawn(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)

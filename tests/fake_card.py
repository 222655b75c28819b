"""Runs a script on a card that is none: ``python tests/fake_card.py scripts/train_moe.py ...``.

Its tensors say that they are on ``cuda:0`` and compute on the CPU. What a CPU lets pass and a card
refuses is an error here, too: an operation on tensors of both, an array of a card's tensor, a
device without its number where PyTorch wants one. Kernels, streams and graphs are not looked at:
operations run on the reference, and a graph is the call that would be captured.

Each tensor is a wrapper (``__torch_dispatch__``) of one of the CPU. To PyTorch's C++ it is on the
CPU as well, since autograd asks a device for its streams, and a CPU build has no other device.
"""

import os
import runpy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
ASKED_HOST = torch.device("cpu", 0)
"""Where ``to("cpu")`` moves: autograd's own ``to`` has no number, and stays where it is."""
MAY_MIX = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take tensors of both devices; of an index PyTorch takes those of the CPU, too."""


class OnCard(Tensor):
    """A tensor of the card."""

    inner: Tensor
    device = property(lambda self: CARD)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCard":
        made: OnCard = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=HOST,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnCard":
        return OnCard(self.inner.detach().clone()).requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run_on_card(func, args, kwargs or {})


def is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def require_one_device(func: Any, name: str, tensors: list[Tensor]) -> None:
    """Refuse what a card refuses."""
    on_card = [isinstance(one, OnCard) for one in tensors]
    if name in MAY_MIX:
        if name.startswith(("index", "_index")) and any(on_card) and not on_card[0]:
            raise RuntimeError(f"{func}: an index on the card into a tensor of the CPU")
        return
    if any(on_card) and any(one.dim() > 0 and not isinstance(one, OnCard) for one in tensors):
        found = [(one.device, tuple(one.shape)) for one in tensors]
        raise RuntimeError(f"{func}: tensors on the card and on the CPU: {found}")


def run_on_card(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation with tensors of the card, or that makes some."""
    name = func._schema.name.split("::")[1]
    values, structure = tree_flatten((args, kwargs))
    tensors = [value for value in values if isinstance(value, Tensor)]
    require_one_device(func, name, tensors)
    cards = [one for one in tensors if isinstance(one, OnCard)]
    where = kwargs.get("device")
    stays = where is None or torch.device(where) == HOST
    to_card = is_card(where) or (stays and bool(cards))

    plain = [value.inner if isinstance(value, OnCard) else value for value in values]
    plain_args, plain_kwargs = tree_unflatten(plain, structure)
    if where is not None:
        plain_kwargs = {**plain_kwargs, "device": HOST}
    with _disable_current_modes():
        result = func(*plain_args, **plain_kwargs)
        if name == "_to_copy" and to_card != bool(cards) and result is plain_args[0]:
            result = result.clone()
    written = {id(one.inner): one for one in cards}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or not to_card:
            return value
        found = written.get(id(value))
        return OnCard(value) if found is None else found

    return tree_map(wrap, result)


class Card(TorchDispatchMode):
    """Sends the operations there that have no tensor of the card yet."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if given.get("pin_memory"):
            given["pin_memory"] = False
        values = tree_flatten((args, given))[0]
        if is_card(given.get("device")) or any(isinstance(one, OnCard) for one in values):
            return run_on_card(func, args, given)
        return func(*args, **given)


class Nothing:
    """A stream, an event, a graph or a choice of card."""

    cuda_stream = 0

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *error: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


def share_of_memory(device: Any = None) -> float:
    if isinstance(device, torch.device) and device.index is None:
        raise ValueError(f"Expected a torch.device with a specified index, got {device}")
    return 1.0


MEMORY = 4 << 30
PROPERTIES = SimpleNamespace(
    name="no card",
    total_memory=MEMORY,
    multi_processor_count=16,
    shared_memory_per_block_optin=64 << 10,
    major=7,
    minor=5,
)


def install_runtime() -> None:
    """``torch.cuda`` of a machine with one card of Turing's."""
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": False,
        "is_current_stream_capturing": False,
        "get_device_capability": (7, 5),
        "get_device_properties": PROPERTIES,
        "get_device_name": PROPERTIES.name,
        "mem_get_info": (MEMORY, MEMORY),
        "get_sync_debug_mode": 0,
        "get_rng_state_all": [],
        "current_stream": Nothing(),
    }
    answers |= dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), 0)
    silent = ("init", "_lazy_init", "synchronize", "empty_cache", "manual_seed", "manual_seed_all")
    answers |= dict.fromkeys((*silent, "set_rng_state", "set_device", "set_sync_debug_mode"))
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **named: _answer)
    for name in ("Stream", "Event", "CUDAGraph", "device", "stream", "graph"):
        setattr(torch.cuda, name, Nothing)
    setattr(torch.cuda, "get_per_process_memory_fraction", share_of_memory)  # noqa: B010


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def install_tensors() -> None:
    """Ways to a card that do not come by ``Card``, and what PyTorch knows of the real one only."""

    def numbered(value: Any) -> Any:
        if not isinstance(value, str | torch.device) or value == "":
            return value
        return {"cuda": CARD, "cpu": ASKED_HOST}.get(torch.device(value).type, value)

    def moving(plain: Any) -> Any:
        return lambda self, *given, **named: plain(
            self, *map(numbered, given), **{name: numbered(one) for name, one in named.items()}
        )

    def making(plain: Any) -> Any:
        return lambda *given, device=None, **named: (
            plain(*given, **named) if device is None else plain(*given, **named).to(device)
        )

    def asking(plain: Any) -> Any:
        return lambda kind="cpu": plain("cpu" if kind == "cuda" else kind)

    replace(Tensor, "to", moving)
    setattr(Tensor, "cpu", lambda self: self.to("cpu"))  # noqa: B010
    for name in ("tensor", "as_tensor"):
        replace(torch, name, making)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        replace(torch, name, asking)
    setattr(torch.amp, "is_autocast_available", lambda kind: True)  # noqa: B010
    replace(
        torch, "autocast", lambda plain: lambda _, *given, **named: plain("cpu", *given, **named)
    )
    replace(torch.amp, "GradScaler", lambda plain: lambda _, **named: plain("cpu", **named))
    # A wrapper has no version that inference's tensors could do without.
    setattr(torch, "inference_mode", lambda mode=True: torch.no_grad())  # noqa: B010
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def main(script: str, *arguments: str) -> None:
    os.environ["PYLLM_FACE"] = "reference"
    install_runtime()
    install_tensors()
    with Card():
        import pyllm.generate.device_step as device_step

        setattr(device_step, "capture_graph", lambda step: step.run)  # noqa: B010
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])

r"""AdamW with a state of 8 bits (Dettmers et al. 2022, arXiv:2110.02861), from bitsandbytes.

Both moments are kept as one byte a number, in blocks of 256 with a float32 scale each: 2.03 bytes
for each parameter instead of 8. The library is optional, ``pip install 'pyllm[gpu]'``; it has
kernels for CUDA (Turing included) and, slower, for the CPU.

What is added to it here: a state dict of plain tensors, as checkpoints hold them, and an update
that has either happened or not when memory runs out.
"""

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

BLOCK = 256
"""Numbers that share a scale."""
LEAST = 4096
"""A tensor with fewer numbers is kept in float32."""
_CODES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""What the 256 values of a byte stand for: the same for all tensors, and not saved."""


def make_adamw8bit(parameters: Iterable[Tensor], **settings: Any) -> Optimizer:
    """The optimizer; ``settings`` as for ``torch.optim.AdamW``.

    Raises:
        ValueError: bitsandbytes is not installed, or does not run here.
    """
    made: Optimizer = _library()(parameters, **settings)
    return made


def require_adamw8bit() -> None:
    """Raises:
    ValueError: bitsandbytes is not installed, or does not run here.
    """
    _library()


def is_adamw8bit(optimizer: Optimizer) -> bool:
    """Is it one of :func:`make_adamw8bit`?"""
    return hasattr(optimizer, "init_state") and hasattr(optimizer, "update_step")


def kept_by_adamw8bit(parameter: Tensor) -> dict[str, Tensor]:
    """Names, shapes and dtypes of what is saved for a parameter, its count of steps aside."""
    if parameter.numel() < LEAST:
        return {name: torch.empty_like(parameter) for name in ("state1", "state2")}
    blocks = -(-parameter.numel() // BLOCK)
    scales = torch.empty(blocks, dtype=torch.float32, device=parameter.device)
    moments = {
        name: torch.empty_like(parameter, dtype=torch.uint8) for name in ("state1", "state2")
    }
    return {**moments, "absmax1": scales, "absmax2": scales}


@cache
def _library() -> Any:
    # At its import it warns of a kernel for 4 bits, of which nothing here has a use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # ImportError, and what its native parts raise where they don't fit
        missing = isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"
        what = "is not installed" if missing else f"does not work here ({error})"
        raise ValueError(
            f"train.optimizer adamw8bit needs bitsandbytes, which {what}: pip install "
            "'pyllm[gpu]', or give --train.optimizer adamw or muon"
        ) from None

    class PlainAdamW8bit(AdamW8bit):
        """See the module."""

        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            state = self.state[p]
            before = state["step"]
            try:
                super().update_step(group, p, gindex, pindex)
            except BaseException:
                state["step"] = before  # counted before the kernel that failed
                raise
            increment_version(p)  # the kernels write past PyTorch

        def state_dict(self) -> dict[str, Any]:
            content = Optimizer.state_dict(self)  # the library's own hides tensors from FSDP
            content["state"] = {
                index: {
                    name: torch.tensor(float(value)) if name == "step" else value
                    for name, value in values.items()
                    if name not in _CODES
                }
                for index, values in content["state"].items()
            }
            return content

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            state = {}
            for index, values in state_dict["state"].items():
                state[index] = {**values, "step": int(values["step"])}
                if values["state1"].dtype == torch.uint8:
                    state[index] |= {name: self.name2qmap[code] for name, code in _CODES.items()}
            super().load_state_dict({**state_dict, "state": state}, move_to_device)

    return PlainAdamW8bit

"""Blocks of a matrix product: which fit a card, and which of them Triton shall try there.

On a card, ``launch`` times the few configurations that fit its shared memory once per kernel, shape
and dtype, and keeps the fastest. All configurations of one kernel take the same steps along the
reduction, so that which one wins should not change the order of any sum. Not yet measured on a
card: that the lists hold the best configuration, and that the bits are the same.

In Triton's interpreter nothing is timed and ``SMALL`` is launched, so that even small tests walk
through several blocks in every direction.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
import triton
from torch import Tensor

WORTH_TIMING = 2**30
"""Multiplications of a product from which its configurations are timed: a millisecond or so on the
smallest card."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

CARD_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Of every launch: Triton 3.10 is to compile without fused multiply-add unless told, of which 3.9
warns. The interpreter passes over them."""


@dataclass(frozen=True)
class Blocks:
    """One configuration: ``m x n`` of the product for a program, ``k`` of the sum at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    products: int = 1
    """How many right-hand blocks are multiplied with one left-hand block."""

    indirect: bool = False
    """Whether the loop loads the addresses of its rows: that takes Triton every other stage."""

    def shared(self, item_size: int) -> int:
        """Bytes of shared memory, an upper bound: the blocks of every stage of the pipeline."""
        columns = self.m + self.products * self.n
        if self.indirect:
            return self.k * ((self.stages + 1) // 2 * columns * item_size + 4 * self.stages)
        return self.stages * self.k * columns * item_size

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


SMALL = Blocks(16, 32, 16, 4, 1)
"""In the interpreter; sides of different length, so that a mistaken one shows."""


@cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that one block may have on this card."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def fitting(blocks: tuple[Blocks, ...], item_size: int, limit: int) -> tuple[Blocks, ...]:
    """The configurations that a card with ``limit`` bytes of shared memory can run."""
    return tuple(one for one in blocks if one.shared(item_size) <= limit)


def on_its_card(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a launcher with its first tensor's card as the current one: Triton launches there."""

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        first = next(iter((*arguments, *named.values())))
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return function(*arguments, **named)

    return run


@cache
def _autotuned(kernel: Any, blocks: tuple[Blocks, ...], key: tuple[str, ...]) -> Any:
    configs = [
        triton.Config(one.constants, num_warps=one.warps, num_stages=one.stages) for one in blocks
    ]
    return triton.autotune(configs=configs, key=list(key))(kernel)


def launch(
    kernel: Any,
    blocks: tuple[Blocks, ...],
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    key: tuple[str, ...],
    example: Tensor,
    worth_timing: bool,
    **arguments: Any,
) -> None:
    """Launch ``kernel`` in the fastest of ``blocks`` for the values of the arguments in ``key``.

    Args:
        kernel: takes ``BLOCK_M``, ``BLOCK_N`` and ``BLOCK_K``. It must not read what it writes: it
            runs many times while it is timed.
        blocks: the configurations; some must fit every card, and the first that does is taken
            where nothing is timed.
        grid: from the constants to the number of programs.
        key: arguments for each value of which the configurations are timed again.
        example: a tensor operand, for the card and the size of an element.
        worth_timing: whether the product is large; timing and compiling takes seconds.
        arguments: all others of the kernel.
    """
    if INTERPRETED:
        kernel[grid](**arguments, **blocks[0].constants, **CARD_OPTIONS)
        return
    limit = shared_memory(example.device.index)
    fits = fitting(blocks, example.element_size(), limit)
    # Timing waits for the device, which a stream that is being captured must not.
    if worth_timing and len(fits) > 1 and not torch.cuda.is_current_stream_capturing():
        _autotuned(kernel, fits, key)[grid](**arguments, **CARD_OPTIONS)
        return
    first = fits[0]
    options = {"num_warps": first.warps, "num_stages": first.stages, **CARD_OPTIONS}
    kernel[grid](**arguments, **first.constants, **options)


def row_shape(width: int) -> dict[str, int]:
    """Rows and columns of a program that walks along rows: eight numbers for each thread of four
    warps, 16 bytes of the 16-bit ones."""
    columns = min(triton.next_power_of_2(width), 1024)
    return {"ROWS": min(1024 // columns, 64), "COLUMNS": columns}

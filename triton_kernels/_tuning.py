"""How kernels are launched: compiled for which arguments, in which blocks, on which card.

Triton compiles a kernel anew for an argument that is 1 and for one that is a multiple of 16, each
argument for itself: a second or more, for every length that happens to be one. So a ``Kernel`` here
is compiled twice at most: for tensors whose addresses and rows are all aligned, and for any others.
What changes from call to call, such as the number of tokens, is not looked at.

On a card, ``launch`` times the few configurations that fit its shared memory once per kernel, shape
and dtype, and keeps the fastest; a folder of Triton's tells the next process. All configurations of
one matrix product take the same steps along the reduction, so that which one wins should not change
the order of any sum. Not yet measured on a card: that the lists hold the best configuration, and
that the bits are the same.

In Triton's interpreter nothing is timed and ``SMALL`` is launched, so that even small tests walk
through several blocks in every direction.
"""

import inspect
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from statistics import median
from threading import Lock
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

WORTH_TIMING = 2**30
"""Multiplications of a product from which its configurations are timed: a millisecond or so on the
smallest card."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TIMED_RUNS = 15
AHEAD_SECONDS, CYCLES_PER_SECOND = 1e-2, 2e9
"""How long a card is kept waiting at most, by its fastest clock."""

CARD_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Of every launch: Triton 3.10 is to compile without fused multiply-add unless told, of which 3.9
warns. The interpreter passes over them."""

LENGTHS = ("width", "height", "hidden", "half", "depth", "stride", "words_per_split")
"""Arguments that are lengths of rows, as ``*_stride_*`` are: multiples of 16 in every model that is
meant to be fast."""

Grid = Callable[[dict[str, Any]], tuple[int, ...]] | tuple[int, ...]


class Kernel:
    """A Triton kernel, compiled once for aligned tensors and once for all others."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        parameters = inspect.signature(function).parameters
        self.arg_names = list(parameters)
        # Triton refuses to hear of its constants here.
        values = [name for name in parameters if parameters[name].annotation is not tl.constexpr]
        self.pointers = tuple(name for name in self.arg_names if name.endswith("_ptr"))
        self.lengths = tuple(
            name for name in self.arg_names if name in LENGTHS or "_stride_" in name
        )
        told = {*self.pointers, *self.lengths}
        free = [name for name in values if name not in told]
        self.aligned = triton.jit(do_not_specialize=free)(function)
        self.ragged = triton.jit(do_not_specialize=values)(function)

    def suited(self, arguments: dict[str, Any]) -> Any:
        """The compiled form for these arguments."""
        for name in self.lengths:
            if arguments[name] % 16:
                return self.ragged
        for name in self.pointers:
            if arguments[name].data_ptr() % 16:
                return self.ragged
        return self.aligned

    def start(self, grid: Grid, **arguments: Any) -> None:
        """Launch it; constants and ``num_warps`` come with the other arguments."""
        self.suited(arguments)[grid](**arguments, **CARD_OPTIONS)


class Configuration(Protocol):
    """How a kernel cuts its work, and what works on a piece."""

    @property
    def constants(self) -> dict[str, int]:
        """As the kernel names them."""

    @property
    def warps(self) -> int: ...

    @property
    def stages(self) -> int: ...


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
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(*arguments, **named)
        with torch.cuda.device(first.device):
            return function(*arguments, **named)

    return run


def milliseconds(call: Callable[[], None], quantiles: Any = None) -> list[float]:
    """How long a launch takes, the median of some. For ``triton.autotune``, whose own stopwatch
    takes 256 MB to empty the cache with: a training step on a small card has no such memory.

    The card is kept busy until the host has asked for all of them: on a large one these products
    take microseconds, a launch from Python tens of them, and all choices would look alike.
    """
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_RUNS + 1)]
    call()  # compiles
    begun = time.perf_counter()
    call()
    ahead = 2 * TIMED_RUNS * (time.perf_counter() - begun)
    torch.cuda._sleep(int(min(ahead, AHEAD_SECONDS) * CYCLES_PER_SECOND))
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    marks[-1].synchronize()
    return [median(one.elapsed_time(next_) for one, next_ in zip(marks, marks[1:], strict=False))]


@cache
def _tuner(kernel: Any, choices: tuple[Configuration, ...], key: tuple[str, ...]) -> Any:
    configs = [
        triton.Config(one.constants, num_warps=one.warps, num_stages=one.stages) for one in choices
    ]
    return triton.autotune(configs, list(key), do_bench=milliseconds, cache_results=True)(kernel)


_best: dict[tuple[object, ...], Any] = {}
"""Of each case that was timed, the configuration that won."""
_timing = Lock()
"""A tuner keeps the call that it is at in itself, and each card has a thread for its backward."""


def launch(
    kernel: Kernel,
    choices: tuple[Configuration, ...],
    grid: Grid,
    key: tuple[str, ...],
    worth_timing: bool,
    **arguments: Any,
) -> None:
    """Launch ``kernel`` in the fastest configuration for the values of the arguments in ``key``.

    Args:
        kernel: must not read what it writes: it runs many times while it is timed.
        choices: the configurations that fit the card; the first is taken where nothing is timed.
        grid: from the constants to the number of programs.
        key: arguments for each value of which the configurations are timed again: none that
            changes with the number of tokens.
        worth_timing: whether the work is large; timing and compiling takes seconds.
        arguments: all others of the kernel.
    """
    if len(choices) > 1 and worth_timing:
        suited = kernel.suited(arguments)
        dtypes = [value.dtype for value in arguments.values() if isinstance(value, Tensor)]
        card = torch.cuda.current_device()
        case = (suited, choices, card, *dtypes, *(arguments[name] for name in key))
        best = _best.get(case)
        if best is not None:
            suited[grid](**arguments, **best.all_kwargs(), **CARD_OPTIONS)
            return
        # Timing waits for the device, which a stream that is being captured must not.
        if not torch.cuda.is_current_stream_capturing():
            with _timing:
                tuner = _tuner(suited, choices, key)
                tuner[grid](**arguments, **CARD_OPTIONS)
                _best[case] = tuner.best_config
            return
    first = choices[0]
    options = {} if INTERPRETED else {"num_warps": first.warps, "num_stages": first.stages}
    kernel.start(grid, **arguments, **first.constants, **options)


def launch_product(
    kernel: Kernel,
    blocks: tuple[Blocks, ...],
    grid: Grid,
    key: tuple[str, ...],
    example: Tensor,
    worth_timing: bool,
    **arguments: Any,
) -> None:
    """``launch`` in those of ``blocks`` that fit the card of ``example``, a tensor operand."""
    if not INTERPRETED:
        limit = shared_memory(example.device.index)
        blocks = fitting(blocks, example.element_size(), limit)
    launch(kernel, blocks, grid, key, worth_timing and not INTERPRETED, **arguments)


def row_shape(width: int) -> dict[str, int]:
    """Rows and columns of a program that walks along rows: eight numbers for each thread of four
    warps, 16 bytes of the 16-bit ones."""
    columns = min(triton.next_power_of_2(max(width, 1)), 1024)
    return {"ROWS": min(1024 // columns, 64), "COLUMNS": columns}

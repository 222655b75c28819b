"""The stable counting sort of choices by expert, and the list of row blocks that products walk.

Four small kernels that never wait for the host: counts of each block of choices, their prefix sums,
the place of each choice, and the list of blocks. An expert that does not exist has no place: its
``position`` is -1, and what depends on it becomes NaN.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from pyllm.triton_kernels._tuning import CARD_OPTIONS
from pyllm.triton_kernels._variants import Variant
from torch import Tensor

from pyllm.reference.moe_dispatch import sort_by_expert as sort_in_pytorch

MOST_EXPERTS = 1024
"""Above this a block of choices by experts does not fit a program: PyTorch's operations sort."""
ENTRIES = 8192
"""Choices times experts that one program compares at once."""


@triton.jit
def count_kernel(
    experts_ptr,  # (R,) integers
    counts_ptr,  # (blocks, BLOCK_E) int32
    n_slots,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    names = tl.arange(0, BLOCK_E)
    experts = tl.load(experts_ptr + slots, mask=slots < n_slots, other=-1)
    hot = (experts[:, None] == names[None, :]).to(tl.int32)
    tl.store(counts_ptr + block * BLOCK_E + names, tl.sum(hot, axis=0))


@triton.jit
def scan_kernel(
    counts_ptr,  # (blocks, BLOCK_E) int32: counts on entry, sums of the blocks before on return
    offsets_ptr,  # (E + 1,) int32
    n_blocks,
    n_experts,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    names = tl.arange(0, BLOCK_E)
    before = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, n_blocks, BLOCK):
        blocks = first + tl.arange(0, BLOCK)
        at = counts_ptr + blocks[:, None] * BLOCK_E + names[None, :]
        inside = blocks[:, None] < n_blocks
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        before += tl.sum(counts, axis=0)
    tl.store(offsets_ptr, 0)
    tl.store(offsets_ptr + 1 + names, tl.cumsum(before, axis=0), mask=names < n_experts)


@triton.jit
def place_kernel(
    experts_ptr,  # (R,) integers
    counts_ptr,  # (blocks, BLOCK_E) int32, from scan_kernel
    offsets_ptr,  # (E + 1,) int32
    order_ptr,  # (R,) int32
    position_ptr,  # (R,) int32
    n_slots,
    n_experts,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    names = tl.arange(0, BLOCK_E)
    experts = tl.load(experts_ptr + slots, mask=slots < n_slots, other=-1)
    hot = (experts[:, None] == names[None, :]).to(tl.int32)
    starts = tl.load(offsets_ptr + names, mask=names < n_experts, other=0)
    starts += tl.load(counts_ptr + block * BLOCK_E + names)
    rank = tl.cumsum(hot, axis=0) - hot
    position = tl.sum(hot * (rank + starts[None, :]), axis=1)
    exists = (experts >= 0) & (experts < n_experts)
    tl.store(position_ptr + slots, tl.where(exists, position, -1), mask=slots < n_slots)
    tl.store(order_ptr + position, slots, mask=exists & (slots < n_slots))


@triton.jit
def tile_kernel(
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (2, tiles) int32: expert, or -1 where the list has ended; first row
    n_tiles,
    n_experts,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tiles = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    names = tl.arange(0, BLOCK_E)
    known = names < n_experts
    starts = tl.load(offsets_ptr + names, mask=known, other=0)
    ends = tl.load(offsets_ptr + 1 + names, mask=known, other=0)
    per_expert = tl.where(known, (ends - starts + ROWS - 1) // ROWS, 0)
    after = tl.cumsum(per_expert, axis=0)
    mine = (tiles[:, None] < after[None, :]) & (tiles[:, None] >= (after - per_expert)[None, :])
    expert = tl.max(tl.where(mine, names[None, :], -1), axis=1)
    rows = starts[None, :] + (tiles[:, None] - (after - per_expert)[None, :]) * ROWS
    first = tl.sum(tl.where(mine, rows, 0), axis=1)
    tl.store(tiles_ptr + tiles, expert, mask=tiles < n_tiles)
    tl.store(tiles_ptr + n_tiles + tiles, first, mask=tiles < n_tiles)


def _blocks(n_experts: int) -> tuple[int, int]:
    """Rows of a block, and the experts as a power of two."""
    columns = triton.next_power_of_2(n_experts)
    return max(min(ENTRIES // columns, 512), 1), columns


def _scan_block(block: int) -> int:
    """Of how many blocks the counts are summed at once: of fewer than others hold, or it spills."""
    return max(block // 8, 1)


def sort_by_expert(experts_NA: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(order_R, position_NA, offsets_E1)``, all int32, as the reference's sort does."""
    if n_experts > MOST_EXPERTS:
        return sort_in_pytorch(experts_NA, n_experts)
    experts_R = experts_NA.reshape(-1).contiguous()
    n_slots = experts_R.numel()
    block, block_e = _blocks(n_experts)
    n_blocks = triton.cdiv(n_slots, block)
    counts = experts_R.new_empty((n_blocks, block_e), dtype=torch.int32)
    order_R = experts_R.new_empty(n_slots, dtype=torch.int32)
    position_R = torch.empty_like(order_R)
    offsets_E1 = experts_R.new_empty(n_experts + 1, dtype=torch.int32)
    shape = {"BLOCK": block, "BLOCK_E": block_e, **CARD_OPTIONS}
    if n_slots:
        count_kernel[(n_blocks,)](experts_R, counts, n_slots, **shape)
    scan = {**shape, "BLOCK": _scan_block(block)}
    scan_kernel[(1,)](counts, offsets_E1, n_blocks, n_experts, **scan)
    if n_slots:
        place_kernel[(n_blocks,)](
            experts_R, counts, offsets_E1, order_R, position_R, n_slots, n_experts, **shape
        )
    return order_R, position_R.view(experts_NA.shape), offsets_E1


def list_tiles(offsets_E1: Tensor, n_rows: int, rows_per_tile: int) -> Tensor:
    """(2, tiles) int32: expert and first row of every block of rows.

    As long as it can get for ``n_rows``, whatever the load, since the host does not know the
    counts. Where the list has ended the expert is -1.
    """
    n_experts = offsets_E1.numel() - 1
    n_tiles = min(n_rows, n_rows // rows_per_tile + n_experts)
    if n_experts > MOST_EXPERTS:
        return _list_in_pytorch(offsets_E1, n_tiles, rows_per_tile)
    tiles = offsets_E1.new_empty((2, n_tiles))
    block, block_e = _blocks(n_experts)
    if n_tiles:
        tile_kernel[(triton.cdiv(n_tiles, block),)](
            offsets_E1,
            tiles,
            n_tiles,
            n_experts,
            ROWS=rows_per_tile,
            BLOCK=block,
            BLOCK_E=block_e,
            **CARD_OPTIONS,
        )
    return tiles


def _list_in_pytorch(offsets_E1: Tensor, n_tiles: int, rows_per_tile: int) -> Tensor:
    per_expert = (offsets_E1.diff() + rows_per_tile - 1) // rows_per_tile
    after = per_expert.cumsum(0)
    tiles = torch.arange(n_tiles, device=offsets_E1.device)
    expert = torch.searchsorted(after, tiles, right=True)
    known = expert < per_expert.numel()
    expert = expert.where(known, 0)
    first = offsets_E1[expert] + (tiles - (after - per_expert)[expert]) * rows_per_tile
    return torch.stack([expert.where(known, -1), first]).to(torch.int32)


def variants() -> Iterator[Variant]:
    """All four kernels for few, many and the most experts."""
    for n_experts in (16, 64, MOST_EXPERTS):
        block, block_e = _blocks(n_experts)
        shape = {"BLOCK": block, "BLOCK_E": block_e}
        for kernel, extra in (
            (count_kernel, {}),
            (scan_kernel, {"BLOCK": _scan_block(block)}),
            (place_kernel, {}),
            (tile_kernel, {"ROWS": 128}),
        ):
            constants = {**shape, **extra}
            signature = {
                name: "*i32" if name.endswith("_ptr") else "i32"
                for name in kernel.arg_names
                if name not in constants
            }
            name = f"{kernel.__name__.removesuffix('_kernel')}-{n_experts}"
            yield Variant(name, kernel, signature, constants)

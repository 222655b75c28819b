"""The stable counting sort of choices by expert, and the list of row blocks that products walk.

Four small kernels that never wait for the host: counts of each part of the choices, their prefix
sums, the place of each choice, and the list of blocks. An expert that does not exist has no place:
its ``position`` is -1, and what depends on it becomes NaN.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from pyllm.triton_kernels._tuning import Kernel
from pyllm.triton_kernels._variants import Variant, variant
from torch import Tensor

MOST_EXPERTS = 1024
"""Above this a block of choices by experts does not fit a program: PyTorch's operations sort."""
ENTRIES = 8192
"""Choices times experts that one program compares at once."""
MOST_PARTS = 256
"""Of the choices, by programs: one program adds up the counts of all parts, one after the other."""


@Kernel
def count_kernel(
    experts_ptr,  # (R,) integers
    counts_ptr,  # (parts, BLOCK_E) int32
    n_slots,
    steps,  # blocks of a part
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    names = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    for step in range(steps):
        slots = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        experts = tl.load(experts_ptr + slots, mask=slots < n_slots, other=-1)
        counts += tl.sum((experts[:, None] == names[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + part * BLOCK_E + names, counts)


@Kernel
def scan_kernel(
    counts_ptr,  # (parts, BLOCK_E) int32: counts on entry, sums of the parts before on return
    offsets_ptr,  # (E + 1,) int32
    n_parts,
    n_experts,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    names = tl.arange(0, BLOCK_E)
    before = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, n_parts, BLOCK):
        parts = first + tl.arange(0, BLOCK)
        at = counts_ptr + parts[:, None] * BLOCK_E + names[None, :]
        inside = parts[:, None] < n_parts
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        before += tl.sum(counts, axis=0)
    tl.store(offsets_ptr, 0)
    tl.store(offsets_ptr + 1 + names, tl.cumsum(before, axis=0), mask=names < n_experts)


@Kernel
def place_kernel(
    experts_ptr,  # (R,) integers
    counts_ptr,  # (parts, BLOCK_E) int32, from scan_kernel
    offsets_ptr,  # (E + 1,) int32
    order_ptr,  # (R,) int32
    position_ptr,  # (R,) int32
    n_slots,
    n_experts,
    steps,  # blocks of a part
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    names = tl.arange(0, BLOCK_E)
    starts = tl.load(offsets_ptr + names, mask=names < n_experts, other=0)
    starts += tl.load(counts_ptr + part * BLOCK_E + names)
    for step in range(steps):
        slots = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        experts = tl.load(experts_ptr + slots, mask=slots < n_slots, other=-1)
        hot = (experts[:, None] == names[None, :]).to(tl.int32)
        rank = tl.cumsum(hot, axis=0) - hot
        position = tl.sum(hot * (rank + starts[None, :]), axis=1)
        starts += tl.sum(hot, axis=0)
        exists = (experts >= 0) & (experts < n_experts)
        tl.store(position_ptr + slots, tl.where(exists, position, -1), mask=slots < n_slots)
        tl.store(order_ptr + position, slots.to(tl.int32), mask=exists & (slots < n_slots))


@Kernel
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


def _scan(block: int) -> dict[str, int]:
    """How many parts' counts are summed at once: of fewer than others hold, or it spills. One
    program does it all, so it is a large one."""
    return {"BLOCK": max(block // 2, 1), "num_warps": 16}


def sort_by_expert(experts_NA: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(order_R, position_NA, offsets_E1)``, all int32, as the reference's sort does."""
    if n_experts > MOST_EXPERTS:
        return _sort_in_pytorch(experts_NA, n_experts)
    experts_R = experts_NA.reshape(-1).contiguous()
    n_slots = experts_R.numel()
    block, block_e = _blocks(n_experts)
    steps = triton.cdiv(triton.cdiv(n_slots, block), MOST_PARTS)
    n_parts = triton.cdiv(n_slots, block * max(steps, 1))
    counts = experts_R.new_empty((n_parts, block_e), dtype=torch.int32)
    order_R = experts_R.new_empty(n_slots, dtype=torch.int32)
    position_R = torch.empty_like(order_R)
    offsets_E1 = experts_R.new_empty(n_experts + 1, dtype=torch.int32)
    shape = {"BLOCK": block, "BLOCK_E": block_e}
    if n_slots:
        count_kernel.start(
            (n_parts,),
            experts_ptr=experts_R,
            counts_ptr=counts,
            n_slots=n_slots,
            steps=steps,
            **shape,
        )
    scan_kernel.start(
        (1,),
        counts_ptr=counts,
        offsets_ptr=offsets_E1,
        n_parts=n_parts,
        n_experts=n_experts,
        **{**shape, **_scan(block)},
    )
    if n_slots:
        place_kernel.start(
            (n_parts,),
            experts_ptr=experts_R,
            counts_ptr=counts,
            offsets_ptr=offsets_E1,
            order_ptr=order_R,
            position_ptr=position_R,
            n_slots=n_slots,
            n_experts=n_experts,
            steps=steps,
            **shape,
        )
    return order_R, position_R.view(experts_NA.shape), offsets_E1


def _sort_in_pytorch(experts_NA: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    experts_R = experts_NA.reshape(-1).long()
    exists = (experts_R >= 0) & (experts_R < n_experts)
    experts_R = experts_R.where(exists, n_experts)  # to the end
    sorted_R, order_R = experts_R.sort(stable=True)
    position_R = torch.empty_like(order_R)
    position_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    offsets_E1 = torch.searchsorted(
        sorted_R, torch.arange(n_experts + 1, device=order_R.device), out_int32=True
    )
    position_R = position_R.where(exists, -1)
    return order_R.int(), position_R.view_as(experts_NA).int(), offsets_E1


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
        tile_kernel.start(
            (triton.cdiv(n_tiles, block),),
            offsets_ptr=offsets_E1,
            tiles_ptr=tiles,
            n_tiles=n_tiles,
            n_experts=n_experts,
            ROWS=rows_per_tile,
            BLOCK=block,
            BLOCK_E=block_e,
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
            (scan_kernel, _scan(block)),
            (place_kernel, {}),
            (tile_kernel, {"ROWS": 128}),
        ):
            constants = {**shape, **extra}
            warps = constants.pop("num_warps", 4)
            name = f"{kernel.name.removesuffix('_kernel')}-{n_experts}"
            yield variant(name, kernel, "i32", constants, {}, num_warps=warps)

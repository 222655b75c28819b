"""What the declarations of the kv cache's operations share: where rows stand, what a slot holds.

Written position by position in plain Python, so that the references' arithmetic is not used to
test itself.
"""

import torch
from torch import Tensor

from pyllm.testing.declaration import Arguments, Draw, Mutant, Run, Sizes


def draw_positions(sizes: Sizes, draw: Draw) -> tuple[Tensor, Tensor]:
    """(B,) int32 starts and counts: all alike, or ``ragged`` with the first row full."""
    batch, past, tokens = sizes["B"], sizes["past"], sizes["T"]
    starts, counts = torch.full((batch,), past), torch.full((batch,), tokens)
    if sizes["ragged"]:
        starts[1:] = draw.integers(past + 1, max(batch - 1, 0)).cpu()
        counts[1:] = draw.integers(tokens + 1, max(batch - 1, 0)).cpu()
    return starts.to(torch.int32).to(draw.device), counts.to(torch.int32).to(draw.device)


def slot_of(position: int, sizes: Sizes) -> int:
    """Where a cache of these sizes keeps a position."""
    if not sizes["rolling"] or position < sizes["sinks"]:
        return position
    return sizes["sinks"] + (position - sizes["sinks"]) % (sizes["S"] - sizes["sinks"])


def draw_int8(draw: Draw, *shape: int) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127 (..., K), and scales (...): no two rows have one, nor is one a
    small multiple of another."""
    numbers = (draw.normal(*shape).double() * 40.0).round().clamp(-127, 127)
    scales = (0.5 + draw.uniform(*shape[:-1])) / 40.0
    return numbers.to(torch.int8), scales.float().to(draw.device)


def of_int8(mutant: Mutant) -> Mutant:
    """A fault that only an int8 cache can have; another one is left sound."""

    def change(run: Run, a: Arguments) -> tuple[Tensor, ...]:
        return run(a) if a["k_scales"] is None else mutant.change(run, a)

    return Mutant(mutant.name, mutant.stage, change)


def off_by_one(tensor: Tensor) -> Tensor:
    """Starts or counts, one less where that is possible."""
    return (tensor - 1).clamp_min(0)

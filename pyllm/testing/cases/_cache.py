"""What the declarations of the kv cache's operations share: where rows stand, what a slot holds.

Written position by position in plain Python, so that the references' arithmetic is not used to
test itself.
"""

import torch
from torch import Tensor

from pyllm.testing.declaration import Draw, Sizes


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


def off_by_one(tensor: Tensor) -> Tensor:
    """Starts or counts, one less where that is possible."""
    return (tensor - 1).clamp_min(0)

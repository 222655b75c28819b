"""What the mixture-of-experts declarations share: hostile loads and valid permutations."""

from typing import Any

import torch
from torch import Tensor

from pyllm.testing.declaration import Draw, Sizes

N_EXPERTS = (1, 2, 7, 16, 33)
TOP_K = (1, 2, "E")
LOADS = ("even", "one", "last", "half")
"""``even``: distinct random experts for each token. ``one``: every choice on a middle expert.
``last``: every choice on the last. ``half``: the upper half of the experts gets nothing."""


def resolve_top_k(sizes: Sizes) -> dict[str, Any]:
    """A drawn top-k ("E" for all) to a number of at most E."""
    wanted = sizes["E"] if sizes["A"] == "E" else sizes["A"]
    return {**sizes, "A": min(wanted, sizes["E"])}


def choose_experts(sizes: Sizes, draw: Draw) -> Tensor:
    """(N, A) int32 with the load that ``sizes`` names."""
    rows, n_experts, top_k = sizes["N"], sizes["E"], sizes["A"]
    load = sizes["load"]
    if load == "one":
        experts = torch.full((rows, top_k), n_experts // 2)
    elif load == "last":
        experts = torch.full((rows, top_k), n_experts - 1)
    elif load == "half":
        experts = draw.integers((n_experts + 1) // 2, rows, top_k).cpu()
    else:
        experts = draw.uniform(rows, n_experts).argsort(-1)[:, :top_k]
    return experts.to(torch.int32).to(draw.device)


def draw_weights(sizes: Sizes, draw: Draw) -> Tensor:
    """(N, A) routing weights that sum to one, in the wide dtype."""
    raw = draw.uniform(sizes["N"], sizes["A"]) + 0.2
    return draw.to(raw / raw.sum(-1, keepdim=True), wide=True)


def draw_position(sizes: Sizes, draw: Draw) -> Tensor:
    """(N, A) int32: a random permutation of the rows."""
    rows = sizes["N"] * sizes["A"]
    position = draw.uniform(rows).argsort().view(sizes["N"], sizes["A"])
    return position.to(torch.int32).to(draw.device)

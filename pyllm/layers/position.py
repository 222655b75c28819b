"""How a model knows the order of its tokens: rotary, learned or sinusoidal positions."""

import torch
from torch import Tensor, nn

from pyllm._checks import check_choice, check_number
from pyllm.layers._buffers import Float32Buffers
from pyllm.layers._checks import check_fits, check_sizes
from pyllm.layers.rope_scaling import SCALINGS, rotation
from pyllm.ops._checks import check_index_range, check_whole


class RotaryTable(Float32Buffers):
    """Cosines and sines of ``t * theta^(-2i/K)`` (RoFormer, arXiv:2104.09864, sec. 3.2.2).

    Kept in float32 and out of the state dict: it follows from the configuration.

    Args:
        max_seq_len: positions.
        head_dim: K, even.
        theta: base of the wavelengths.
        scaling, factor, original_len: for longer contexts, see :mod:`pyllm.layers.rope_scaling`.

    Raises:
        ValueError: a size below 1, an odd head size, theta or factor below 1, an unknown scaling or
            one that lacks the original length, more than the machine's memory.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        max_seq_len: int,
        head_dim: int,
        theta: float = 10_000.0,
        scaling: str = "none",
        factor: float = 1.0,
        original_len: int | None = None,
    ) -> None:
        super().__init__()
        max_seq_len, head_dim = check_sizes(
            "RotaryTable", max_seq_len=max_seq_len, head_dim=head_dim
        )
        if head_dim % 2:
            raise ValueError(f"RotaryTable: head_dim must be even, got {head_dim}")
        # Below 1, the angles overflow: 1e-300 to the power of -1.
        theta = check_number("RotaryTable: theta", theta, 1)
        _check_table("RotaryTable", max_seq_len, head_dim // 2)
        check_choice("RotaryTable: scaling", scaling, SCALINGS)
        factor = check_number("RotaryTable: factor", factor, 1)
        if original_len is not None:
            check_sizes("RotaryTable", original_len=original_len)
        elif scaling in ("llama3", "yarn"):
            raise ValueError(f"RotaryTable: scaling {scaling} needs original_len, got None")
        turn = rotation(head_dim, theta, scaling, factor, original_len)
        angle_TJ = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), turn.frequency_J)
        # Float32: bf16 would round the angles' cosines to 8 bits.
        for name, table_TJ in (("cos", angle_TJ.cos()), ("sin", angle_TJ.sin())):
            self.register_buffer(name, (table_TJ * turn.magnitude).float(), persistent=False)

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Tables (length, K/2) of positions ``start`` to ``start + length``."""
        _check_positions("RotaryTable", start, length, self.cos.shape[0])
        return self.cos[start : start + length], self.sin[start : start + length]

    def at(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Tables (B, T, K/2), where the rows of a batch stand at different positions."""
        check_index_range("RotaryTable", "positions", positions_BT, self.cos.shape[0])
        return self.cos[positions_BT], self.sin[positions_BT]


class LearnedPositions(nn.Module):
    """One trained vector for each position, added to the embeddings (GPT-2)."""

    def __init__(self, max_seq_len: int, width: int) -> None:
        super().__init__()
        max_seq_len, width = check_sizes("LearnedPositions", max_seq_len=max_seq_len, width=width)
        _check_table("LearnedPositions", max_seq_len, width, trained=True)
        self.weight = nn.Parameter(torch.zeros(max_seq_len, width))

    def forward(self, start: int, length: int) -> Tensor:
        """(length, D)."""
        _check_positions("LearnedPositions", start, length, self.weight.shape[0])
        return self.weight[start : start + length]

    def at(self, positions_BT: Tensor) -> Tensor:
        """(B, T, D), where the rows of a batch stand at different positions."""
        check_index_range("LearnedPositions", "positions", positions_BT, self.weight.shape[0])
        return self.weight[positions_BT]


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines (Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5)."""

    table: Tensor

    def __init__(self, max_seq_len: int, width: int) -> None:
        super().__init__()
        max_seq_len, width = check_sizes(
            "SinusoidalPositions", max_seq_len=max_seq_len, width=width
        )
        _check_table("SinusoidalPositions", max_seq_len, width)
        angle_TJ = torch.outer(
            torch.arange(max_seq_len, dtype=torch.float64),
            10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width),
        )
        table_TD = torch.stack([angle_TJ.sin(), angle_TJ.cos()], dim=-1).flatten(1)[:, :width]
        self.register_buffer("table", table_TD.float(), persistent=False)

    def forward(self, start: int, length: int) -> Tensor:
        """(length, D)."""
        _check_positions("SinusoidalPositions", start, length, self.table.shape[0])
        return self.table[start : start + length]

    def at(self, positions_BT: Tensor) -> Tensor:
        """(B, T, D), where the rows of a batch stand at different positions."""
        check_index_range("SinusoidalPositions", "positions", positions_BT, self.table.shape[0])
        return self.table[positions_BT]


def _check_table(layer: str, length: int, width: int, trained: bool = False) -> None:
    numbers = length * width
    weights, table = (numbers, 0) if trained else (0, numbers)
    what = f"{layer}: a table of {length:,} positions by {width:,} numbers"
    check_fits(what, weights, table, "make it shorter or narrower")


def _check_positions(layer: str, start: int, length: int, size: int) -> None:
    check_whole(layer, "start", start, 0)
    check_whole(layer, "length", length, 0)
    # A slice past the end is shorter, and one row of it would be broadcast to all tokens.
    if start + length > size:
        raise ValueError(
            f"{layer}: positions {start} to {start + length} do not lie between 0 and {size}"
        )

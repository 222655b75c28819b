"""Which tiles the tuner may choose among for attention, by kernel and head size.

Drawn up for sm_80 to sm_90 by what FlashAttention-2 and Triton's own example use; every one is
compiled in the tests, but which is the fastest no machine without a card can tell.
"""

from dataclasses import dataclass

AMPERE = 163 * 1024
"""What sm_80 lets a block have; sm_86 and sm_89 let it have 99 KB."""
HOPPER = 227 * 1024


@dataclass(frozen=True)
class Choice:
    """A tile, and how it is worked on."""

    block_m: int
    """Queries."""
    block_n: int
    """Keys."""
    warps: int
    stages: int
    shared: int = 0
    """Only for cards that let a block have so many bytes of shared memory."""

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


_NARROW = {
    "forward_kernel": {
        32: (Choice(128, 64, 4, 3),),
        64: (Choice(128, 64, 4, 3), Choice(64, 64, 4, 3), Choice(128, 128, 8, 2, HOPPER)),
        128: (
            Choice(128, 64, 8, 2),
            Choice(64, 64, 4, 2),
            Choice(128, 64, 8, 3, AMPERE),
            Choice(128, 128, 8, 2, HOPPER),
        ),
        256: (Choice(64, 32, 8, 2),),
    },
    "dq_kernel": {
        32: (Choice(128, 64, 8, 2),),
        64: (Choice(64, 64, 4, 2), Choice(128, 64, 8, 2)),
        128: (Choice(128, 32, 8, 2), Choice(64, 64, 4, 2)),
        256: (Choice(32, 32, 8, 1),),
    },
    "dk_dv_kernel": {
        32: (Choice(64, 64, 4, 2),),
        64: (Choice(64, 128, 8, 2), Choice(64, 64, 4, 2)),
        128: (Choice(64, 64, 8, 2),),
        256: (Choice(32, 32, 8, 1),),
    },
}
_RAGGED = {
    "forward_kernel": Choice(64, 64, 8, 2),
    "dq_kernel": Choice(64, 32, 8, 2),
    "dk_dv_kernel": Choice(32, 64, 8, 2),
}
"""Up to 128 channels: where they fill no tile, the masks take the registers of larger ones."""
_WIDE = {
    "forward_kernel": {
        64: Choice(32, 32, 4, 1),
        128: Choice(32, 32, 8, 1),
        256: Choice(16, 16, 4, 1),
    },
    "dq_kernel": {64: Choice(32, 32, 4, 1), 128: Choice(32, 16, 8, 1)},
    "dk_dv_kernel": {64: Choice(32, 32, 8, 1), 128: Choice(16, 32, 8, 1)},
}
_WIDE_OR_RAGGED = Choice(16, 16, 8, 1)
"""float32, which every kernel multiplies without tensor cores: with masks for the channels, or
more of them, larger tiles spill."""


def choices(kernel: str, block_k: int, whole: bool, wide: bool) -> tuple[Choice, ...]:
    """Of ``kernel`` at a head padded to ``block_k``, which it fills if ``whole``; ``wide`` is
    float32. The first is the choice for what is too small to be timed."""
    if wide:
        whole_choices = _WIDE[kernel] if whole else {}
        return (whole_choices.get(max(block_k, 64), _WIDE_OR_RAGGED),)
    if not whole and block_k <= 128:
        return (_RAGGED[kernel],)
    return _NARROW[kernel][max(block_k, 32)]

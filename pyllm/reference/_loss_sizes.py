"""How the GPU's faces of ``linear_cross_entropy`` cut their backward, and what that takes.

For their launchers, and for the estimate of a training step's memory on a machine that has neither
the card nor Triton.
"""

from dataclasses import dataclass

import torch

LEAST_SLAB_BYTES, MOST_SLAB_BYTES = 64 << 20, 1 << 30
MOST_SPLITS = 8
"""Into so many parts at most the words of a slab are split for dx, where rows and columns alone
would leave multiprocessors idle."""
ROW_BLOCK = {2: (128, 128), 4: (64, 64), 8: (32, 32)}
"""By item size: rows and columns of a program of that product in Triton."""
SPAN = 1024
"""Words that one program of Triton's forward goes through."""
CHUNK_BYTES = 64 * 2**20
"""Of the logits' gradients that the CUDA face holds at once, beside which 4,096 rows of 50,257
words would take 412 MB."""
CHUNK_WORDS = 128
"""A chunk has a multiple of so many words, a tile's, but the last one."""


@dataclass(frozen=True)
class Card:
    """What the cuts depend on."""

    memory: int
    """Bytes that PyTorch may take of it."""
    processors: int
    """Multiprocessors."""


def card_of(device: torch.device | int) -> Card:
    """A card of this machine, of which a cap leaves this process less."""
    share = torch.cuda.get_per_process_memory_fraction(device)
    properties = torch.cuda.get_device_properties(device)
    return Card(int(share * properties.total_memory), properties.multi_processor_count)


@dataclass(frozen=True)
class Scratch:
    """Bytes that a backward holds beside its results."""

    logits: int
    """The gradients of some words' logits."""
    rest: int
    """Sums, and copies of the rows."""


def slab_bytes(memory: int) -> int:
    """Bytes of logits' gradient at a time on a card with so much memory: 64 MiB of 4 GiB."""
    return min(max(memory // 64, LEAST_SLAB_BYTES), MOST_SLAB_BYTES)


def slab_words(n_rows: int, n_words: int, item_size: int, card: Card) -> int:
    """How many words Triton's backward takes at a time: whole blocks of 256, or all."""
    fits = slab_bytes(card.memory) // (max(n_rows, 1) * item_size)
    return min(max(fits // 256, 1) * 256, -(-max(n_words, 1) // 16) * 16)


def slab_splits(n_rows: int, width: int, slab: int, item_size: int, card: Card) -> int:
    """How many parts of the sum over a slab's words give every multiprocessor two programs."""
    rows, columns = ROW_BLOCK[item_size]
    programs = max(-(-n_rows // rows) * -(-width // columns), 1)
    return max(min(-(-2 * card.processors // programs), MOST_SPLITS, slab // 1024), 1)


def triton_scratch(n_rows: int, width: int, item_size: int, slab: int, splits: int) -> Scratch:
    """Of Triton's backward: a slab, the rows times their upstream gradient, and the splits' sums
    of dx."""
    wide = max(item_size, 4)
    rest = n_rows * width * (item_size + splits * wide)
    return Scratch(n_rows * slab * item_size, rest)


def chunk_words(n_rows: int, n_words: int, item_size: int) -> int:
    """How many words the CUDA face's backward takes at a time."""
    fit = CHUNK_BYTES // (max(n_rows, 1) * item_size)
    return min(max(fit // CHUNK_WORDS, 1) * CHUNK_WORDS, max(n_words, 1))


def cuda_scratch(n_rows: int, n_words: int, width: int, item_size: int) -> Scratch:
    """Of the CUDA face's backward: a chunk, and dx in float32, which is rounded at the end; where
    it is the result itself, a chunk's share of it."""
    chunk = n_rows * chunk_words(n_rows, n_words, item_size) * item_size
    return Scratch(chunk, n_rows * width * max(item_size, 4))

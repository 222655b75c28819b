"""Training batches cut from a token file, as a pure function of the seed and the step."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllm._checks import check_size

if TYPE_CHECKING:
    import torch

    from pyllm.data.token_file import TokenFile

MAX_TOKENS = 2**28
"""In a batch: 2 GB of ids, and far more in any model."""


class PackedBatches:
    """Blocks of `seq_len` tokens in a new random order and at a new random phase each epoch.

    The file is read as a ring. Its last token is an end-of-text, so the first story too follows
    an end-of-text, as every other does. An epoch cuts the ring into `blocks_per_epoch` blocks,
    beginning at a random token (the phase: no story is always cut at the same word), and serves
    each block once. What remains, less than a block, is another part in every epoch.

    Batches depend on (seed, step) only: to resume, ask for the next step.

    Args:
        token_file: an open `TokenFile`.
        batch_size: blocks in a batch (B).
        seq_len: tokens in a block (T).
        seed: of the order and the phases.

    Raises ValueError for sizes below 1 or no whole numbers, a negative seed, a batch of over 2**28
    tokens, a file that is shorter than one block, or one that does not end with an end-of-text.
    """

    def __init__(self, token_file: TokenFile, batch_size: int, seq_len: int, seed: int) -> None:
        batch_size = check_size("batch_size", batch_size, 1, MAX_TOKENS)
        seq_len = check_size("seq_len", seq_len, 1, MAX_TOKENS)
        seed = check_size("seed", seed, 0)
        if batch_size * seq_len > MAX_TOKENS:
            raise ValueError(
                f"a batch of {batch_size:,} blocks of {seq_len:,} tokens is too large: expected "
                f"at most {MAX_TOKENS:,} tokens; give a smaller batch_size or seq_len"
            )
        if len(token_file) < seq_len:
            raise ValueError(
                f"{token_file.path}: holds {len(token_file):,} tokens, but one block needs "
                f"{seq_len:,}; give more text or a smaller seq_len"
            )
        last = int(token_file.tokens[-1])
        if last != token_file.end_of_text_id:
            raise ValueError(
                f"{token_file.path}: ends with token {last}, not with the end-of-text "
                f"{token_file.end_of_text_id}; write it again with write_tokens"
            )
        self.token_file = token_file
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.blocks_per_epoch = len(token_file) // seq_len
        # Two, because a batch may lie across the border between epochs.
        self._starts = lru_cache(maxsize=2)(self._draw_starts)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step (0, 1, ...): inputs and targets, int64 of shape (B, T).

        `targets[b, t]` is the token after `inputs[b, t]`. Raises ValueError for a step that is no
        whole number or negative, and where the file holds an id outside its vocabulary.
        """
        import torch

        step = check_size("step", step, 0)
        rows = np.empty((self.batch_size, self.seq_len + 1), dtype=np.int64)
        for b in range(self.batch_size):
            epoch, index = divmod(step * self.batch_size + b, self.blocks_per_epoch)
            self._read(int(self._starts(epoch)[index]), rows[b])
        # Here it costs microseconds; on a GPU such an id would end the process without a reason.
        largest, vocab_size = int(rows.max()), self.token_file.sidecar.vocab_size
        if largest >= vocab_size:
            raise ValueError(
                f"{self.token_file.path}: holds the id {largest}, outside its vocabulary of "
                f"{vocab_size}; the file was changed: write it again from its text"
            )
        block = torch.from_numpy(rows)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def _draw_starts(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Position on the ring of the first input of each block of an epoch, in order of use."""
        rng = np.random.default_rng([self.seed, epoch])
        phase = rng.integers(len(self.token_file))
        starts = phase + rng.permutation(self.blocks_per_epoch) * self.seq_len
        return np.asarray(starts % len(self.token_file), dtype=np.int64)

    def _read(self, start: int, row: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        tokens = self.token_file.tokens
        head = tokens[start : start + len(row)]
        row[: len(head)] = head
        row[len(head) :] = tokens[: len(row) - len(head)]

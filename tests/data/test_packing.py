"""Packed batches: a pure function of seed and step that serves every block once per epoch."""

from collections import Counter

import numpy as np
import pytest
import torch

from pyllm.data import PackedBatches, write_tokens


class CountingTokenizer:
    """Every token of the file is another number, so that a block can be recognised."""

    vocab_size = 1000
    end_of_text_id = 999
    hash = "0" * 64

    def encode_batch(self, texts):
        return [list(range(int(text))) for text in texts]


def token_file(tmp_path, n):
    """The tokens 0, 1, ... n - 2 and end-of-text."""
    return write_tokens([str(n - 1)], CountingTokenizer(), tmp_path / "a.bin")


def test_targets_are_inputs_shifted_by_one(tmp_path):
    batches = PackedBatches(token_file(tmp_path, 100), batch_size=3, seq_len=8, seed=0)
    for step in range(20):
        inputs, targets = batches.batch(step)
        assert inputs.shape == targets.shape == (3, 8)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        after = {999: 0, 98: 999}  # the ring: after the end of text comes the first token
        for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert target == [after.get(token, token + 1) for token in row]


@pytest.mark.parametrize("n", [96, 100, 103])
def test_every_block_once_per_epoch(tmp_path, n):
    batches = PackedBatches(token_file(tmp_path, n), batch_size=3, seq_len=8, seed=5)
    assert batches.blocks_per_epoch == 12
    phases = set()
    for epoch in range(6):
        rows = torch.cat([batches.batch(4 * epoch + i)[0] for i in range(4)])
        counts = Counter(rows.flatten().tolist())
        assert max(counts.values()) == 1  # no token twice: the blocks don't overlap
        assert sum(counts.values()) == 12 * 8
        phases.add(min(row[0] % 8 for row in rows.tolist()))
    assert len(phases) > 1


def test_pure_function_of_seed_and_step(tmp_path):
    file = token_file(tmp_path, 100)
    forward = PackedBatches(file, 5, 8, seed=1)
    once = [forward.batch(step)[0] for step in range(20)]
    resumed = PackedBatches(file, 5, 8, seed=1)
    for step in reversed(range(20)):
        assert torch.equal(resumed.batch(step)[0], once[step])
    other = PackedBatches(file, 5, 8, seed=2)
    assert any(not torch.equal(other.batch(step)[0], once[step]) for step in range(20))


def test_a_file_of_exactly_one_block(tmp_path):
    inputs, targets = PackedBatches(token_file(tmp_path, 8), 1, 8, seed=0).batch(3)
    assert sorted(inputs[0].tolist()) == sorted(targets[0].tolist()) == [*range(7), 999]


SIZES = "must be a whole number from 1 to 268,435,456, got"


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "seed", "message"),
    [
        (1, 9, 0, "a.bin: holds 8 tokens, but one block needs 9; give more text or a smaller"),
        (0, 4, 0, f"batch_size {SIZES} 0"),
        (-3, 4, 0, f"batch_size {SIZES} -3"),
        (True, 4, 0, f"batch_size {SIZES} True"),
        (10**12, 4, 0, f"batch_size {SIZES} 1000000000000"),
        (2**20, 2**10, 0, "1,048,576 blocks of 1,024 tokens is too large: expected at most"),
        (1, 4.0, 0, f"seq_len {SIZES} 4.0"),
        (1, float("nan"), 0, f"seq_len {SIZES} nan"),
        (1, "4", 0, f"seq_len {SIZES} '4'"),
        (1, None, 0, f"seq_len {SIZES} None"),
        (1, 4, -1, "seed must be a whole number of at least 0, got -1"),
        (1, 4, 0.5, "seed must be a whole number of at least 0, got 0.5"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, batch_size, seq_len, seed, message):
    with pytest.raises(ValueError, match=message):
        PackedBatches(token_file(tmp_path, 8), batch_size, seq_len, seed)


@pytest.mark.parametrize("step", [-1, 1.0, True, None, "0"])
def test_steps_that_cannot_be(tmp_path, step):
    with pytest.raises(ValueError, match=f"step must be .* of at least 0, got {step!r}"):
        PackedBatches(token_file(tmp_path, 8), 1, 4, seed=0).batch(step)


def test_numpy_integers_and_large_steps_are_fine(tmp_path):
    file = token_file(tmp_path, 100)
    plain, other = PackedBatches(file, 3, 8, 1), PackedBatches(file, np.int32(3), np.uint8(8), 1)
    assert torch.equal(plain.batch(7)[0], other.batch(np.int64(7))[0])
    assert plain.batch(10**30)[0].shape == (3, 8)


def test_a_file_that_was_changed(tmp_path):
    file = token_file(tmp_path, 8)
    file.tokens = np.array([0, 1, 2, 1000, 4, 5, 6, 999])
    batches = PackedBatches(file, 2, 4, seed=0)
    with pytest.raises(
        ValueError, match="holds the id 1000, outside its vocabulary of 1000; .*wri"
    ):
        batches.batch(0)
    file.tokens = np.arange(8)
    with pytest.raises(ValueError, match="ends with token 7, not with the end-of-text 999"):
        PackedBatches(file, 1, 4, seed=0)

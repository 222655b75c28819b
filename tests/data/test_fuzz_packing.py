"""Any sizes: every block of the ring once per epoch, whatever the batch size; or refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllm.data import PackedBatches, Sidecar, TokenFile

pytestmark = pytest.mark.fuzz

SIZE = st.integers(1, 12)
JUNK = st.one_of(
    st.integers(),
    st.booleans(),
    st.floats(),
    st.none(),
    st.text(max_size=2),
    st.integers(-3, 12).map(np.int64),
    st.sampled_from([2**28, 2**28 + 1, 10**30]),
)


def ring(n):
    """A token file in memory: 0, 1, ... n - 1, of which the last is end-of-text."""
    sidecar = Sidecar("uint32", n, 1, n, n - 1, "0" * 64, "0" * 64)
    return TokenFile(Path("a.bin"), np.arange(n, dtype=np.uint32), sidecar)


def whole(value, least, most):
    return type(value) in (int, np.int64) and least <= value <= most


@given(st.integers(1, 40), SIZE, SIZE, st.integers(0, 2**70), st.integers(0, 3))
def test_an_epoch_serves_every_block_once(watchdog, n, batch_size, seq_len, seed, epoch):
    watchdog()
    if n < seq_len:
        with pytest.raises(ValueError, match=f"^a.bin: holds {n} tokens, but one block needs"):
            PackedBatches(ring(n), batch_size, seq_len, seed)
        return
    batches = PackedBatches(ring(n), batch_size, seq_len, seed)
    per_epoch = n // seq_len
    assert batches.blocks_per_epoch == per_epoch
    # Row after row, batches of any size are one stream.
    first, last = epoch * per_epoch, (epoch + 1) * per_epoch
    rows = []
    for step in range(first // batch_size, (last - 1) // batch_size + 1):
        inputs, targets = batches.batch(step)
        assert inputs.shape == targets.shape == (batch_size, seq_len)
        assert ((inputs + 1) % n == targets).all()  # the next on the ring
        numbers = range(step * batch_size, (step + 1) * batch_size)
        rows += [
            row for row, at in zip(inputs.tolist(), numbers, strict=True) if first <= at < last
        ]
    assert len(rows) == per_epoch
    seen = Counter(token for row in rows for token in row)
    assert len(seen) == per_epoch * seq_len and set(seen.values()) == {1}
    # What is left out is one piece of the ring, less than a block.
    left = [token for token in range(n) if token not in seen]
    assert len(left) < seq_len
    assert sum((token + 1) % n not in left for token in left) <= 1
    single = PackedBatches(ring(n), 1, seq_len, seed)
    assert rows == [single.batch(at)[0][0].tolist() for at in range(first, last)]


@given(st.integers(1, 20), SIZE | JUNK, SIZE | JUNK, SIZE | JUNK, SIZE | JUNK)
def test_any_sizes_are_refused_or_served(watchdog, n, batch_size, seq_len, seed, step):
    watchdog()
    most = 2**28
    good = whole(batch_size, 1, most) and whole(seq_len, 1, n) and whole(seed, 0, float("inf"))
    if not good or batch_size * seq_len > most:
        with pytest.raises(ValueError, match="^[^\n]{20,200}$"):
            PackedBatches(ring(n), batch_size, seq_len, seed)
        return
    batches = PackedBatches(ring(n), batch_size, seq_len, seed)
    if batch_size > 1000:
        return  # it would be served, in minutes
    if whole(step, 0, float("inf")):
        inputs, _ = batches.batch(step)
        assert inputs.shape == (batch_size, seq_len)
    else:
        with pytest.raises(ValueError, match="^step must be a whole number of at least 0, got"):
            batches.batch(step)

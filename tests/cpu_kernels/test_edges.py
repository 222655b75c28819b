"""Sizes at which a kernel once left what C++ defines; `scripts/sanitize.py` sees what is silent."""

import pytest
import torch

from pyllm._native import cpu_extension

if cpu_extension() is None:
    pytest.skip("pyllm._cpu is not built", allow_module_level=True)

from pyllm.cpu_kernels.attention import attention_backward, attention_forward
from pyllm.cpu_kernels.moe_dispatch import moe_dispatch_forward


def test_the_widest_window_is_no_window() -> None:
    """With more queries than keys: -3 less 2^63 - 1 is not an int64, and hid all keys."""
    generator = torch.Generator().manual_seed(0)
    q, dy = (torch.randn(1, 5, 1, 4, generator=generator) for _ in range(2))
    k, v = (torch.randn(1, 2, 1, 4, generator=generator) for _ in range(2))
    results = []
    for window in (0, 2**63 - 1):
        y, lse = attention_forward(q, k, v, 0.5, False, window, 0)
        results.append((y, lse, *attention_backward(dy, q, k, v, y, lse, 0.5, False, window, 0)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_rows_of_no_width() -> None:
    """Their addresses are null, which memcpy does not take even for 0 bytes."""
    rows, order, _, offsets = moe_dispatch_forward(
        torch.empty(3, 0), torch.tensor([[1], [0], [1]], dtype=torch.int32), 2
    )
    assert rows.shape == (3, 0)
    assert (order.tolist(), offsets.tolist()) == ([1, 0, 2], [0, 1, 3])

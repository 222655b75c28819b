"""Sizes at which a kernel goes another way, or once left what C++ defines.

`scripts/sanitize.py` sees what is silent.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from pyllm._native import cpu_extension

if cpu_extension() is None:
    pytest.skip("pyllm._cpu is not built", allow_module_level=True)

from pyllm.cpu_kernels._routing import sort_by_expert
from pyllm.cpu_kernels.attention import attention_backward, attention_forward
from pyllm.cpu_kernels.int8_linear import int8_linear_forward
from pyllm.cpu_kernels.linear_cross_entropy import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_vocabulary_gives_the_same_bits_on_any_number_of_threads(
    dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    """Thousands of words are summed in ranges of several panels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 7, generator=generator).to(dtype)
    weight = torch.randn(7000, 7, generator=generator).to(dtype)
    targets = torch.randint(7000, (13,), generator=generator)
    results = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        loss, lse = linear_cross_entropy_forward(x, weight, targets, -100)
        results.append(
            (loss, lse, *linear_cross_entropy_backward(loss, x, weight, targets, lse, -100))
        )
    first, *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_whole_sums_beyond_what_a_float_holds(isa: str) -> None:
    """In float64 they stay exact: 2,048 * 127 * 127 - 127 is odd, and beyond 2^24."""
    weight = torch.full((5, 2048), 127, dtype=torch.int8)
    weight[:, 3] = 126
    x, scale = torch.full((2, 2048), 127.0, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    y = int8_linear_forward(x, weight, scale, True)
    assert torch.equal(y, torch.full((2, 5), 2048.0 * 127 * 127 - 127, dtype=torch.float64))


@pytest.mark.parametrize("expert", [2**32 + 1, -(2**32), 3, -1])
def test_an_expert_out_of_range_is_no_other_one_in_int32(expert: int) -> None:
    """A compiled door does not look at values, and 2^32 + 1 would be expert 1."""
    experts = torch.tensor([[0, expert], [1, 2]])
    with pytest.raises(ValueError, match=f"between 0 and 2, got values from .*{expert}"):
        sort_by_expert(experts, 3)


OUT_OF_MEMORY = """
import resource
import torch
from pyllm import ops
torch.set_num_threads(1)
x, weights = torch.zeros(20000, 256), torch.ones(20000, 4)
experts = torch.arange(80000).remainder(4).view(20000, 4)
w_in, w_out = torch.zeros(4, 32, 256), torch.zeros(4, 256, 32)
rows, vocabulary = torch.zeros(2048, 16384), torch.zeros(8, 16384)
targets = torch.zeros(2048, dtype=torch.int64)
works = {
    "moe_ffn": lambda: ops.moe_ffn(x, w_in, w_out, weights, experts, "gelu"),
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(rows, vocabulary, targets),
}
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), hard))
for name, work in works.items():
    try:
        work()
        print(name, "worked")
    except MemoryError:
        print(name, "MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
for name, work in works.items():
    print(name, work().isfinite().all().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory as Linux has it")
def test_memory_that_runs_out_is_a_memory_error() -> None:
    """It ended the process; afterwards everything works as before."""
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitizer has reserved more addresses than there may be")
    result = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120
    )
    expected = ["moe_ffn MemoryError", "linear_cross_entropy MemoryError"]
    expected += ["moe_ffn True", "linear_cross_entropy True"]
    assert result.stdout.splitlines() == expected, result.stderr

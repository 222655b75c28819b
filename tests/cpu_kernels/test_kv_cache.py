"""The C++ faces of a kv cache's operations: every instruction set, any number of threads."""

from collections.abc import Callable

import pytest
import torch

from pyllm._native import cpu_extension
from pyllm.reference import decode_attention as reference
from pyllm.testing import OPERATIONS, check_face
from pyllm.testing.cases._cache import slot_of

if cpu_extension() is None:
    pytest.skip("pyllm._cpu is not built", allow_module_level=True)

from pyllm.cpu_kernels import decode_attention, kv_append
from pyllm.cpu_kernels.decode_attention import decode_attention_forward
from pyllm.cpu_kernels.kv_append import kv_append_forward

NONE = (None, None)
"""The scales of a cache that is not int8."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("face", [kv_append, decode_attention])
def test_every_instruction_set(isa: str, face: object, dtype: torch.dtype) -> None:
    operation = OPERATIONS[face.__name__.rpartition(".")[2]]
    for case in (*operation.smoke_cases, *map(operation.case, operation.extra)):
        check_face(case, face, dtype)


# Heads whose loops are straight lines and others; chunks of 64 keys and more; one row and several.
SHAPES = [(1, 1, 8, 1, 64), (1, 1, 2, 4, 64), (3, 2, 1, 8, 128), (2, 5, 3, 2, 33)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_on_any_number_of_threads(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    batch, tokens, groups, shared, width = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, tokens, groups * shared, width, generator=generator).to(dtype)
    k, v = torch.randn(2, batch, 1000, groups, width, generator=generator).to(dtype)
    starts = torch.full((batch,), 1000 - tokens, dtype=torch.int32)
    starts[1:] -= 300
    counts = torch.full((batch,), tokens, dtype=torch.int32)
    results = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        results.append(decode_attention_forward(q, k, v, starts, counts, 0.2, 0, 0, False, *NONE))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert results[0].std() > 0.01


@pytest.mark.parametrize("shared", [5, 6, 7, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_heads_that_vectors_do_not_divide(isa: str, shared: int, dtype: torch.dtype) -> None:
    """Those taken together may read different kv heads: 7 for one is Qwen 2.5's."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 3 * shared, 40, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, 70, 3, 40, generator=generator).to(dtype)
    rest = (torch.tensor([66]), torch.tensor([2]), 0.2, 0, 0, False, None, None)
    truth = reference.decode_attention_forward(q.double(), k.double(), v.double(), *rest)
    y = decode_attention_forward(q, k, v, *rest)
    summed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    assert (y - truth).abs().max() < torch.finfo(dtype).eps + 30 * summed.eps


@pytest.mark.parametrize("last", [0, 1, 2, 5])
def test_the_largest_score_may_be_in_any_chunk(isa: str, last: int) -> None:
    """Far above the others: shifted by less, its exponential is infinite."""
    q = torch.full((1, 1, 1, 8), 10.0)
    k, v = torch.zeros(2, 1, 6 * 16384, 1, 8)  # chunks of 16,384 keys
    k[0, last * 16384 + 5] = 4.0
    v[0, last * 16384 + 5] = 3.0
    rest = (torch.tensor([6 * 16384 - 1]), torch.tensor([1]), 1.0, 0, 0, False, None, None)
    assert torch.equal(decode_attention_forward(q, k, v, *rest), torch.full((1, 1, 1, 8), 3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_same_bits_of_an_int8_cache_on_any_number_of_threads(
    isa: str, dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    """What is written, and what is read: 900 positions in a ring, then queries for some of them."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 8, 64, generator=generator).to(dtype)
    new = torch.randn(2, 2, 900, 2, 64, generator=generator).to(dtype)
    at = (torch.tensor([40, 70]), torch.tensor([900, 600]))
    last = (torch.tensor([937, 667]), torch.tensor([3, 3]))
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        caches = torch.zeros(2, 2, 800, 2, 64, dtype=torch.int8)
        scales = torch.zeros(2, 2, 800, 2)
        kv_append_forward(*caches, *new, *at, 4, True, *scales)
        y = decode_attention_forward(q, *caches, *last, 0.2, 794, 4, True, *scales)
        results.append((caches, scales, y))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    assert results[0][2].std() > 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rolling_cache_gives_the_bits_of_a_contiguous_one(isa: str, dtype: torch.dtype) -> None:
    """The keys are taken by position, wherever they lie."""
    sizes = {"rolling": True, "sinks": 3, "S": 3 + 150}
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 4, 64, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, 500, 2, 64, generator=generator).to(dtype)
    at = [position for position in range(500) if position < 3 or position >= 350]
    slots = [slot_of(position, sizes) for position in at]
    ring_k, ring_v = (torch.full((1, 153, 2, 64), float("nan"), dtype=dtype) for _ in range(2))
    ring_k[:, slots], ring_v[:, slots] = k[:, at], v[:, at]
    starts, counts = torch.tensor([498]), torch.tensor([2])
    rest = (starts, counts, 0.2, 149, 3)
    flat = decode_attention_forward(q, k, v, *rest, False, *NONE)
    assert torch.equal(decode_attention_forward(q, ring_k, ring_v, *rest, True, *NONE), flat)
    assert flat.isfinite().all()


def test_bits_are_moved_as_they_are(isa: str) -> None:
    """All 65,536 of a 16-bit float, signalling NaNs included."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    k, v = bits.view(1, 64, 8, 128), bits.flip(0).view(1, 64, 8, 128)
    k_cache, v_cache = torch.zeros(2, 1, 64, 8, 128, dtype=torch.bfloat16)
    at = (torch.tensor([0]), torch.tensor([64]))
    kv_append_forward(k_cache, v_cache, k, v, *at, 0, False, *NONE)
    assert torch.equal(k_cache.view(torch.int16), k.view(torch.int16))
    assert torch.equal(v_cache.view(torch.int16), v.view(torch.int16))


def test_the_launchers_refuse_what_would_leave_the_cache() -> None:
    """A compiled door cannot look, and an address out of range would crash the process."""
    k_cache, v_cache = torch.zeros(2, 1, 4, 1, 2)
    new = torch.zeros(1, 2, 1, 2)
    for start, count, rolling, message in (
        (3, 2, False, "starts \\+ counts must not exceed the 4 slots of the cache, got 5"),
        (-1, 2, False, "starts must not be negative, got -1"),
        (2**31 - 2, 2, True, "must not exceed the 2147483647 positions there are, got 2147483648"),
        (0, 3, True, "counts must be between 0 and 2, got values from 3 to 3"),
        (0, -1, True, "counts must be between 0 and 2, got values from -1 to -1"),
    ):
        at = (torch.tensor([start]), torch.tensor([count]))
        with pytest.raises(ValueError, match=f"kv_append: .*{message}"):
            kv_append_forward(k_cache, v_cache, new, new, *at, 0, rolling, *NONE)
        with pytest.raises(ValueError, match=f"decode_attention: .*{message}"):
            decode_attention_forward(new, k_cache, v_cache, *at, 1.0, 1, 0, rolling, *NONE)

"""``decode_attention``: every face and the door, by its declaration; then what is particular."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm.ops import attention, available_faces, decode_attention, kv_append
from pyllm.ops._registry import face_module
from pyllm.testing.cases.decode_attention import DECODE_ATTENTION
from pyllm.testing.suite import InferenceSuite, TinyInferenceSuite, faces_on

FACES = faces_on("cpu", available_faces("decode_attention"))


class TestDecodeAttention(InferenceSuite):
    operation = DECODE_ATTENTION
    door = staticmethod(decode_attention)
    find_face = staticmethod(face_module)


class TestDecodeAttentionInt8(TinyInferenceSuite):
    """Registration, compilation and the like with an int8 cache."""

    operation = replace(DECODE_ATTENTION, tiny={**DECODE_ATTENTION.tiny, "int8": True})
    door = staticmethod(decode_attention)
    find_face = staticmethod(face_module)


def _at(*starts_and_counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    starts, counts = torch.tensor(starts_and_counts, dtype=torch.int32).t()
    return starts, counts


@pytest.mark.parametrize("window", [None, 1, 3, 9, 50])
@pytest.mark.parametrize("face", FACES)
def test_the_last_queries_of_attention(face: str, window: int | None) -> None:
    q, k, v = (torch.randn(2, 9, heads, 8) for heads in (4, 2, 2))
    whole = attention(q, k, v, window=window)
    for start in range(9):
        got = decode_attention(
            q[:, start:], k, v, *_at(*[(start, 9 - start)] * 2), window=window, face=face
        )
        torch.testing.assert_close(got, whole[:, start:])


@pytest.mark.parametrize("face", FACES)
def test_against_pytorch_with_a_mask(face: str) -> None:
    """Window, sinks and ragged rows, written as a mask over all keys."""
    q, (k, v) = torch.randn(3, 2, 4, 8), torch.randn(2, 3, 40, 2, 8)
    starts, counts = _at((30, 2), (3, 1), (0, 2))
    position = torch.arange(40)
    at = (starts[:, None] + torch.arange(2))[:, None, :, None]
    mask = (position <= at) & ((position > at - 7) | (position < 4))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    expected = expected.transpose(1, 2).clone()
    expected[1, 1] = 0
    got = decode_attention(q, k, v, starts, counts, window=7, sinks=4, face=face)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sinks", [0, 1, 5])
@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("face", FACES)
def test_a_rolling_cache_equals_all_keys_token_by_token(
    face: str, n_tokens: int, sinks: int
) -> None:
    """Nine times round a ring of the least size, against a cache that forgets nothing."""
    window, length = 4, 60
    q, (k, v) = torch.randn(1, length, 4, 8), torch.randn(2, 1, length, 2, 8)
    ring = torch.full((2, 1, sinks + window + n_tokens - 1, 2, 8), float("nan"))
    for start in range(0, length, n_tokens):
        new = slice(start, start + n_tokens)
        at = _at((start, n_tokens))
        kv_append(*ring, k[:, new], v[:, new], *at, sinks=sinks, rolling=True, face=face)
        options = {"window": window, "sinks": sinks, "face": face}
        got = decode_attention(q[:, new], *ring, *at, rolling=True, **options)
        torch.testing.assert_close(got, decode_attention(q[:, new], k, v, *at, **options))


@pytest.mark.parametrize("face", FACES)
def test_what_a_query_does_not_see_cannot_reach_it(face: str) -> None:
    """Not even a NaN that another query of the same call sees."""
    q, (k, v) = torch.randn(1, 3, 2, 8), torch.randn(2, 1, 20, 1, 8)
    at = _at((9, 3))
    before = decode_attention(q, k, v, *at, window=5, sinks=1, face=face)
    k[:, 10], v[:, 11] = float("nan"), float("inf")
    k[:, 1:5] = v[:, 1:5] = k[:, 12:] = v[:, 12:] = float("nan")
    after = decode_attention(q, k, v, *at, window=5, sinks=1, face=face)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert after[:, 1:].isfinite().sum() == 0


@pytest.mark.parametrize("face", FACES)
def test_the_widest_window_is_no_window(face: str) -> None:
    q, (k, v) = torch.randn(1, 2, 2, 8), torch.randn(2, 1, 9, 2, 8)
    widest = decode_attention(q, k, v, *_at((7, 2)), window=2**63 - 1, face=face)
    torch.testing.assert_close(widest, decode_attention(q, k, v, *_at((7, 2)), face=face))


@pytest.mark.parametrize("face", FACES)
def test_scores_beyond_float16(face: str) -> None:
    # 300 x 300 x 64 = 5,760,000, and float16 ends at 65,504.
    q = torch.full((1, 1, 1, 64), 300.0, dtype=torch.float16)
    k, v = q.expand(1, 4, 1, 64).contiguous(), torch.randn(1, 4, 1, 64).half()
    y = decode_attention(q, k, v, *_at((3, 1)), face=face)
    torch.testing.assert_close(y.float(), v.float().mean(1, keepdim=True), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("face", FACES)
def test_a_scale_that_is_not_positive(face: str, scale: float) -> None:
    q, (k, v) = torch.randn(1, 2, 2, 8), torch.randn(2, 1, 9, 2, 8)
    got = decode_attention(q, k, v, *_at((7, 2)), scale=scale, face=face)
    torch.testing.assert_close(got, attention(q, k, v, scale=scale))


@pytest.mark.parametrize("face", FACES)
def test_keys_that_score_minus_infinity_weigh_nothing(face: str) -> None:
    q, (k, v) = torch.ones(1, 1, 1, 8), torch.randn(2, 1, 3, 1, 8)
    k[:, :2] = -float("inf")
    y = decode_attention(q, k, v, *_at((2, 1)), face=face)
    torch.testing.assert_close(y, v[:, 2:])
    k[:, 2] = -float("inf")
    assert not decode_attention(q, k, v, *_at((2, 1)), face=face).any()


def test_under_autocast_it_computes_in_the_dtype_of_the_cache() -> None:
    q, (k, v) = torch.randn(1, 1, 2, 8), torch.randn(2, 1, 9, 2, 8)
    plain = decode_attention(q.bfloat16().float(), k, v, *_at((8, 1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = decode_attention(q.bfloat16(), k, v, *_at((8, 1)))
    assert torch.equal(y, plain.bfloat16())


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) in int8, and its scales (...)."""
    scale = x.abs().amax(-1) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("face", FACES)
def test_an_int8_cache_is_its_integers_times_its_scales(face: str, dtype: torch.dtype) -> None:
    """With queries of any dtype, in ragged rows, and with scales that lie anyhow."""
    q = torch.randn(3, 2, 8, 16).to(dtype)
    sizes = torch.rand(3, 40, 2, 1) * 3 + 0.1
    (k, k_scales), (v, v_scales) = (_quantized(torch.randn(3, 40, 2, 16) * sizes) for _ in "kv")
    at = _at((38, 2), (5, 1), (0, 2))
    wide = [x.double() * s.double()[..., None] for x, s in ((k, k_scales), (v, v_scales))]
    truth = decode_attention(q.double(), *wide, *at, window=20, sinks=3, face="reference")
    scales = {"k_scales": k_scales.mT.contiguous().mT}
    scales["v_scales"] = torch.stack([v_scales, v_scales], dim=-1)[..., 0]
    got = decode_attention(q, k, v, *at, window=20, sinks=3, face=face, **scales)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), truth, atol=4 * torch.finfo(dtype).eps, rtol=1e-2)


@pytest.mark.parametrize("face", FACES)
def test_an_int8_ring_token_by_token(face: str) -> None:
    """Nine times round it: each slot has the scale of its newest position."""
    window, length = 4, 60
    sizes = torch.logspace(-2, 2, length)[None, torch.randperm(length), None, None]
    q, (k, v) = torch.randn(1, length, 4, 8) / sizes, torch.randn(2, 1, length, 2, 8) * sizes
    ring = torch.full((2, 1, 1 + window, 2, 8), 77, dtype=torch.int8)
    ring_scales = torch.full((2, 1, 1 + window, 2), float("nan"))
    whole = torch.zeros(2, 1, length, 2, 8, dtype=torch.int8), torch.zeros(2, 1, length, 2)
    for start in range(length):
        new, at = slice(start, start + 1), _at((start, 1))
        options = {"sinks": 1, "face": face}
        outs = []
        for (cache, scales), rolling in (((ring, ring_scales), True), (whole, False)):
            named = dict(zip(("k_scales", "v_scales"), scales, strict=True))
            kv_append(*cache, k[:, new], v[:, new], *at, rolling=rolling, **named, **options)
            outs.append(
                decode_attention(
                    q[:, new], *cache, *at, window=window, rolling=rolling, **named, **options
                )
            )
        # Numbers up to about 100, summed in another order.
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-4)
    assert not ring_scales.isnan().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("face", FACES)
def test_a_scale_that_is_not_finite_is_seen_by_who_looks_and_by_nobody_else(
    face: str, value: float
) -> None:
    q, cache = torch.randn(1, 3, 2, 8), torch.full((2, 1, 20, 1, 8), 3, dtype=torch.int8)
    for spoilt in range(2):
        scales = torch.ones(2, 1, 20, 1)
        scales[spoilt, :, 10] = value
        scales[:, :, 1:5] = scales[:, :, 12:] = value
        named = {"k_scales": scales[0], "v_scales": scales[1]}
        y = decode_attention(q, *cache, *_at((9, 3)), window=5, sinks=1, face=face, **named)
        torch.testing.assert_close(y[:, 0], torch.full((1, 2, 8), 3.0))
        assert y[:, 1:].isnan().all()


def test_under_autocast_an_int8_cache_takes_the_queries_as_they_are() -> None:
    q, (k, k_scales) = torch.randn(1, 1, 2, 8), _quantized(torch.randn(1, 9, 2, 8))
    scales = {"k_scales": k_scales, "v_scales": k_scales}
    plain = decode_attention(q, k, k, *_at((8, 1)), **scales)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = decode_attention(q, k, k, *_at((8, 1)), **scales)
    assert torch.equal(y, plain.bfloat16())


def _arguments(**changes: Any) -> dict[str, Any]:
    arguments = {
        "q": torch.zeros(2, 3, 4, 8),
        "k_cache": torch.zeros(2, 9, 2, 8),
        "v_cache": torch.zeros(2, 9, 2, 8),
        "starts": torch.tensor([0, 1]),
        "counts": torch.tensor([3, 2]),
    }
    return {**arguments, **changes}


BAD = [
    ({"q": torch.zeros(2, 3, 3, 8)}, "3 query heads must be a multiple of the kv heads, got 2"),
    ({"q": torch.zeros(2, 3, 4, 6)}, r"q must have shape \(2, T, H, 8\), got \(2, 3, 4, 6\)"),
    ({"q": torch.zeros(1, 3, 4, 8)}, r"q must have shape \(2, T, H, 8\)"),
    ({"q": torch.zeros(2, 3, 0, 8)}, r"q must have shape \(2, T, H, 8\) with H of at least 1"),
    ({"q": torch.zeros(2, 3, 4, 8).int()}, "q must be floating point"),
    ({"q": torch.zeros(2, 3, 4, 8).half()}, "one dtype was expected .* q torch.float16"),
    ({"q": torch.zeros(2, 3, 4, 8, device="meta")}, "one device was expected .* q on meta"),
    ({"k_cache": torch.zeros(2, 9, 16)}, r"k_cache must have shape \(B, slots, G, K\)"),
    ({"v_cache": torch.zeros(2, 8, 2, 8)}, r"v_cache must have shape \(2, 9, 2, 8\)"),
    ({"starts": torch.tensor([0.0, 1.0])}, "starts must be int32 or int64"),
    ({"counts": torch.tensor([1])}, r"counts must have shape \(2\), got \(1,\)"),
    ({"starts": torch.tensor([0, -3])}, "starts must not be negative, got -3"),
    ({"starts": torch.tensor([7, 0])}, "must not exceed the 9 slots of the cache, got 10"),
    ({"counts": torch.tensor([4, 0])}, "counts must be between 0 and 3, got values from 0 to 4"),
    ({"window": 0}, r"window \(or None\) must be a whole number of at least 1, got 0"),
    ({"window": True}, r"window \(or None\) must be a whole number of at least 1, got True"),
    ({"sinks": -1}, "sinks must be a whole number of at least 0, got -1"),
    ({"scale": float("nan")}, "scale must be a finite number, got nan"),
    ({"rolling": None}, "rolling must be True or False, got None"),
    ({"rolling": True}, "a rolling cache needs a window, got None"),
    ({"rolling": True, "sinks": 9}, "more slots than sinks, got 9 slots and 9 sinks"),
    (
        {"rolling": True, "window": 6, "sinks": 2},
        "3 queries with a window of 6 need a rolling cache of at least 8 slots .* got 7",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^decode_attention.*{message}"):
        decode_attention(**_arguments(**changes))


INT8 = torch.zeros(2, 9, 2, 8, dtype=torch.int8)
SCALES = torch.zeros(2, 9, 2)
BAD_INT8 = [
    ({"k_scales": None}, "an int8 cache needs k_scales, got None"),
    ({"v_scales": None}, "an int8 cache needs v_scales, got None"),
    ({"k_cache": INT8.float()}, "v_cache must be floating point .* got torch.int8"),
    ({"v_cache": INT8.float()}, "one dtype was expected .* v_cache torch.float32"),
    ({"k_cache": INT8.float(), "v_cache": INT8.float()}, "k_scales are for an int8 cache, got"),
    ({"k_scales": SCALES.bfloat16()}, "k_scales must be float32, got torch.bfloat16"),
    ({"v_scales": SCALES[..., :1]}, r"v_scales must have shape \(2, 9, 2\), got \(2, 9, 1\)"),
    ({"v_scales": SCALES.to("meta")}, "one device was expected .* v_scales on meta"),
    ({"v_scales": SCALES.clone().requires_grad_()}, "got v_scales that require one"),
    ({"v_scales": [1.0]}, r"v_scales must be a tensor, got \[1.0\]"),
    ({"q": torch.zeros(2, 3, 4, 8, dtype=torch.int8)}, "q must be floating point"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_INT8, ids=[line for _, line in BAD_INT8])
def test_bad_input_of_an_int8_cache(changes: dict[str, Any], message: str) -> None:
    sound = {"k_cache": INT8, "v_cache": INT8, "k_scales": SCALES, "v_scales": SCALES}
    with pytest.raises(ValueError, match=f"^decode_attention.*{message}"):
        decode_attention(**_arguments(**{**sound, **changes}))


@pytest.mark.parametrize("face", FACES)
def test_no_queries_and_no_real_queries(face: str) -> None:
    empty = _arguments(q=torch.zeros(2, 0, 4, 8), counts=torch.tensor([0, 0]), face=face)
    assert decode_attention(**empty).shape == (2, 0, 4, 8)
    padding = _arguments(q=torch.ones(2, 3, 4, 8), counts=torch.tensor([0, 0]), face=face)
    y = decode_attention(**{**padding, "starts": torch.tensor([9, 0])})
    assert y.shape == (2, 3, 4, 8) and not y.any()

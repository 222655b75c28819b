"""``kv_append``: every face and the door, by its declaration; then what is particular to it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllm.ops import available_faces, kv_append
from pyllm.ops._registry import face_module
from pyllm.testing.cases.kv_append import KV_APPEND
from pyllm.testing.suite import InferenceSuite, TinyInferenceSuite, faces_on

FACES = faces_on("cpu", available_faces("kv_append"))


class TestKvAppend(InferenceSuite):
    operation = KV_APPEND
    door = staticmethod(kv_append)
    find_face = staticmethod(face_module)


class TestKvAppendInt8(TinyInferenceSuite):
    """Registration, compilation and the like with an int8 cache."""

    operation = replace(KV_APPEND, tiny={**KV_APPEND.tiny, "int8": True})
    door = staticmethod(kv_append)
    find_face = staticmethod(face_module)


def _numbered(start: int, count: int) -> Tensor:
    """(1, T, 1, 1): each position's own number."""
    return torch.arange(start, start + count).float().view(1, count, 1, 1)


def _append(slots: int, face: str, *steps: tuple[int, int], **options: Any) -> list[float]:
    """The keys of an empty cache (-1) after steps ``(start, count)``."""
    k_cache, v_cache = torch.full((2, 1, slots, 1, 1), -1.0)
    for start, count in steps:
        new = _numbered(start, count)
        at = torch.tensor([[start], [count]], dtype=torch.int32)
        kv_append(k_cache, v_cache, new, new + 100, *at, face=face, **options)
    written = k_cache >= 0
    assert torch.equal(v_cache, torch.where(written, k_cache + 100, k_cache))
    return k_cache.flatten().tolist()


@pytest.mark.parametrize("face", FACES)
def test_contiguous_by_hand(face: str) -> None:
    assert _append(6, face, (0, 2), (2, 1), (3, 2)) == [0, 1, 2, 3, 4, -1]
    assert _append(6, face, (0, 4), (1, 2), sinks=2) == [0, 1, 2, 3, -1, -1]


@pytest.mark.parametrize("face", FACES)
def test_rolling_by_hand(face: str) -> None:
    steps = [(position, 1) for position in range(9)]
    assert _append(4, face, *steps, rolling=True) == [8, 5, 6, 7]
    # One sink in slot 0; position p >= 1 is in slot 1 + (p - 1) % 3.
    assert _append(4, face, *steps, rolling=True, sinks=1) == [0, 7, 8, 6]
    assert _append(4, face, (0, 3), (3, 2), (5, 4), rolling=True, sinks=1) == [0, 7, 8, 6]


@pytest.mark.parametrize("face", FACES)
def test_of_more_than_a_ring_holds_the_last_are_kept(face: str) -> None:
    assert _append(5, face, (0, 20), rolling=True, sinks=2) == [0, 1, 17, 18, 19]
    assert _append(5, face, (0, 1), (1, 20), rolling=True, sinks=2) == [0, 1, 20, 18, 19]
    assert _append(3, face, (7, 7), rolling=True) == [12, 13, 11]


@pytest.mark.parametrize("face", FACES)
def test_a_slice_of_a_larger_cache_is_written_in_place(face: str) -> None:
    store = torch.zeros(2, 4, 3, 1, 2)
    new = torch.ones(2, 1, 1, 2)
    rows = store[:, 1:3]  # contiguous: whole rows of the batch
    at = (torch.tensor([0, 2]), torch.tensor([1, 1]))
    kv_append(*rows, new, new, *at, face=face)
    assert store.sum() == 8 and rows[:, 0, 0].all() and rows[:, 1, 2].all()


def test_a_saved_cache_that_was_written_to_is_noticed() -> None:
    """Autograd compares versions; a raw write would pass unseen and give wrong gradients."""
    k_cache, v_cache = torch.ones(2, 1, 3, 1, 2)
    weight = torch.ones(2, requires_grad=True)
    loss = (k_cache * weight).sum()
    new = torch.zeros(1, 1, 1, 2)
    kv_append(k_cache, v_cache, new, new, torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_function_sees_the_cache_before_and_after() -> None:
    def step(cache: Tensor, new: Tensor, starts: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        k_cache, v_cache = cache
        before = k_cache.sum()
        kv_append(k_cache, v_cache, new, 2 * new, starts, counts, rolling=True)
        return before, k_cache.sum(), v_cache.sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    at = (torch.tensor([5]), torch.tensor([2]))
    cache = torch.ones(2, 1, 4, 1, 2)
    results = compiled(cache, torch.full((1, 3, 1, 2), 3.0), *at)
    assert [float(result) for result in results] == [8, 16, 28]
    assert cache[0].flatten().tolist() == [1, 1, 3, 3, 3, 3, 1, 1]


@pytest.mark.parametrize("face", FACES)
def test_inference_tensors_are_written_to(face: str) -> None:
    with torch.inference_mode():
        k_cache, v_cache = torch.zeros(2, 1, 3, 1, 2)
        new = torch.ones(1, 1, 1, 2)
        kv_append(k_cache, v_cache, new, new, torch.tensor([1]), torch.tensor([1]), face=face)
    assert k_cache.flatten().tolist() == [0, 0, 1, 1, 0, 0]


def test_under_autocast_the_cache_keeps_its_dtype() -> None:
    k_cache, v_cache = torch.zeros(2, 1, 3, 1, 2)
    new = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    at = (torch.tensor([1]), torch.tensor([1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kv_append(k_cache, v_cache, new, new, *at)
    assert k_cache.dtype == torch.float32 and k_cache[0, 1].tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="one dtype was expected .* k torch.bfloat16"):
        kv_append(k_cache, v_cache, new, new, *at)


def _int8(**changes: Any) -> dict[str, Any]:
    """Arguments with an int8 cache."""
    caches = torch.zeros(2, 2, 5, 2, 4, dtype=torch.int8)
    scales = torch.zeros(2, 2, 5, 2)
    given = {"k_cache": caches[0], "v_cache": caches[1]}
    given |= {"k_scales": scales[0], "v_scales": scales[1]}
    return _arguments(**{**given, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("face", FACES)
def test_int8_by_hand(face: str, dtype: torch.dtype) -> None:
    """Each head of a position has its own scale, and a half goes to the even integer."""
    k = torch.zeros(2, 3, 2, 4, dtype=dtype)
    k[0, 0] = torch.tensor([[-127, 0.5, 1.5, 2.4], [0, 0.3, -0.5, 0.125]])
    arguments = _int8(k=k, v=-2 * k, face=face)
    arguments["k_scales"].fill_(7)
    kv_append(**arguments)
    assert arguments["k_cache"][0, 0].tolist() == [[-127, 0, 2, 2], [0, 76, -127, 32]]
    assert arguments["v_cache"][0, 0].tolist() == [[127, 0, -2, -2], [0, -76, 127, -32]]
    scales = torch.tensor([1, 0.5 / 127])
    assert torch.equal(arguments["k_scales"][0, 0], scales)
    assert torch.equal(arguments["v_scales"][0, 0], 2 * scales)
    # Zeros have the scale 0; what is not written keeps its own.
    assert arguments["k_scales"][0, 1:].flatten().tolist() == [0] * 4 + [7] * 4
    assert not arguments["k_cache"][0, 1:].any()


@pytest.mark.parametrize("face", FACES)
def test_a_slot_that_is_used_again_has_the_new_scale(face: str) -> None:
    arguments = _int8(counts=torch.tensor([1, 1]), rolling=True, face=face)
    for start, size in ((0, 100.0), (5, 0.01), (10, 3.0)):
        k = size * torch.randn(2, 3, 2, 4)
        new = {"k": k, "v": k.flip(0), "starts": torch.full((2,), start)}
        kv_append(**{**arguments, **new})
        for which, x in (("k", k), ("v", k.flip(0))):
            held = arguments[f"{which}_cache"][:, 0] * arguments[f"{which}_scales"][:, 0, :, None]
            error = (held - x[:, 0]).abs() / x[:, 0].abs().amax(-1, keepdim=True)
            assert float(error.max()) <= 0.5001 / 127


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("face", FACES)
def test_a_head_that_is_not_finite_has_zeros_and_a_scale_that_is_not(
    face: str, value: float
) -> None:
    k = torch.ones(2, 3, 2, 4)
    k[0, 1, 1, 2] = value
    arguments = _int8(k=k, v=k, face=face)
    kv_append(**arguments)
    for cache, scales in (("k_cache", "k_scales"), ("v_cache", "v_scales")):
        assert not arguments[cache][0, 1, 1].any()
        assert (~arguments[scales].isfinite()).nonzero().tolist() == [[0, 1, 1]]


def test_under_autocast_an_int8_cache_takes_what_comes() -> None:
    arguments = _int8(k=torch.ones(2, 3, 2, 4).bfloat16(), v=torch.ones(2, 3, 2, 4).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kv_append(**arguments)
    assert arguments["k_cache"].dtype == torch.int8 and arguments["k_cache"][0, 0, 0, 0] == 127


def _arguments(**changes: Any) -> dict[str, Any]:
    arguments = {
        "k_cache": torch.zeros(2, 5, 2, 4),
        "v_cache": torch.zeros(2, 5, 2, 4),
        "k": torch.zeros(2, 3, 2, 4),
        "v": torch.zeros(2, 3, 2, 4),
        "starts": torch.tensor([0, 1]),
        "counts": torch.tensor([3, 2]),
    }
    return {**arguments, **changes}


CACHE = torch.zeros(2, 5, 2, 4)
BAD = [
    ({"k_cache": torch.zeros(2, 5, 8)}, r"k_cache must have shape \(B, slots, G, K\)"),
    ({"k_cache": CACHE[:, :0]}, r"\(B, slots, G, K\) with slots, G, K of at least 1, got \(2, 0"),
    ({"v_cache": torch.zeros(2, 5, 2, 3)}, r"v_cache must have shape \(2, 5, 2, 4\), got"),
    ({"k": torch.zeros(2, 3, 1, 4)}, r"k must have shape \(2, T, 2, 4\), got \(2, 3, 1, 4\)"),
    ({"v": torch.zeros(2, 2, 2, 4)}, r"v must have shape \(2, 3, 2, 4\), got \(2, 2, 2, 4\)"),
    ({"k": torch.zeros(2, 3, 2, 4, dtype=torch.int32)}, "k must be floating point"),
    ({"v_cache": CACHE.to_sparse()}, "v_cache must be a dense tensor"),
    ({"k": torch.zeros(2, 3, 2, 4).double()}, "one dtype was expected .* k torch.float64"),
    ({"v_cache": CACHE.to("meta")}, "one device was expected .* v_cache on meta"),
    ({"starts": torch.zeros(2)}, "starts must be int32 or int64, got torch.float32"),
    ({"counts": torch.ones(2, dtype=torch.bool)}, "counts must be int32 or int64, got torch.bool"),
    ({"starts": torch.tensor([0])}, r"starts must have shape \(2\), got \(1,\)"),
    ({"counts": torch.tensor([[1], [1]])}, r"counts must have shape \(2\), got \(2, 1\)"),
    ({"starts": [0, 1]}, r"starts must be a tensor, got \[0, 1\]"),
    ({"starts": torch.tensor([0, -1])}, "starts must not be negative, got -1"),
    ({"starts": torch.tensor([3, 0])}, "must not exceed the 5 slots of the cache, got 6"),
    ({"starts": torch.tensor([0, 2**40])}, "must not exceed the 5 slots of the cache, got 1099"),
    ({"counts": torch.tensor([3, 4])}, "counts must be between 0 and 3, got values from 3 to 4"),
    ({"counts": torch.tensor([-1, 2])}, "counts must be between 0 and 3, got values from -1 to 2"),
    ({"starts": torch.tensor([0, 2**31]), "rolling": True}, "exceed the 2147483647 positions"),
    ({"sinks": 5, "rolling": True}, "more slots than sinks, got 5 slots and 5 sinks"),
    ({"sinks": -1}, "sinks must be a whole number of at least 0, got -1"),
    ({"sinks": 1.0}, "sinks must be a whole number of at least 0, got 1.0"),
    ({"rolling": 1}, "rolling must be True or False, got 1"),
    ({"k_cache": CACHE.mT.contiguous().mT}, "k_cache is written to and must be contiguous, got st"),
    ({"v_cache": torch.zeros(2, 9, 2, 4)[:, :5]}, "v_cache is written to and must be contiguous"),
    ({"k_cache": CACHE[:1].expand(2, 5, 2, 4)}, "k_cache is written to and must be contiguous"),
    ({"k_cache": CACHE, "v_cache": CACHE}, "k_cache is written to .* got v_cache in the same pl"),
    ({"k_cache": CACHE, "k": CACHE[:, 2:]}, "k_cache is written to .* got k in the same place; cl"),
    ({"v_cache": CACHE, "k": CACHE[:, :3]}, "v_cache is written to .* got k in the same place"),
    ({"v_cache": CACHE, "v": CACHE[:, 1:4]}, "v_cache is written to .* got v in the same place"),
    ({"face": "triton"}, "has no face 'triton' here for tensors on cpu"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^kv_append.*{message}"):
        kv_append(**_arguments(**changes))


SCALES = torch.zeros(2, 5, 2)
BAD_INT8 = [
    ({"k_scales": None}, "an int8 cache needs k_scales, got None"),
    ({"v_scales": None}, "an int8 cache needs v_scales, got None"),
    (
        {"k_cache": CACHE, "v_cache": CACHE + 1},
        "k_scales are for an int8 cache, got .* torch.float32",
    ),
    (
        {"k_cache": CACHE, "v_cache": CACHE + 1, "k_scales": None},
        "v_scales are for an int8 cache, got .* torch.float32",
    ),
    ({"v_cache": CACHE}, "one dtype was expected .* k_cache torch.int8, v_cache torch.float32"),
    ({"k_cache": CACHE}, "v_cache must be floating point .* got torch.int8"),
    ({"v_cache": CACHE.to(torch.uint8)}, "one dtype was expected .* v_cache torch.uint8"),
    ({"k_scales": SCALES.double()}, "k_scales must be float32, got torch.float64"),
    ({"v_scales": SCALES.half()}, "v_scales must be float32, got torch.float16"),
    ({"v_scales": 1.0}, "v_scales must be a tensor, got 1.0"),
    ({"k_scales": SCALES[:, :4]}, r"k_scales must have shape \(2, 5, 2\), got \(2, 4, 2\)"),
    ({"v_scales": torch.zeros(2, 5)}, r"v_scales must have shape \(2, 5, 2\), got \(2, 5\)"),
    ({"k_scales": SCALES.to("meta")}, "one device was expected .* k_scales on meta"),
    ({"k_scales": SCALES.to_sparse()}, "k_scales must be a dense tensor"),
    ({"k_scales": SCALES.mT.contiguous().mT}, "k_scales is written to and must be contiguous"),
    ({"v_scales": SCALES[:, :1].expand(2, 5, 2)}, "v_scales is written to and must be contig"),
    ({"k_scales": SCALES, "v_scales": SCALES}, "k_scales is written to .* got v_scales in the"),
    ({"k_scales": SCALES.clone().requires_grad_()}, "got k_scales that require one"),
    ({"k": torch.zeros(2, 3, 2, 4).half()}, "one dtype was expected .* k torch.float16, v torch.f"),
    (
        {"k": torch.zeros(2, 3, 2, 4, dtype=torch.int8)},
        "k must be floating point .* got torch.int8",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_INT8, ids=[line for _, line in BAD_INT8])
def test_bad_input_of_an_int8_cache(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^kv_append.*{message}"):
        kv_append(**_int8(**changes))


def test_what_is_not_bad() -> None:
    """Neighbours in one storage, and padding that would not fit."""
    store = torch.zeros(2, 2, 5, 2, 4)
    kv_append(**_arguments(k_cache=store[0], v_cache=store[1]))
    kv_append(**_arguments(starts=torch.tensor([5, 4]), counts=torch.tensor([0, 1])))
    kv_append(**_arguments(counts=torch.tensor([0, 0]), sinks=100))

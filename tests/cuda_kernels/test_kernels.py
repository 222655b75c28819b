"""The CUDA kernels executed on the CPU: any order of threads, wrong indices, odd addresses."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllm._native import cuda_extension, cuda_on_cpu
from pyllm.cuda_kernels import _launch, _routing
from pyllm.ops import (
    available_faces,
    decode_attention,
    moe_combine,
    moe_dispatch,
    rms_norm,
    rope,
    route_topk,
)
from pyllm.ops._registry import face_module
from pyllm.testing import OPERATIONS, OpCase, check_face, run_face
from pyllm.testing.check import Result, expectations

pytestmark = pytest.mark.skipif(not cuda_on_cpu(), reason="the CUDA kernels here are not the CPU's")

OPS = [op for op in OPERATIONS if "cuda" in available_faces(op)]
CASES = [case for op in OPS for case in OPERATIONS[op].smoke_cases]
NAN = float("nan")


@pytest.fixture
def set_order() -> Iterator[object]:
    yield cuda_extension().set_order
    cuda_extension().set_order(0)


def _run(case: OpCase, dtype: torch.dtype) -> Result:
    upstreams = expectations(case, dtype, "cpu", 0)[2]
    return run_face(case, face_module(case.op, "cuda"), case.make_inputs(dtype), upstreams)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.label}")
def test_the_order_of_threads_and_blocks_changes_nothing(case: OpCase, set_order) -> None:
    """With a barrier or a __syncwarp too few, it does."""
    for dtype in (torch.float32, torch.float16):
        first = _run(case, dtype)
        for order in (1, 2, 3):
            set_order(order)
            again = _run(case, dtype)
            set_order(0)
            for name, value in {**first.outputs, **first.gradients}.items():
                other = {**again.outputs, **again.gradients}[name]
                assert torch.equal(value.nan_to_num(0.5), other.nan_to_num(0.5)), (name, order)


def _raw(op: str, *arguments: object) -> object:
    """The operation past its door, whose checks a card's tensors do not get."""
    return getattr(torch.ops.pyllm, f"{op}_forward").default(*arguments, "cuda")


LONG = {"B": 2, "G": 2, "J": 2, "K": 8, "sinks": 0, "room": 1, "int8": False, "ragged": True}


@pytest.mark.parametrize(
    "sizes",
    [
        {**LONG, "T": 2, "past": 230, "window": 0, "rolling": False},
        {**LONG, "T": 5, "past": 270, "window": 150, "sinks": 70, "rolling": True, "J": 3},
        {**LONG, "T": 1, "past": 190, "window": 0, "rolling": False, "K": 33, "int8": True},
    ],
    ids=["contiguous", "rolling", "int8"],
)
def test_many_tiles_of_keys_in_a_chunk(
    sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, set_order
) -> None:
    """As in a cache of more slots than 64 chunks of a tile have."""
    face = face_module("decode_attention", "cuda")
    monkeypatch.setattr(face, "MOST_CHUNKS", 1)
    for order in (0, 1, 2):
        set_order(order)
        for dtype in (torch.float32, torch.float16, torch.float64):
            check_face(OPERATIONS["decode_attention"].case(sizes), face, dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1, -(2**31)])
def test_an_expert_out_of_range_is_nan_and_harms_no_other(wrong: int, dtype: torch.dtype) -> None:
    x, experts = torch.randn(5, 8), torch.tensor([[0, 1], [2, 0], [1, 1], [2, 1], [0, 0]])
    experts[2, 0] = wrong
    rows, order, position, offsets = _raw("moe_dispatch", x, experts.to(dtype), 3)
    assert offsets.tolist() == [0, 4, 7, 9]
    assert rows[9].isnan().all() and rows[:9].isfinite().all()
    assert sorted(order.tolist()) == list(range(10)) and order[9] == 4
    assert torch.equal(order[position.reshape(-1).long()], torch.arange(10, dtype=torch.int32))
    y = moe_combine(rows, torch.full((5, 2), 0.5), position, face="cuda")
    torch.testing.assert_close(y[[0, 1, 3, 4]], x[[0, 1, 3, 4]])
    assert y[2].isnan().all()


def test_an_int64_expert_that_int32_does_not_hold_is_out_of_range() -> None:
    experts = torch.tensor([[2**32 + 1], [0]])
    rows, _, _, offsets = _raw("moe_dispatch", torch.ones(2, 4), experts, 3)
    assert offsets.tolist() == [0, 1, 1, 1]
    assert rows[1].isnan().all()


@pytest.mark.parametrize("wrong", [-1, 4, 2**33])
def test_a_position_out_of_range_is_nan(wrong: int) -> None:
    rows, weights = torch.randn(4, 8), torch.rand(2, 2)
    position = torch.tensor([[0, 1], [2, 3]])
    face = face_module("moe_combine", "cuda")
    right = face.moe_combine_forward(rows, weights, position)
    position[1, 1] = wrong
    y = face.moe_combine_forward(rows, weights, position)
    assert torch.equal(y[0], right[0]) and y[1].isnan().all()
    drows, dweights = face.moe_combine_backward(torch.ones(2, 8), rows, weights, position)
    assert drows[:3].isfinite().all() and dweights.isnan().tolist() == [[False] * 2, [False, True]]


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (6, 1), (5, 2), (0, 3), (0, -1)])
def test_a_position_outside_of_the_cache(start: int, count: int) -> None:
    """Nothing is written there, and its row is NaN."""
    held = torch.full((2, 2, 6, 1, 4), 7.0)
    new = torch.randn(2, 2, 2, 1, 4)
    starts = torch.tensor([start, 1], dtype=torch.int32)
    counts = torch.tensor([count, 2], dtype=torch.int32)
    _raw("kv_append", *held, *new, starts, counts, 0, False, None, None)
    assert torch.equal(held[0, 1, 1:3], new[0, 1]) and torch.equal(held[1, 1, 1:3], new[1, 1])
    assert (held[:, 1, [0, 3, 4, 5]] == 7).all()
    held[:, 0] = torch.randn(2, 6, 1, 4)
    q = torch.randn(2, 2, 3, 4)
    y = _raw("decode_attention", q, *held, starts, counts, 1.0, 0, 0, False, None, None)
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("rolling", [False, True], ids=["contiguous", "rolling"])
@pytest.mark.parametrize(("start", "count"), [(2**32 + 1, 1), (2, 2**32 + 1), (2**31 - 1, 1)])
def test_a_position_that_int32_does_not_hold(start: int, count: int, rolling: bool) -> None:
    """It would become another one, with a slot of its own."""
    held, new = torch.full((2, 1, 6, 1, 4), 7.0), torch.randn(2, 1, 2, 1, 4)
    at = torch.tensor([start]), torch.tensor([count])
    _raw("kv_append", *held, *new, *at, 0, rolling, None, None)
    assert (held == 7).all()
    q, window = torch.randn(1, 2, 3, 4), 3 if rolling else 0
    y = _raw("decode_attention", q, *held, *at, 1.0, window, 0, rolling, None, None)
    assert y.isnan().all()


def test_many_tiles_are_sorted() -> None:
    """More choices than the sort has tiles of the least size."""
    n = _routing.LEAST_TILE * _routing.MOST_TILES + 1000
    experts = torch.randint(5, (n, 1), generator=torch.Generator().manual_seed(0))
    got = _routing.sort_by_expert(experts, 5)
    expected = face_module("moe_dispatch", "reference").sort_by_expert(experts, 5)
    for have, want in zip(got, expected, strict=True):
        assert torch.equal(have, want)


def test_many_experts_are_sorted(set_order) -> None:
    """More counts than the scan adds up at once."""
    experts = torch.randint(2500, (40, 1), generator=torch.Generator().manual_seed(0))
    expected = face_module("moe_dispatch", "reference").sort_by_expert(experts, 2500)
    for order in (0, 1, 2):
        set_order(order)
        got = _routing.sort_by_expert(experts, 2500)
        for have, want in zip(got, expected, strict=True):
            assert torch.equal(have, want)


def test_many_rows_of_a_block_in_several_warps(monkeypatch: pytest.MonkeyPatch, set_order) -> None:
    """The warps of a block meet once for each row, in the same shared memory."""
    face = face_module("rms_norm", "cuda")
    monkeypatch.setattr(face, "MOST_BLOCKS", 1)
    for order in (0, 1, 2):
        set_order(order)
        check_face(OPERATIONS["rms_norm"].case({"N": 4, "D": 300}), face, torch.float32)


def test_the_last_warp_has_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    face = face_module("route_topk", "cuda")
    monkeypatch.setattr(face, "MOST_WARPS", 4)
    check_face(OPERATIONS["route_topk"].case({"N": 10, "E": 7, "A": 2}), face, torch.float32)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_the_z_loss_of_infinite_logits_is_infinite(value: float) -> None:
    """And not NaN, as for the reference."""
    logits = torch.randn(3, 5)
    logits[1] = value
    losses = [route_topk(logits, 2, face=face).z_loss for face in ("cuda", "reference")]
    assert all(loss == float("inf") for loss in losses)


@pytest.mark.parametrize("at", [2, 34, 38])
def test_the_z_loss_of_a_logit_that_is_not_a_number(at: int) -> None:
    """Beside an infinite one, in the same lane or in another."""
    logits = torch.zeros(1, 40)
    logits[0, 6], logits[0, at] = float("inf"), NAN
    losses = [route_topk(logits, 2, face=face).z_loss for face in ("cuda", "reference")]
    assert all(loss.isnan() for loss in losses)


def test_no_experts_were_chosen() -> None:
    rows, order, position, offsets = moe_dispatch(
        torch.ones(0, 4), torch.ones(0, 2, dtype=torch.int32), 3, face="cuda"
    )
    assert rows.shape == (0, 4) and order.numel() == position.numel() == 0
    assert offsets.tolist() == [0] * 4


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
def test_misaligned_tensors(shift: int) -> None:
    """16 bytes at once are read where that is possible only."""
    for op in OPS:
        case = OPERATIONS[op].smoke_cases[2]
        inputs = case.make_inputs(torch.float16)
        moved = {
            name: value if name in case.operation.mutates else _moved(value, shift)
            for name, value in inputs.items()
        }
        forward = getattr(face_module(op, "cuda"), f"{op}_forward")
        want = case.operation.forward_outputs(forward, case.operation.fresh(inputs))
        got = case.operation.forward_outputs(forward, case.operation.fresh(moved))
        for have, value in zip(got, want, strict=True):
            assert torch.equal(have.nan_to_num(0.5), value.nan_to_num(0.5)), op


def _moved(value: object, shift: int) -> object:
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(value.numel() + shift, dtype=value.dtype)
    view = storage[shift:].view(value.shape)
    return view.copy_(value)


def _between_packs(drawn: Tensor, where: str) -> Tensor:
    """The numbers of (2, 3, 2, K), of whole packs, where one stride alone is none, or the start."""
    width = drawn.shape[-1]
    strides = {"batch": (6, 2, 1), "token": (8, 2, 1), "head": (12, 4, 1), "start": (6, 2, 1)}
    in_packs = dict(zip(("batch", "token", "head"), strides[where], strict=True))
    steps = [packs * width + (name == where) for name, packs in in_packs.items()]
    storage = drawn.new_zeros(40 * width)
    given = storage.as_strided(drawn.shape, (*steps, 1), 3 if where == "start" else 0)
    return given.copy_(drawn)


WHERE = ("batch", "token", "head", "start")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("moved", ["k", "v"])
def test_rows_of_whole_packs_between_packs(moved: str, where: str) -> None:
    """Each stride of each operand counts, and where it begins."""
    drawn = {"k": torch.randn(2, 3, 2, 8).half(), "v": torch.randn(2, 3, 2, 8).half()}
    given = {**drawn, moved: _between_packs(drawn[moved], where)}
    held = torch.zeros(2, 2, 3, 2, 8, dtype=torch.float16)
    at = torch.tensor([0, 0]), torch.tensor([3, 3])
    _raw("kv_append", *held, *given.values(), *at, 0, False, None, None)
    assert torch.equal(held[0], drawn["k"]) and torch.equal(held[1], drawn["v"])
    q = torch.randn(2, 3, 2, 8).half()
    y = decode_attention(q, *given.values(), *at, face="cuda")
    # Whose sums are in another order.
    torch.testing.assert_close(y, decode_attention(q, *drawn.values(), *at, face="cuda"))


@pytest.mark.parametrize("moved", [0, 1], ids=["k", "v"])
def test_a_cache_that_begins_between_packs(moved: int) -> None:
    k, v = torch.randn(2, 2, 3, 2, 8).half()
    held = [torch.zeros(2, 3, 2, 8).half() for _ in range(2)]
    held[moved] = torch.zeros(held[moved].numel() + 3).half()[3:].view(held[moved].shape)
    at = torch.tensor([0, 0]), torch.tensor([3, 3])
    _raw("kv_append", *held, k, v, *at, 0, False, None, None)
    assert torch.equal(held[0], k) and torch.equal(held[1], v)


@pytest.mark.parametrize("where", WHERE)
def test_rope_of_rows_between_packs(where: str) -> None:
    x, angles = torch.randn(2, 3, 2, 16).half(), torch.randn(3, 8)
    y = rope(_between_packs(x, where), angles.cos(), angles.sin(), face="cuda")
    assert torch.equal(y, rope(x, angles.cos(), angles.sin(), face="cuda"))


def test_a_head_that_is_too_wide_goes_to_the_next_face() -> None:
    q, (k, v) = torch.randn(1, 1, 1, 513), torch.randn(2, 1, 3, 1, 513)
    at = torch.tensor([2], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    with pytest.raises(ValueError, match="cuda: a head of 513 is wider than 512"):
        decode_attention(q, k, v, *at, face="cuda")
    widest = [tensor[..., :512] for tensor in (q, k, v)]  # in rows that begin at odd addresses
    y = decode_attention(*widest, *at, face="cuda")
    torch.testing.assert_close(y, decode_attention(*widest, *at, face="reference"))


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_row_that_is_not_finite_stays_alone(value: float) -> None:
    x = torch.randn(5, 33)
    clean = rms_norm(x, torch.ones(33), face="cuda")
    x[2, 7] = value
    y = rms_norm(x, torch.ones(33), face="cuda")
    rest = [0, 1, 3, 4]
    assert torch.equal(y[rest], clean[rest]) and y[2].isnan().any()


def test_tensors_of_other_devices_are_refused() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="one device was expected for all tensors, got cpu and me"):
        _launch.launch("rms_norm_forward", 0, x, x.to("meta"))
    with pytest.raises(ValueError, match="tensors on cpu were expected, got meta"):
        _launch.launch("rms_norm_forward", 0, x.to("meta"))
    with pytest.raises(ValueError, match="the cuda face has no torch.int8"):
        face_module("rms_norm", "cuda").rms_norm_forward(x.to(torch.int8), x[0], 0.0)


def test_a_dtype_code_that_is_none() -> None:
    with pytest.raises(ValueError, match="no such dtype code"):
        cuda_extension().rms_norm_forward(9, 16, 16, 0.0, 16, 16, 1, 4, 0)

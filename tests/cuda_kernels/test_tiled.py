"""The CUDA kernels of tiled products, executed on the CPU: what the shared suite does not ask."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm._native import cuda_extension, cuda_on_cpu
from pyllm.cuda_kernels._launch import launch
from pyllm.ops import attention, available_faces, linear_cross_entropy, moe_ffn
from pyllm.ops._registry import face_module
from pyllm.reference import _loss_sizes
from pyllm.testing import OPERATIONS, OpCase, check_face
from pyllm.testing.check import expectations, run_face
from pyllm.testing.suite import TILED

pytestmark = pytest.mark.skipif(not cuda_on_cpu(), reason="the CUDA kernels here are not the CPU's")

CASES = [case for op in TILED for case in OPERATIONS[op].smoke_cases if case.sizes.get("N") != 0]


class NoWaiting(TorchDispatchMode):
    """What reads a number back from a card waits for it, and cannot be captured in a graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.label}")
def test_nothing_waits_for_the_card(case: OpCase) -> None:
    inputs = case.make_inputs(torch.float16)
    upstreams = expectations(case, torch.float16, "cpu", 0)[2]
    with NoWaiting():
        run_face(case, face_module(case.op, "cuda"), inputs, upstreams)


def test_pairs_of_halfs_that_overflow_are_computed_once_more() -> None:
    """48 products of 300 x 300, then as many of 300 x -300, and a half ends at 65,504."""
    signs = torch.cat([torch.ones(48), -torch.ones(48)])
    weights, experts = torch.ones(9, 1), torch.zeros(9, 1, dtype=torch.int32)

    w_in = (300 * signs).repeat(1, 16, 1)
    w_in[:, :, 0] = 303  # 300 * 3 is left
    x, w_in, w_out = (
        value.half() for value in (torch.full((9, 96), 300.0), w_in, torch.zeros(1, 96, 8))
    )
    forward = torch.ops.pyllm.moe_ffn_forward
    pre = forward(x, w_in, w_out, weights, experts, "swiglu", "cuda")[1]
    assert (pre == 900).all()

    x, w_in = torch.full((9, 1), 10.0).half(), torch.full((1, 96, 1), 30.0).half()
    w_out = (300 * signs).view(1, 1, 96).half()
    y = moe_ffn(x, w_in, w_out, weights, experts, "gelu", face="cuda")
    assert (y == 0).all()


@pytest.mark.parametrize("n_tokens", [3, 9])
@pytest.mark.parametrize(
    ("wrong", "n_experts"), [(-1, 3), (3, 3), (2**31 - 1, 3), (-1, 32), (32, 32)]
)
def test_an_expert_out_of_range_is_nan_and_harms_no_other(
    wrong: int, n_experts: int, n_tokens: int
) -> None:
    """With 32 experts, those of no expert begin the second round of the list of tiles."""
    case = OPERATIONS["moe_ffn"].case(
        {"N": n_tokens, "D": 8, "F": 5, "E": n_experts, "A": 2, "load": "even", "act": "swiglu"}
    )
    given = list(case.make_inputs(torch.float32).values())
    right, *_ = torch.ops.pyllm.moe_ffn_forward(*given, "cuda")
    given[4] = given[4].clone()
    given[4][1, 0] = wrong
    y, *saved = torch.ops.pyllm.moe_ffn_forward(*given, "cuda")
    assert y[1].isnan().all()
    others = torch.arange(n_tokens) != 1
    assert torch.equal(y[others], right[others])
    assert saved[0].isnan().all(-1).sum() == 1
    dx, dw_in, dw_out, dweights = torch.ops.pyllm.moe_ffn_backward(
        torch.ones_like(y), *given[:4], *saved, "swiglu", "cuda"
    )
    assert dx[1].isnan().all() and dx[others].isfinite().all()
    assert dw_in.isfinite().all() and dw_out.isfinite().all()
    assert dweights[1, 0].isnan() and dweights.isnan().sum() == 1


def test_a_head_that_is_too_wide_goes_to_the_next_face() -> None:
    q, k, v = (torch.randn(1, 3, 1, 129) for _ in range(3))
    with pytest.raises(ValueError, match="cuda: heads of 129 numbers, more than 128"):
        attention(q, k, v, face="cuda")
    with pytest.warns(UserWarning, match="runs on the reference face"):
        y = torch.ops.pyllm.attention_forward(q, k, v, 1.0, True, 0, 0, "cuda,reference")[0]
    torch.testing.assert_close(y, attention(q, k, v, scale=1.0, face="reference"))


@pytest.fixture
def narrow_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_loss_sizes, "CHUNK_BYTES", 1)
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_many_chunks_of_words(narrow_chunks: None, dtype: torch.dtype) -> None:
    operation = OPERATIONS["linear_cross_entropy"]
    case = operation.case({"N": 70, "D": 33, "V": 517, "ignored": "some"})
    check_face(case, face_module(operation.name, "cuda"), dtype)


@pytest.mark.parametrize("target", [40, -1, 10**11])
def test_a_target_out_of_range_is_nan(target: int) -> None:
    x, weight = torch.randn(3, 8), torch.randn(40, 8)
    targets = torch.tensor([0, 7, 39])
    right = linear_cross_entropy(x, weight, targets, reduction="none", face="cuda")
    targets[1] = target
    forward = torch.ops.pyllm.linear_cross_entropy_forward
    loss, lse = forward(x, weight, targets, -100, "cuda")
    assert torch.equal(loss[[0, 2]], right[[0, 2]]) and loss[1].isnan()
    assert lse.isfinite().all()


def test_words_behind_the_last_one_are_no_logits_of_zero() -> None:
    """Beside which logits of -200 would have no exponential."""
    x, weight = torch.full((3, 2), -10.0), torch.full((70, 2), 10.0)
    targets = torch.tensor([0, 7, 69])
    loss = linear_cross_entropy(x, weight, targets, reduction="none", face="cuda")
    expected = linear_cross_entropy(x, weight, targets, reduction="none", face="reference")
    torch.testing.assert_close(loss, expected)


def test_words_that_are_impossible() -> None:
    """Logits of -inf: in all of the first tile of words, in all of another, in a part of one."""
    x, weight = torch.ones(3, 2), torch.randn(700, 2)
    weight[:128] = weight[256:385] = weight[500:510] = -float("inf")
    targets = torch.tensor([130, 699, 385])
    loss = linear_cross_entropy(x, weight, targets, reduction="none", face="cuda")
    expected = linear_cross_entropy(x, weight, targets, reduction="none", face="reference")
    torch.testing.assert_close(loss, expected)


def test_the_list_of_tiles() -> None:
    """Of 70, 0 and 30 rows, and 10 of no expert; nothing of what was there before is left."""
    offsets, tiles = torch.tensor([0, 70, 70, 100], dtype=torch.int32), torch.full((7, 2), 7).int()
    launch("moe_tiles", offsets, tiles, 3, 110, 64, 7)
    assert tiles.tolist() == [[0, 0], [0, 64], [2, 70], [3, 100], *[[-1, 0]] * 3]


def test_far_more_experts_than_rows() -> None:
    """The list of tiles is made by a warp, 32 experts at a time."""
    operation = OPERATIONS["moe_ffn"]
    sizes = {"N": 90, "D": 8, "F": 4, "E": 100, "A": 1, "load": "half", "act": "gelu"}
    check_face(operation.case(sizes), face_module("moe_ffn", "cuda"), torch.float32)


@pytest.mark.parametrize("op", TILED)
def test_the_face_is_there(op: str) -> None:
    native = cuda_extension()
    assert "cuda" in available_faces(op) and native is not None and native.ON_CPU

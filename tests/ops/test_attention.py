"""``attention``: every face and the door, by its declaration; then what is particular to it."""

import pytest
import torch

from pyllm.ops import attention, available_faces
from pyllm.ops._registry import face_module
from pyllm.testing.cases.attention import ATTENTION
from pyllm.testing.suite import OperationSuite


class TestAttention(OperationSuite):
    operation = ATTENTION
    door = staticmethod(attention)
    find_face = staticmethod(face_module)


def test_against_pytorch() -> None:
    q, k, v = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attention(q, k, v), expected.transpose(1, 2))


def test_the_last_queries_alone_give_the_same() -> None:
    q, k, v = torch.randn(1, 9, 2, 8), torch.randn(1, 9, 1, 8), torch.randn(1, 9, 1, 8)
    whole = attention(q, k, v, window=4)
    for start in range(9):
        torch.testing.assert_close(attention(q[:, start:], k, v, window=4), whole[:, start:])


def test_a_wide_window_is_no_window() -> None:
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, window=9), attention(q, k, v))


def test_sinks_and_a_window_that_meet_are_no_window() -> None:
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, window=5, sinks=4), attention(q, k, v))
    assert not torch.allclose(attention(q, k, v, window=5, sinks=3), attention(q, k, v))
    assert torch.equal(attention(q, k, v, sinks=3), attention(q, k, v))


def test_the_future_is_not_seen() -> None:
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    before = attention(q, k, v)
    k[:, 5:], v[:, 5:] = 7.0, 1e6
    torch.testing.assert_close(attention(q, k, v)[:, :5], before[:, :5])


def test_autocast_computes_in_its_dtype() -> None:
    q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(q, k, v)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert q.grad.dtype == torch.float32


def _tensors(*, heads: int = 4, kv_heads: int = 2, keys: int = 5) -> tuple[torch.Tensor, ...]:
    return torch.ones(1, 5, heads, 8), *(torch.ones(1, keys, kv_heads, 8) for _ in range(2))


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (_tensors(heads=3), {}, "3 query heads must be a multiple of the kv heads, got 2"),
        (_tensors(keys=4), {}, "at least as many keys as queries, got 5 queries and 4 keys"),
        (
            _tensors(),
            {"window": 0},
            r"window \(or None\) must be a whole number of at least 1, got 0",
        ),
        (_tensors(), {"sinks": -1}, "sinks must be a whole number of at least 0, got -1"),
        ([t[0] for t in _tensors()], {}, r"q must have shape \(B, T, H, K\)"),
        ([t.int() for t in _tensors()], {}, "q must be floating point"),
        ([*_tensors()[:2], _tensors(keys=6)[2]], {}, "v must have shape"),
        ([_tensors()[0].double(), *_tensors()[1:]], {}, "one dtype was expected"),
    ],
)
def test_bad_input(tensors: list[torch.Tensor], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **options)


@pytest.mark.parametrize("face", available_faces("attention"))
def test_scores_beyond_float16(face: str) -> None:
    # 300 x 300 x 64 = 5,760,000, and float16 ends at 65,504.
    q = torch.full((1, 4, 1, 64), 300.0, dtype=torch.float16)
    v = torch.randn(1, 4, 1, 64).half()
    y = attention(q.requires_grad_(), q.detach().clone(), v, face=face)
    expected = v.float().cumsum(1) / torch.arange(1, 5).view(1, 4, 1, 1)
    torch.testing.assert_close(y.float(), expected, atol=2e-3, rtol=2e-3)
    (gradient,) = torch.autograd.grad(y.float().sum(), q)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("face", available_faces("attention"))
def test_the_widest_window_is_no_window(face: str) -> None:
    # A position less 2^63 - 1 is beyond int64: such a window once hid every key.
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    widest = attention(q, k, v, window=2**63 - 1, face=face)
    torch.testing.assert_close(widest, attention(q, k, v, face=face))


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("face", available_faces("attention"))
def test_a_scale_that_is_not_positive(face: str, scale: float) -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    got = attention(q, k, v, scale=scale, face=face)
    torch.testing.assert_close(got, attention(q, k, v, scale=scale, face="reference"))

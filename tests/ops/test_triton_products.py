"""What the declared cases do not reach in the Triton faces: blocks of cards, and bad indices."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from pyllm.triton_kernels import _routing, linear_cross_entropy, moe_ffn
from pyllm.triton_kernels._tuning import INTERPRETED, Blocks, fitting

from pyllm.reference.moe_dispatch import sort_by_expert
from pyllm.testing.cases.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from pyllm.testing.cases.moe_ffn import MOE_FFN
from pyllm.testing.check import check_face

interpreted = pytest.mark.skipif(not INTERPRETED, reason="only Triton's interpreter runs here")
SMALLEST_CARD = 99 * 1024
"""Bytes of shared memory on sm_86 and sm_89."""


def _lists(table: Any) -> Iterator[tuple[int, tuple[Blocks, ...]]]:
    """(bytes of an element, configurations) of every list in a table."""
    for size, entry in table.items():
        for blocks in entry.values() if isinstance(entry, dict) else [entry]:
            yield size, blocks


MOE_TABLES = (moe_ffn.UP_GATED, moe_ffn.UP_PLAIN, moe_ffn.ROWS, moe_ffn.WEIGHT_GRADIENT)
LCE_TABLES = tuple(
    getattr(linear_cross_entropy, name) for name in ("SPANS", "PRODUCTS", "ROW_GRADIENT")
)


def _shapes(tables: tuple[Any, ...]) -> list[tuple[int, int, int]]:
    return sorted(
        {(b.m, b.n, b.k) for table in tables for _, blocks in _lists(table) for b in blocks}
    )


@pytest.mark.parametrize("table", [*MOE_TABLES, *LCE_TABLES], ids=range(7))
def test_every_card_has_a_configuration(table: Any) -> None:
    for size, blocks in _lists(table):
        assert fitting(blocks, size, SMALLEST_CARD), blocks
        assert fitting(blocks, size, 1 << 20) == blocks


def test_row_blocks_are_as_tall_as_the_experts_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_ffn, "INTERPRETED", False)
    sizes = moe_ffn.ROWS[2]
    assert [moe_ffn.rows_of_block(n, 16, sizes) for n in (1, 256, 257, 1025, 99999)] == [
        16,
        16,
        64,
        128,
        128,
    ]
    assert moe_ffn.rows_of_block(1, 16, sizes, moe_ffn.LEAST_BACKWARD_ROWS) == 64
    assert moe_ffn.rows_of_block(99999, 16, moe_ffn.ROWS[4]) == 64
    for size, table in moe_ffn.ROWS.items():
        assert table.keys() == moe_ffn.UP_GATED[size].keys()
        for rows in table:
            lists = (table, moe_ffn.UP_GATED[size], moe_ffn.UP_PLAIN[size])
            assert {b.m for blocks in lists for b in blocks[rows]} == {rows}


@interpreted
@pytest.mark.parametrize("shape", _shapes(MOE_TABLES), ids=str)
def test_moe_ffn_in_the_blocks_of_cards(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_ffn, "SMALL", Blocks(*shape, 4, 1))
    sizes = {"N": 200, "D": 136, "F": 72, "E": 3, "A": 2, "load": "even", "act": "swiglu"}
    check_face(MOE_FFN.case(sizes), moe_ffn, torch.float32)


@interpreted
@pytest.mark.parametrize("shape", _shapes(LCE_TABLES), ids=str)
def test_linear_cross_entropy_in_the_blocks_of_cards(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "INTERPRETER_BLOCKS", Blocks(*shape, 4, 1))
    sizes = {"N": 150, "D": 72, "V": 1300, "ignored": "some"}
    check_face(LINEAR_CROSS_ENTROPY.case(sizes), linear_cross_entropy, torch.float32)


@interpreted
@pytest.mark.parametrize(
    ("tokens", "top_k", "n_experts"),
    [(0, 2, 3), (1, 1, 1), (700, 3, 33), (40, 2, _routing.MOST_EXPERTS + 1)],
)
@pytest.mark.parametrize("parts", [2, _routing.MOST_PARTS])
def test_routing(
    tokens: int, top_k: int, n_experts: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_routing, "MOST_PARTS", parts)
    experts = torch.rand(tokens, n_experts).argsort(-1)[:, :top_k].int()
    expected = sort_by_expert(experts, n_experts)
    for got, want in zip(_routing.sort_by_expert(experts, n_experts), expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    offsets = expected[2].tolist()
    tiles = [
        (expert, row)
        for expert in range(n_experts)
        for row in range(offsets[expert], offsets[expert + 1], 16)
    ]
    listed = _routing.list_tiles(expected[2], tokens * top_k, 16).t().tolist()
    assert [tuple(tile) for tile in listed[: len(tiles)]] == tiles
    assert all(expert == -1 for expert, _ in listed[len(tiles) :])


@interpreted
@pytest.mark.parametrize("n_experts", [5, _routing.MOST_EXPERTS + 1])
def test_choices_of_no_expert_have_no_place(n_experts: int) -> None:
    """They are no error on a card, where it would stay: PyTorch's own would end the process."""
    experts = torch.tensor([[1, n_experts], [-1, 0], [1, n_experts - 1]], dtype=torch.int32)
    order, position, offsets = _routing.sort_by_expert(experts, n_experts)
    assert position.tolist() == [[1, -1], [-1, 0], [2, 3]]
    assert order[:4].tolist() == [3, 0, 4, 5]
    assert offsets[[0, 1, 2, -2, -1]].tolist() == [0, 1, 3, 3, 4]
    assert position.dtype == order.dtype == offsets.dtype == torch.int32


@interpreted
@pytest.mark.parametrize("sizes", [{"D": 0}, {"F": 0}], ids=str)
def test_moe_ffn_without_channels(sizes: dict[str, int]) -> None:
    width, hidden = sizes.get("D", 8), sizes.get("F", 6)
    x, w_in = torch.randn(5, width), torch.randn(3, 2 * hidden, width)
    w_out, weights = torch.randn(3, width, hidden), torch.rand(5, 2)
    experts = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]])
    y, *saved = moe_ffn.moe_ffn_forward(x, w_in, w_out, weights, experts, "swiglu")
    assert not y.any() and y.shape == x.shape
    given = torch.ones_like(y), x, w_in, w_out, weights, *saved, "swiglu"
    gradients = moe_ffn.moe_ffn_backward(*given)
    assert not any(one.any() for one in gradients)


@interpreted
@pytest.mark.filterwarnings("ignore:.*divide by zero")  # NumPy's, of the logarithm of no words
@pytest.mark.parametrize(("words", "width"), [(0, 8), (7, 0)])
def test_linear_cross_entropy_without_words_or_channels(words: int, width: int) -> None:
    x, weight = torch.randn(4, width), torch.randn(words, width)
    targets = torch.full((4,), -100) if words == 0 else torch.tensor([0, 6, -100, 3])
    loss, lse = linear_cross_entropy.linear_cross_entropy_forward(x, weight, targets, -100)
    torch.testing.assert_close(loss, torch.where(targets < 0, 0.0, 7.0).log().clamp_min(0))
    given = torch.ones(4), x, weight, targets, lse, -100
    for one in linear_cross_entropy.linear_cross_entropy_backward(*given):
        assert not one.any()


@interpreted
def test_an_expert_that_does_not_exist_gives_nan() -> None:
    """On a card nobody looks at the values: what follows from them must not look right."""
    inputs = MOE_FFN.case(MOE_FFN.smoke[2]).make_inputs(torch.float32)
    expected, *_ = moe_ffn.moe_ffn_forward(*inputs.values())
    inputs["experts"][3, 1], inputs["experts"][5, 0] = 7, -1
    y, *saved = moe_ffn.moe_ffn_forward(*inputs.values())
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[[3, 5]] = True
    assert y[wrong].isnan().all()
    torch.testing.assert_close(y[~wrong], expected[~wrong])
    named = [inputs[name] for name in ("x", "w_in", "w_out", "weights")]
    dx, dw_in, dw_out, dweights = moe_ffn.moe_ffn_backward(
        torch.ones_like(y), *named, *saved, "swiglu"
    )
    assert dx[wrong].isnan().all() and dx[~wrong].isfinite().all()
    assert dweights.isnan().nonzero().tolist() == [[3, 1], [5, 0]]
    assert dw_in.isfinite().all() and dw_out.isfinite().all()


@interpreted
def test_a_target_that_is_no_word_gives_nan() -> None:
    x, weight, targets = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 5, -1, -100])
    loss, lse = linear_cross_entropy.linear_cross_entropy_forward(x, weight, targets, -100)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert loss[3] == 0 and lse.isfinite().all()


@interpreted
def test_a_small_upstream_gradient_in_float16() -> None:
    """A mean over 2**20 rows: each gradient of a logit alone would be below float16's smallest."""
    case = LINEAR_CROSS_ENTROPY.case(LINEAR_CROSS_ENTROPY.smoke[2])
    x, weight, targets, ignore = case.make_inputs(torch.float16).values()
    _, lse = linear_cross_entropy.linear_cross_entropy_forward(x, weight, targets, ignore)
    backward = linear_cross_entropy.linear_cross_entropy_backward
    dloss = torch.ones_like(lse)
    large = backward(dloss, x, weight, targets, lse, ignore)
    small = backward(dloss * 2.0**-10, x, weight, targets, lse, ignore)
    for a, b in zip(large, small, strict=True):
        torch.testing.assert_close(b.float() * 2**10, a.float(), rtol=1e-2, atol=1e-3)

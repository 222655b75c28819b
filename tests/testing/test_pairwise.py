"""Pairwise designs hold every pair, in far fewer rows than the full product."""

from itertools import combinations

import pytest

from pyllm.testing import pairwise

AXES = {"a": (0, 1, 2, 3), "b": ("x", "y", "z"), "c": (True, False), "d": (1, 2, 3)}


def test_every_pair_is_there() -> None:
    rows = pairwise(AXES)
    for a, b in combinations(AXES, 2):
        held = {(row[a], row[b]) for row in rows}
        assert held == {(x, y) for x in AXES[a] for y in AXES[b]}


def test_few_rows_in_the_order_of_the_axes() -> None:
    rows = pairwise(AXES)
    assert 12 <= len(rows) <= 18  # 72 in the full product, 12 pairs of the two longest axes
    assert all(list(row) == list(AXES) for row in rows)
    assert rows == pairwise(AXES)


def test_one_axis() -> None:
    assert pairwise({"a": (1, 2)}) == [{"a": 1}, {"a": 2}]


def test_an_empty_axis() -> None:
    with pytest.raises(ValueError, match=r"at least one value, got none for \['b'\]"):
        pairwise({"a": (1,), "b": ()})

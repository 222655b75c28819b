"""Pairwise test design: few combinations in which every two values of two axes meet once.

Most faults are triggered by one or two axes together (Kuhn, Wallace & Gallo 2004, "Software Fault
Interactions"), so covering all pairs finds them at a small part of the full product's cost.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

_Choice = tuple[str, Any]


def _pair(first: _Choice, second: _Choice) -> frozenset[_Choice]:
    return frozenset((first, second))


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows ``{axis: value}`` that together hold every pair of values of every two axes.

    Greedy: each row starts from the first pair that is still missing and then takes, axis by axis,
    the value that adds most missing pairs (ties: the value used least so far). Deterministic.

    Raises:
        ValueError: an axis without values.
    """
    empty = [name for name, values in axes.items() if not values]
    if empty:
        raise ValueError(f"pairwise: every axis needs at least one value, got none for {empty}")
    if len(axes) < 2:
        return [{name: value} for name, values in axes.items() for value in values]
    missing = {
        _pair((a, x), (b, y)): ((a, x), (b, y))
        for a, b in combinations(axes, 2)
        for x in axes[a]
        for y in axes[b]
    }
    used: dict[_Choice, int] = {}
    rows = []
    while missing:
        row = dict(next(iter(missing.values())))
        for name, values in axes.items():
            if name in row:
                continue

            def gain(value: Any, name: str = name, row: dict[str, Any] = row) -> tuple[int, int]:
                new = sum(_pair((name, value), other) in missing for other in row.items())
                return new, -used.get((name, value), 0)

            row[name] = max(values, key=gain)
        for pair in combinations(row.items(), 2):
            missing.pop(_pair(*pair), None)
        for choice in row.items():
            used[choice] = used.get(choice, 0) + 1
        rows.append({name: row[name] for name in axes})
    return rows

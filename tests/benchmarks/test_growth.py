"""benchmarks/growth.py at small sizes: one size grows, and the work with it as declared."""

import pytest

from pyllm.testing import OPERATIONS

FLAGS = ("--seconds", 0.001, "--threads", 1, "--dtype", "fp32")


def test_growth_benchmark(start, capsys):
    code, content = start("growth.py", *FLAGS, "--most", 8)
    assert code == 0
    tables = {(table["name"], table["axis"], table["stage"]): table for table in content["tables"]}
    assert {axis for _, axis, _ in tables} == {"tokens", "experts", "context"}
    assert len(tables) == len(content["tables"]) == 16
    for table in tables.values():
        rows = table["rows"]
        costs = {row["size"]: row["cost"] for row in rows}
        assert costs == {row["size"]: row["median"] / row["work"] for row in rows}
        assert costs[table["best"]] == min(costs.values())
        assert table["ratio"] == costs[rows[-1]["size"]] / min(costs.values())
        assert table["holds"] == (table["ratio"] <= content["limit"])
    moe = tables["moe_ffn", "tokens", "forward"]["rows"]
    assert [row["size"] for row in moe] == [1, 4]
    assert moe[1]["work"] == 4 * moe[0]["work"] == 4 * 2 * 2 * 3 * 512 * 864
    back = tables["moe_ffn", "tokens", "backward"]["rows"]
    assert back[0]["work"] == 2 * moe[0]["work"]
    # With top-k fixed, more experts are no more operations.
    experts = tables["moe_ffn", "experts", "forward"]["rows"]
    assert [row["size"] for row in experts] == [4, 8]
    assert experts[0]["work"] == experts[1]["work"] == 8 * moe[0]["work"]
    # What a decoding step reads: the keys and values of the context, and the query.
    [decode] = tables["decode_attention", "context", "forward"]["rows"]
    assert decode["work"] == 4 * 2 * 64 * (128 * 4 + 8)
    printed = capsys.readouterr().out
    assert printed.count("target 1.2: holds") + printed.count("target 1.2: MISSED") == 16


def test_window_bounds_the_work_of_attention():
    operation = OPERATIONS["attention"]
    sizes = {"B": 1, "G": 1, "J": 1, "K": 1, "past": 0, "causal": True}
    for tokens, window, pairs in ((8, 0, 36), (8, 3, 21), (8, 99, 36), (1, 3, 1)):
        case = operation.case({**sizes, "T": tokens, "window": window})
        assert operation.work(case.sizes, 4)[0] == 4 * pairs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--op", "moe"), "op must be among attention"),
        (("--seconds", 0), "seconds must be above 0, got 0"),
        (("--most", 0), "most must be a whole number from 1"),
    ],
)
def test_impossible_flags_are_refused(start, capsys, flags, message):
    assert start("growth.py", *FLAGS, *flags) == (2, None)
    assert message in capsys.readouterr().err

"""scripts/benchmark.py: its numbers follow from one another, and its errors are one line."""

import json
from pathlib import Path

import pytest
import torch

from pyllm.models import ModelConfig, count_flops, count_parameters

from .conftest import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("benchmark")


def test_the_report_and_the_table(script, fox, tmp_path, capsys):
    out = tmp_path / "results" / "fox.json"
    script.main(
        script.Config(
            model=str(fox),
            prompt_tokens=8,
            new_tokens=5,
            batches=(1, 3),
            device="cpu",
            out=out,
        )
    )
    printed = capsys.readouterr().out
    assert "expert FLOPs saved" in printed and "75.0%" in printed and str(out) in printed
    report = json.loads(out.read_text())
    assert report["model"] == str(fox)
    assert report["machine"]["torch"] == torch.__version__ and "commit" in report
    config = ModelConfig(**report["config"])
    assert report["parameters"]["total"] == count_parameters(config).total
    nine, eight = count_flops(config, 9).total, count_flops(config, 8).total
    assert report["flops"]["next_token"] == nine - eight
    assert [run["batch"] for run in report["runs"]] == [1, 3]
    for run in report["runs"]:
        assert len(run["steps"]) == 5 and run["prefill"] > 0
        assert run["lower_quartile"] <= run["median"] <= run["upper_quartile"]
        rate = run["batch"] * 5 / sum(run["steps"])
        assert run["tokens_per_second"] == pytest.approx(rate)


def test_a_preset_with_random_weights(script, capsys):
    config = script.Config(
        preset="moe-tiny", prompt_tokens=4, new_tokens=2, batches=(1,), device="cpu"
    )
    script.main(config)
    assert "moe-tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "x", "preset": "moe-tiny"}, "give model or preset, not both"),
        ({"preset": "moe-tinny"}, "did you mean 'moe-tiny'"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"preset": "moe-tiny", "out": Path("/")}, "--out / is a folder; name a file"),
        ({"preset": "moe-tiny", "prompt_tokens": 600}, "do not fit into the model's context"),
        (
            {"preset": "moe-tiny", "batches": (0,)},
            "each of batches must be a whole number from 1 to",
        ),
        (
            {"preset": "moe-tiny", "threads": -1},
            "threads must be a whole number from 0 to 1,024, got -1",
        ),
    ],
)
def test_impossible_requests_are_value_errors(script, settings, message):
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(**settings))

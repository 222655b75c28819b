"""scripts/benchmark.py: its numbers follow from one another, and its errors are one line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from pyllm.models import ModelConfig, Transformer, count_flops, count_parameters, save_model
from pyllm.tokenizers import train_bpe

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    tokenizer = train_bpe(["Once there was a fox. "] * 20, 280)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=64, n_layers=2, d_model=32, d_ff=16
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "fox"
    save_model(folder, Transformer(config), tokenizer)
    return folder


def test_the_report_and_the_table(script, model_folder, tmp_path, capsys):
    out = tmp_path / "results" / "fox.json"
    script.main(
        script.Config(
            model=str(model_folder),
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
    assert report["model"] == str(model_folder)
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
        ({"model": "x", "preset": "moe-tiny"}, "give --model or --preset, not both"),
        ({"preset": "moe-tinny"}, "did you mean 'moe-tiny'"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"preset": "moe-tiny", "prompt_tokens": 600}, "do not fit into the model's context"),
        ({"preset": "moe-tiny", "batches": (0,)}, "expected at least 1 sequence"),
        ({"preset": "moe-tiny", "threads": -1}, "--threads must be at least 0"),
    ],
)
def test_impossible_requests_are_value_errors(script, settings, message):
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(**settings))

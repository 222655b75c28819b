"""scripts/generate.py as a user runs it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyllm.models import ModelConfig, Transformer, save_model
from pyllm.tokenizers import train_bpe

from .conftest import load_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with runs/fox/best in it, a small untrained model."""
    tokenizer = train_bpe(["Once there was a fox, and the fox was red. "] * 20, 290)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=64, n_layers=2, d_model=32, d_ff=16
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("place")
    save_model(folder / "runs" / "fox" / "best", Transformer(config), tokenizer)
    dense = Transformer(replace(config, moe_every=0))
    save_model(folder / "dense", dense, tokenizer)
    return folder


def start(place: Path, *flags: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        cwd=place,
        env=environment,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        encoding="utf-8",
    )


def run(place: Path, *flags: str, typed: str = "") -> tuple[int, str, str]:
    process = start(place, *flags)
    out, error = process.communicate(typed, timeout=120)
    return process.returncode, out, error


def test_a_story_of_the_newest_run_with_stats_and_experts(place):
    flags = ("--prompt", "Once", "--max-new-tokens", "30", "--seed", "3")
    code, plain, error = run(place, *flags)
    assert (code, error) == (0, "")
    assert plain.startswith("Once") and len(plain) > 10

    code, out, stats = run(place, *flags, "--model", "runs/fox", "--stats", "--show-experts")
    assert code == 0 and out.startswith(plain)
    written = re.fullmatch(r"(\d+) new tokens; prefill \d+ tokens .* [\d.]+ tokens/s\n", stats)
    assert written and 1 <= int(written[1]) <= 30
    assert "MoE layer 1 of 0 to 1" in out
    code, short, error = run(place, *flags, "--kv-cache-dtype", "int8", "--greedy")
    assert (code, error) == (0, "") and short.startswith("Once")
    counts = re.findall(r"(\d+): (\d+)", out.rpartition("tokens by expert")[2])
    assert [int(expert) for expert, _ in counts] == list(range(8))
    assert sum(int(count) for _, count in counts) > int(written[1])


def test_interactive_ctrl_c_ends_a_story_and_the_end_of_input_the_program(place):
    process = start(place, "--interactive", "--max-new-tokens", "1000000", "--temperature", "0.01")
    assert process.stdin and process.stdout
    process.stdin.write("Once there\n")
    process.stdin.flush()
    seen = ""
    while "Once there" not in seen or len(seen.partition("Once there")[2]) < 40:
        character = process.stdout.read(1)
        assert character, "the program ended by itself"
        seen += character
    process.send_signal(signal.SIGINT)
    process.stdin.write("The fox\n")
    process.stdin.flush()
    seen = ""
    while len(seen.partition("The fox")[2]) < 40:
        character = process.stdout.read(1)
        assert character, "the program ended with the story"
        seen += character
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in error


def test_flags_that_are_not_given_are_as_the_model_has_them(place, monkeypatch, tmp_path):
    script = load_script("generate")
    monkeypatch.chdir(place)
    assert script.defaults([]) == script.Config()
    assert script.defaults(["--help"]) == script.defaults(["--model", "none"]) == script.Config()
    shutil.copytree(place / "dense", tmp_path / "other")
    (tmp_path / "other" / "manifest.json").unlink()
    file = tmp_path / "other" / "generation_config.json"
    file.write_text('{"temperature": 0.3, "top_k": 9}')
    flags = [f"--model={tmp_path / 'other'}", "--prompt", "Once", "--seed", "1"]
    found = script.defaults(flags)
    assert (found.temperature, found.top_k, found.top_p, found.greedy) == (0.3, 9, 0.95, False)
    file.write_text('{"do_sample": false}')
    assert script.defaults(flags).greedy
    assert not script.defaults([*flags, "--top-k", "3"]).greedy
    assert not script.defaults([*flags, "--temperature=3"]).greedy
    texts = {run(place, *flags, "--max-new-tokens", "9", *more) for more in ((), ("--greedy",))}
    assert len(texts) == 1
    file.write_text('{"top_p": 7}')
    code, _, error = run(place, *flags)
    assert code == 2
    assert "generation_config.json: top_p must be above 0 and at most 1, got 7" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "dense", "show_experts": True}, "dense has 0 MoE layers"),
        ({"show_experts": True, "expert_layer": 2}, "--expert-layer is 2; .* has 2 MoE layers"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be auto or int8, got 'int4'"),
        ({"device": "abacus"}, "device must be auto, cpu, cuda, cuda:1 or mps, got 'abacus'"),
    ],
)
def test_impossible_requests_are_value_errors(place, monkeypatch, settings, message):
    monkeypatch.chdir(place)
    script = load_script("generate")
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(**settings))

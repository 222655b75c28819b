"""scripts/plan_memory.py: what it prints, what its flags train, and what it refuses."""

import re
import runpy
import shlex
import sys
from collections.abc import Callable

import pytest

from pyllm.train.memory import MemoryEstimate

from .conftest import Refusal, load_script, script_path

Answer = Callable[..., list[str]]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Answer:
    """Run the script with these flags; the lines it prints."""

    def run(*flags: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["plan_memory.py", *map(str, flags)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script_path("plan_memory")), run_name="__main__")
        captured = capsys.readouterr()
        assert (stop.value.code, captured.err) == (0, "")
        return captured.out.splitlines()

    return run


def number(lines: list[str], label: str) -> int:
    [row] = [line for line in lines if line.startswith("│") and label in line]
    found = re.search(r"│ +([\d,]+)", row.partition(label)[2])
    assert found
    return int(found[1].replace(",", ""))


def test_moe_tiny_on_a_small_card(answer: Answer) -> None:
    """For real: the smallest model on a card of half its usual memory."""
    lines = answer("--preset", "moe-tiny", "--vram", "1GiB", "--seq-len", 64, "--sequences", 16)
    parts = ("weights", "copies", "gradients", "optimizer", "activations", "logits", "workspace")
    sizes = [number(lines, name) for name in parts]
    assert abs(sum(sizes) - number(lines, "PyTorch's allocations")) <= len(parts)
    assert number(lines, "weights") == 43
    assert number(lines, "PyTorch's allocations") < number(lines, "room for them") < 512
    assert number(lines, "1GiB in all") == 1024
    shares = ("room for them", "pieces of the wrong size", "CUDA's context")
    assert abs(sum(number(lines, name) for name in shares) - 1024) <= len(shares)
    assert lines[-2].startswith("Guesses, not yet measured on a card: 6% for pieces of the wrong")


@pytest.mark.parametrize("optimizer", ["preset", "adamw8bit"])
def test_its_flags_are_those_of_the_trainer(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(
        "pyllm.train.plan.estimate_memory",
        lambda model, train, *_: MemoryEstimate(
            weights=2**30, activations=train.batch_size * 2**29
        ),
    )
    flags = ("--preset", "moe-158m-gpt", "--dtype", "bfloat16", "--optimizer", optimizer)
    _, script, *words = shlex.split(answer(*flags)[-1])
    assert script == "scripts/train_moe.py"
    module = load_script("train_moe")
    from pyllm._flags import read_flags

    config = read_flags(module.Config, words, default=module.defaults(words))
    train = config.train
    assert config.preset == "moe-158m-gpt"
    assert (train.batch_size, train.accumulation, train.seq_len) == (4, 8, 512)
    assert (train.dtype, train.device, train.recompute) == ("bfloat16", "cuda", False)
    assert train.optimizer == ("muon" if optimizer == "preset" else optimizer)


def test_what_does_not_fit(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pyllm.train.plan.estimate_memory",
        lambda model, train, *_: MemoryEstimate(weights=12 * 2**30),
    )
    line = refusal("plan_memory", "--preset", "dense-3b")
    assert line == (
        "error: dense-3b does not fit into 4GiB, not even one sequence of 512 tokens at a time "
        "with recomputation and adamw8bit: it takes a card of 13.3 GiB; give a smaller --preset "
        "or a shorter --seq-len"
    )


@pytest.mark.parametrize("vram", ["4", "GiB", "0GiB", "4 TB", "-4GiB", "4e9 GB", "4GiB "])
def test_a_size_that_is_none(refusal: Refusal, vram: str) -> None:
    line = refusal("plan_memory", f"--vram={vram}")
    assert line.startswith("error: --vram must be a size such as 4GiB, 4.3GB or 4096MiB, got ")


def test_other_mistakes(refusal: Refusal) -> None:
    assert "did you mean 'moe-158m'" in refusal("plan_memory", "--preset", "moe-158")
    line = refusal("plan_memory", "--seq-len", 4096)
    assert "--seq-len must be at most the context of moe-158m, 1024, got 4096" in line
    assert "--sequences" in refusal("plan_memory", "--sequences", -1)
    line = refusal("benchmarks/train_memory", "--batch-sizes", 1, 0)
    assert "each of --batch-sizes must be a whole number from 1" in line


def test_sizes_are_read() -> None:
    read = load_script("plan_memory").read_bytes
    assert [read(text) for text in ("4GiB", "4.5 GB", "512MiB", "1MB")] == [
        2**32,
        4_500_000_000,
        2**29,
        10**6,
    ]

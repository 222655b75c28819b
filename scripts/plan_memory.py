"""Will it fit? python scripts/plan_memory.py --preset moe-158m --vram 4GiB."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pyllm._checks import check_size, shown
from pyllm._cli import run
from pyllm.models.config import preset
from pyllm.train.config import TRAIN_PRESETS, TrainConfig

if TYPE_CHECKING:
    from pyllm.train.plan import Plan

UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


def read_bytes(text: str) -> int:
    """``4GiB``, ``4096 MiB``, ``4.3GB`` in bytes.

    Raises:
        ValueError: something else.
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(GiB|GB|MiB|MB)", text)
    if found is None or not float(found[1]):
        raise ValueError(f"vram must be a size such as 4GiB, 4.3GB or 4096MiB, got {shown(text)}")
    return int(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True)
class Config:
    """Predicts the memory of a training step, and chooses settings that fit a card."""

    preset: str = "moe-158m"
    """Which model, with its training settings."""
    vram: str = "4GiB"
    """Memory of the card; 0.5 GiB of it are left to CUDA's context, 6% of the rest to pieces of the
    wrong size. Both are guesses."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the matrix products; a Turing card has no bfloat16."""
    optimizer: Literal["preset", "muon", "adamw", "adamw8bit"] = "preset"
    """As in train_moe.py; adamw8bit is also tried where nothing else fits."""
    seq_len: int = 0
    """Tokens in a sequence; 0 for the preset's."""
    sequences: int = 0
    """Sequences in a step, all micro-batches together; 0 for the preset's."""

    def __post_init__(self) -> None:
        read_bytes(self.vram)
        check_size("seq_len (0 for the preset's)", self.seq_len, 0, 2**20)
        check_size("sequences (0 for the preset's)", self.sequences, 0, 2**20)


def settings(config: Config) -> TrainConfig:
    """What is asked for, before anything is chosen.

    Raises:
        ValueError: longer sequences than the model's context.
    """
    model, train = preset(config.preset), TRAIN_PRESETS[config.preset]
    train = replace(train, seq_len=config.seq_len or train.seq_len)
    if train.seq_len > model.max_seq_len:
        raise ValueError(
            f"--seq-len must be at most the context of {config.preset}, {model.max_seq_len}, got "
            f"{train.seq_len}"
        )
    if config.sequences:
        train = replace(train, batch_size=config.sequences, accumulation=1)
    if config.optimizer != "preset":
        train = replace(train, optimizer=config.optimizer)
    return train


def main(config: Config) -> None:
    """Estimate, choose, print."""
    from pyllm.models import named_dtype
    from pyllm.train.plan import memory_budget, plan_training

    train = settings(config)
    vram = read_bytes(config.vram)
    dtype = named_dtype(config.dtype)
    budget = memory_budget(vram)
    plan = plan_training(preset(config.preset), train, dtype, budget, memory=vram)
    show(config, plan)
    if not plan.fits:
        raise ValueError(
            f"{config.preset} does not fit into {config.vram}, not even one sequence of "
            f"{train.seq_len} tokens at a time with recomputation and adamw8bit: it takes a card "
            f"of {plan.needed_vram / 2**30:.1f} GiB; give a smaller --preset or a shorter --seq-len"
        )
    print(" ".join(flags(config, plan.train)))


def show(config: Config, plan: Plan) -> None:
    """The split as a table."""
    from rich.console import Console
    from rich.table import Table

    from pyllm.train.plan import CONTEXT, FRAGMENTATION

    train, estimate = plan.train, plan.estimate
    chosen = (
        f"{train.batch_size} x {train.seq_len} tokens in a micro-batch, {train.accumulation} in a "
        f"step, {train.optimizer}, {'with' if train.recompute else 'without'} recomputation"
    )
    table = Table("at the peak of a step", "MiB", "share", title=f"{config.preset}: {chosen}")
    for name, size in vars(estimate).items():
        table.add_row(
            NAMES[name], f"{size / 2**20:,.0f}", f"{size / estimate.total:.0%}" if size else ""
        )
    table.add_section()
    table.add_row("PyTorch's allocations", f"{estimate.total / 2**20:,.0f}")
    table.add_row("room for them", f"{plan.budget / 2**20:,.0f}")
    lost = max(read_bytes(config.vram) - CONTEXT - plan.budget, 0)
    table.add_row("pieces of the wrong size", f"{lost / 2**20:,.0f}", "a guess")
    table.add_row("CUDA's context", f"{CONTEXT / 2**20:,.0f}", "a guess")
    table.add_row(f"{config.vram} in all", f"{read_bytes(config.vram) / 2**20:,.0f}")
    Console().print(table)
    print(
        f"Guesses, not yet measured on a card: {FRAGMENTATION:.0%} for pieces of the wrong size "
        f"and {CONTEXT / 2**30:.1f} GiB for CUDA's context."
    )


NAMES = {
    "weights": "weights, float32",
    "copies": "their copies for the products",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits, a chunk",
    "workspace": "workspace",
}


def flags(config: Config, train: TrainConfig) -> list[str]:
    """The command that trains so."""
    words = ["python scripts/train_moe.py", "--preset", config.preset, "--train.device cuda"]
    words += ["--train.dtype", config.dtype, "--train.seq-len", str(train.seq_len)]
    words += ["--train.batch-size", str(train.batch_size)]
    words += ["--train.accumulation", str(train.accumulation)]
    words += ["--train.optimizer", train.optimizer]
    return [*words, "--train.recompute" if train.recompute else "--train.no-recompute"]


if __name__ == "__main__":
    run(main, Config)

"""What the load-balancing loss is worth: one run with it, one without, all else the same.

    python benchmarks/balance.py

Writes both curves of ``expert_load_max_over_mean`` to ``benchmarks/results/balance-<date>.json``,
and a picture of them to ``balance.svg`` beside it.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from pyllm._checks import check_size
from pyllm._cli import require_writable, run


@dataclass
class Config:
    """moe-tiny on the embedded stories, with and without the balance loss."""

    steps: int = 300
    """Optimiser steps of each of the two runs."""
    every: int = 10
    """Steps between the points that are kept."""
    n_stories: int = 20_000
    """Embedded stories to train on."""
    threads: int = 0
    """CPU threads; 0 for PyTorch's choice."""
    out: str = ""
    """Folder of the two runs; empty: runs/balance-<date>-<time>."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file and the picture."""

    def __post_init__(self) -> None:
        for name in ("steps", "every", "n_stories"):
            check_size(name, getattr(self, name), 1, 2**31 - 1)
        check_size("threads", self.threads, 0, 1024)


def main(config: Config) -> None:
    """Train twice, compare."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from _record import Record

    from pyllm.models import preset
    from pyllm.train import TRAIN_PRESETS, DataConfig, RunConfig, run_training
    from pyllm.train.log import read_metrics
    from pyllm.train.run import default_folder
    from pyllm.viz import plot_curves

    require_writable(config.results)
    train = replace(
        TRAIN_PRESETS["moe-tiny"],
        max_steps=config.steps,
        threads=config.threads,
        sample_every=0,
    )
    record = Record(config.results, "balance")
    record.add(
        command=f"python benchmarks/balance.py --steps {config.steps} --every {config.every} "
        f"--n-stories {config.n_stories}"
    )
    folder = Path(config.out or default_folder("balance"))
    tokenizer = ""
    runs, curves = {}, {}
    for coefficient in (train.balance_coef, 0.0):
        name = f"balance_coef {coefficient:g}"
        result = run_training(
            RunConfig(
                out=str(folder / name.replace(" ", "-")),
                model=preset("moe-tiny"),
                data=DataConfig(n_stories=config.n_stories, tokenizer=tokenizer),
                train=replace(train, balance_coef=coefficient),
            )
        )
        tokenizer = str(result.folder / "tokens" / "tokenizer.json")  # the same for both
        rows = read_metrics(result.folder)
        kept = [row for row in rows if row["step"] % config.every == 0 or row["step"] == 1]
        steps = [row["step"] for row in kept]
        loads = [row["expert_load_max_over_mean"] for row in kept]
        runs[name] = {
            "steps": steps,
            "expert_load_max_over_mean": loads,
            "final_expert_load": rows[-1]["expert_load"],
            "val_loss": result.val_loss,
            "val_bpb": result.val_bpb and result.val_bpb.value,
        }
        record.add(runs=runs)
        curves[name] = (steps, loads)
    plot_curves(
        config.results / "balance.svg",
        curves,
        xlabel="step",
        ylabel="busiest expert / mean, averaged over layers",
        title="Load of the experts with and without the balance loss",
    )
    for name, (_, loads) in curves.items():
        print(f"{name}: busiest expert / mean {loads[0]:.2f} at first, {loads[-1]:.2f} at the end")
    print(f"{config.results / 'balance.svg'}\n{record.path}")


if __name__ == "__main__":
    run(main, Config)

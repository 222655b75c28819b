"""Does sparsity pay? A mixture of experts and its dense twin, for equal tokens and equal time.

    python benchmarks/moe_vs_dense.py

The twin computes as much for each token as the chosen experts do. It is trained on as many tokens
as the mixture, and once more for as many steps as it makes in the mixture's time. A step counts
with the median over its run, so that what else the machine does for a while weighs on neither; how
many steps that gives is read off the first pair. For each seed; the order of the two alternates.
The sum of all steps stands beside it. Learning rate and batch were tuned on the mixture.
Writes ``benchmarks/results/moe-vs-dense-<date>.json`` and ``moe-vs-dense.svg``.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from pyllm._checks import check_size
from pyllm._cli import require_writable, run

MIXTURE, TWIN, LONGER = "mixture", "dense, equal tokens", "dense, equal time"


@dataclass
class Config:
    """moe-tiny against a dense model of the same active compute."""

    steps: int = 360
    """Optimiser steps of the mixture, and of its twin at equal tokens."""
    seeds: int = 3
    """Runs of each, with other weights and another order of the data."""
    tinystories: str = ""
    """Folder with TinyStories as train.txt and valid.txt, the embedded stories if absent; empty:
    tinystories in PYLLM_SHARED_DATA, by default ../shared/data."""
    threads: int = 0
    """CPU threads; 0 for PyTorch's choice."""
    out: str = ""
    """Folder of the runs; empty: runs/moe-vs-dense-<date>-<time>."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file and the picture."""

    def __post_init__(self) -> None:
        check_size("steps", self.steps, 1, 2**31 - 1)
        check_size("seeds", self.seeds, 1, 1000)
        check_size("threads", self.threads, 0, 1024)


def main(config: Config) -> None:
    """Train all of them, compare, draw."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import torch
    from _record import Record
    from _texts import choose_text

    from pyllm.models import count_parameters, preset
    from pyllm.train import TRAIN_PRESETS, RunConfig, run_training
    from pyllm.train.run import default_folder
    from pyllm.viz import plot_bands

    require_writable(config.results)
    mixture = preset("moe-tiny")
    twin = replace(mixture, moe_every=0, d_ff=mixture.top_k * mixture.d_ff)
    train = replace(
        TRAIN_PRESETS["moe-tiny"],
        max_steps=config.steps,
        eval_every=max(config.steps // 12, 1),
        threads=config.threads,
        sample_every=0,
    )
    record = Record(config.results, "moe-vs-dense")
    name, data = choose_text(config.tinystories)
    record.add(
        command=f"python benchmarks/moe_vs_dense.py --steps {config.steps} --seeds {config.seeds}",
        text=name,
        threads=config.threads or torch.get_num_threads(),
        train=asdict(train),
        mixture=count_parameters(mixture)._asdict(),
        dense=count_parameters(twin)._asdict(),
    )
    folder = Path(config.out or default_folder("moe-vs-dense"))
    runs: dict[str, list[dict[str, Any]]] = {MIXTURE: [], TWIN: [], LONGER: []}
    steps = {MIXTURE: config.steps, TWIN: config.steps}
    for seed in range(config.seeds):
        for kind in ((MIXTURE, TWIN), (TWIN, MIXTURE))[seed % 2] + (LONGER,):
            if kind == LONGER and LONGER not in steps:
                spent = [runs[each][0]["median_step"] for each in (MIXTURE, TWIN)]
                steps[LONGER] = max(round(config.steps * spent[0] / spent[1]), 1)
            result = run_training(
                RunConfig(
                    out=str(folder / f"{kind.replace(', ', '-').replace(' ', '-')}-{seed}"),
                    model=mixture if kind == MIXTURE else twin,
                    data=data,
                    train=replace(train, seed=seed, max_steps=steps[kind]),
                )
            )
            # The same tokenizer for all.
            data = replace(data, tokenizer=str(result.folder / "tokens" / "tokenizer.json"))
            runs[kind].append(_curve(result, train.tokens_per_step))
            record.add(steps=steps, runs=runs)
    record.add(summary=_summary(runs))
    plot_bands(
        config.results / "moe-vs-dense.svg",
        {
            "equal tokens": (
                "million tokens",
                {kind: _points(runs[kind], "tokens", 1e-6) for kind in (MIXTURE, TWIN)},
            ),
            "equal time": (
                "seconds in training steps",
                {kind: _points(runs[kind], "seconds", 1.0) for kind in (MIXTURE, LONGER)},
            ),
        },
        ylabel="val_loss (nats per token)",
    )
    for kind, found in _summary(runs).items():
        print(f"{kind}: val_loss {found['val_loss']:.4f}, val_bpb {found['val_bpb']}, {found}")
    print(f"{config.results / 'moe-vs-dense.svg'}\n{record.path}")


def _curve(result: Any, tokens_per_step: int) -> dict[str, Any]:
    """Validation losses of a run, over tokens and over the seconds that its steps take."""
    from pyllm.train.log import read_metrics

    rows = read_metrics(result.folder)
    spent = [tokens_per_step / row["tok_per_sec"] for row in rows]
    kept = [row for row in rows if "val_loss" in row]
    return {
        "tokens": [row["step"] * tokens_per_step for row in kept],
        "seconds": [row["step"] * median(spent) for row in kept],
        "val_losses": [row["val_loss"] for row in kept],
        "val_bpb": result.val_bpb and result.val_bpb.value,
        "median_step": median(spent),
        "all_steps": sum(spent),
    }


def _points(
    runs: list[dict[str, Any]], axis: str, unit: float
) -> tuple[list[float], list[list[float]]]:
    """Where the points lie, averaged over the seeds, and the losses of each seed."""
    places = [mean(each) * unit for each in zip(*(run[axis] for run in runs), strict=True)]
    return places, [run["val_losses"] for run in runs]


def _summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The last loss of each kind, averaged over the seeds, and how far the seeds lie apart."""
    found = {}
    for kind, each in runs.items():
        last = [run["val_losses"][-1] for run in each]
        bits = [run["val_bpb"] for run in each]
        found[kind] = {
            "val_loss": mean(last),
            "val_loss_spread": max(last) - min(last),
            "val_bpb": None if None in bits else mean(bits),
            "val_bpb_spread": None if None in bits else max(bits) - min(bits),
            "median_step": mean(run["median_step"] for run in each),
            "all_steps": mean(run["all_steps"] for run in each),
        }
    return found


if __name__ == "__main__":
    run(main, Config)

"""The main job, measured: moe-tiny on the embedded stories and on TinyStories.

    python benchmarks/stories.py --tinystories ../shared/data/tinystories

Runs what ``scripts/train_moe.py`` runs, with the preset's own settings, and writes what came out,
the machine and the commit to ``benchmarks/results/stories-<date>.json``, and the loss curves to
``benchmarks/results/stories.svg``.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from pyllm._checks import check_size
from pyllm._cli import require_writable, run


@dataclass
class Config:
    """Train moe-tiny on each text in turn."""

    tinystories: str = ""
    """Folder with TinyStories as train.txt and valid.txt, skipped, and said so, if absent; empty:
    tinystories in PYLLM_SHARED_DATA, by default ../shared/data."""
    max_steps: int = 0
    """Steps of each run; 0 for the preset's."""
    out: str = ""
    """Folder of the runs; empty: runs/stories-<date>-<time>."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file and the picture."""

    def __post_init__(self) -> None:
        check_size("max_steps (0 for the preset's)", self.max_steps, 0, 2**31 - 1)


def main(config: Config) -> None:
    """Train, collect, draw."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from dataclasses import asdict, replace

    import torch
    from _record import Record
    from _texts import tinystories

    from pyllm.models import count_parameters, preset
    from pyllm.train import TRAIN_PRESETS, DataConfig, RunConfig, run_training
    from pyllm.train.log import read_metrics
    from pyllm.train.run import default_folder
    from pyllm.viz import plot_curves

    train = TRAIN_PRESETS["moe-tiny"]
    if config.max_steps:
        train = replace(train, max_steps=config.max_steps)
    texts = {"embedded stories": DataConfig()}
    require_writable(config.results)
    if (found := tinystories(config.tinystories)) is not None:
        texts["TinyStories"] = found
    parameters = count_parameters(preset("moe-tiny"))
    record = Record(config.results, "stories")
    record.add(
        threads=torch.get_num_threads(),
        train=asdict(train),
        model=asdict(preset("moe-tiny")),
        parameters=parameters._asdict(),
    )
    out = Path(config.out or default_folder("stories"))
    runs, curves = {}, {}
    for name, data in texts.items():
        result = run_training(
            RunConfig(
                out=str(out / name.replace(" ", "-")),
                model=preset("moe-tiny"),
                data=data,
                train=train,
            )
        )
        rows = read_metrics(result.folder)
        speeds = sorted(row["tok_per_sec"] for row in rows)
        runs[name] = {
            "val_bpb": result.val_bpb and result.val_bpb.value,
            "val_loss": result.val_loss,
            "val_stories": result.val_bpb and result.val_bpb.stories,
            "train_seconds": result.seconds,
            "train_tokens": len(rows) * train.tokens_per_step,
            "tok_per_sec_median": speeds[len(speeds) // 2],
            "story": result.story,
            "story_shared_passage": result.shared_passage,
            "val_losses": [[row["step"], row["val_loss"]] for row in rows if "val_loss" in row],
        }
        record.add(runs=runs)
        kept = [row for row in rows if row["step"] % 5 == 0]
        curves[name] = ([row["step"] for row in kept], [row["train_loss"] for row in kept])
    plot_curves(
        config.results / "stories.svg",
        curves,
        xlabel="step",
        ylabel="train_loss (nats per token)",
        title="moe-tiny, the main job",
    )
    print(record.path)


if __name__ == "__main__":
    run(main, Config)

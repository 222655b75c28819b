"""How the loss falls with compute: a ladder of sizes, a fit, and a prediction that can fail.

    python benchmarks/scaling.py

Every model of the ladder is trained on a number of tokens in proportion to its active parameters,
embeddings left out (Hoffmann et al. 2022, arXiv:2203.15556). ``L(C) = E + A C^-b`` is fitted to all
but the largest, which it then has to predict. Writes ``benchmarks/results/scaling-<date>.json`` and
``scaling.svg``.

What it does not show: one seed, three numbers fitted to few points, and one learning rate for all
widths, found at a width of 256. By default no text is read twice: the 2.4 million tokens of the
largest are fewer than TinyStories at hand has.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyllm._checks import check_size
from pyllm._cli import require_writable, run


@dataclass
class Config:
    """A ladder of mixtures of experts: moe-tiny's depth and experts, as wide an expert for its
    width, heads of 32 channels."""

    widths: tuple[int, ...] = (64, 96, 128, 192, 256)
    """Widths of the models, multiples of 32, at least four of them."""
    tokens_per_parameter: float = 0.7
    """Training tokens for each active parameter, embeddings left out. 20 is what Hoffmann et al.
    found best; so many would take hours here."""
    tinystories: str = ""
    """Folder with TinyStories as train.txt and valid.txt, the embedded stories if absent; empty:
    tinystories in PYLLM_SHARED_DATA, by default ../shared/data."""
    threads: int = 0
    """CPU threads; 0 for PyTorch's choice."""
    seq_len: int = 256
    """Tokens in a sequence."""
    out: str = ""
    """Folder of the runs; empty: runs/scaling-<date>-<time>."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file and the picture."""

    def __post_init__(self) -> None:
        check_size("threads", self.threads, 0, 1024)
        check_size("seq_len", self.seq_len, 1, 512)
        if len(set(self.widths)) < 4 or any(w <= 0 or w % 32 for w in self.widths):
            raise ValueError(
                f"widths must be at least four different multiples of 32, got {self.widths}"
            )
        if not 0 < self.tokens_per_parameter <= 1000:
            raise ValueError(
                "tokens_per_parameter must be above 0 and at most 1000, got "
                f"{self.tokens_per_parameter}"
            )


@dataclass(frozen=True)
class PowerLaw:
    """``L(C) = floor + scale * C^-slope``, C in units of the smallest compute."""

    floor: float
    scale: float
    slope: float
    unit: float

    def __call__(self, compute: float) -> float:
        """The loss at ``compute`` operations."""
        return self.floor + self.scale * (compute / self.unit) ** -self.slope


def fit_power_law(compute: list[float], loss: list[float]) -> PowerLaw:
    """Least squares: a straight line through ``log(L - floor)``, the best of a grid of floors."""
    x, y = np.log(np.asarray(compute) / compute[0]), np.asarray(loss)
    best, found = np.inf, None
    for floor in np.linspace(0.0, float(y.min()) * 0.999, 400):
        slope, level = np.polyfit(x, np.log(y - floor), 1)
        error = float(np.square(floor + np.exp(level + slope * x) - y).sum())
        if error < best:
            best = error
            found = PowerLaw(float(floor), float(np.exp(level)), float(-slope), compute[0])
    assert found is not None
    return found


def main(config: Config) -> None:
    """Train the ladder, fit, predict, draw."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import torch
    from _record import Record
    from _texts import choose_text

    from pyllm.models import count_flops, count_parameters, preset
    from pyllm.train import TRAIN_PRESETS, RunConfig, run_training
    from pyllm.train.run import default_folder
    from pyllm.viz import plot_power_law

    require_writable(config.results)
    record = Record(config.results, "scaling")
    name, data = choose_text(config.tinystories)
    record.add(
        command="python benchmarks/scaling.py --widths "
        + " ".join(map(str, config.widths))
        + f" --tokens-per-parameter {config.tokens_per_parameter:g} --seq-len {config.seq_len}",
        text=name,
        threads=config.threads or torch.get_num_threads(),
    )
    folder = Path(config.out or default_folder("scaling"))
    runs: list[dict[str, Any]] = []
    for width in sorted(set(config.widths)):
        model = replace(
            preset("moe-tiny"),
            d_model=width,
            n_heads=width // 32,
            n_kv_heads=width // 32,
            d_ff=width * 3 // 2,
        )
        train = replace(
            TRAIN_PRESETS["moe-tiny"],
            seq_len=config.seq_len,
            batch_size=16,
            threads=config.threads,
            sample_every=0,
        )
        tokens = config.tokens_per_parameter * count_parameters(model).active
        steps = max(round(tokens / train.tokens_per_step), 2)
        train = replace(
            train,
            max_steps=steps,
            warmup_steps=min(train.warmup_steps, steps // 5),
            eval_every=steps,
            save_every=steps,
        )
        result = run_training(
            RunConfig(out=str(folder / f"width-{width}"), model=model, data=data, train=train)
        )
        data = replace(data, tokenizer=str(result.folder / "tokens" / "tokenizer.json"))
        compute = 3 * count_flops(model, train.seq_len).total / train.seq_len
        runs.append(
            {
                "width": width,
                "parameters": count_parameters(model)._asdict(),
                "tokens": steps * train.tokens_per_step,
                "compute": compute * steps * train.tokens_per_step,
                "train": asdict(train),
                "val_loss": result.val_loss,
                "val_bpb": result.val_bpb and result.val_bpb.value,
                "train_seconds": result.seconds,
            }
        )
        record.add(runs=runs)
    compute, loss = [run["compute"] for run in runs], [run["val_loss"] for run in runs]
    law = fit_power_law(compute[:-1], loss[:-1])
    whole = fit_power_law(compute, loss)
    predicted = law(compute[-1])
    record.add(
        fit_without_largest=asdict(law),
        fit=asdict(whole),
        predicted=predicted,
        measured=loss[-1],
        residuals=[whole(c) - x for c, x in zip(compute, loss, strict=True)],
    )
    plot_power_law(config.results / "scaling.svg", compute, loss, law)
    print(
        f"L(C) = {law.floor:.3f} + {law.scale:.3f} (C / {law.unit:.3g})^-{law.slope:.3f} from all "
        f"but the largest; it predicts {predicted:.4f} for that, measured {loss[-1]:.4f}"
    )
    print(f"{config.results / 'scaling.svg'}\n{record.path}")


if __name__ == "__main__":
    run(main, Config)

"""Writes a model with int8 weights: python scripts/quantize.py --model runs/NAME."""

from dataclasses import dataclass
from pathlib import Path

from pyllm._cli import require_writable, run


@dataclass(frozen=True)
class Config:
    """Writes a model folder with int8 weights, a quarter of the size, which every script loads.

    Embedding, projections and experts become int8 with a scale for each output channel; norms,
    router and learned positions stay float32. It can be run and measured, but not trained on.
    """

    model: str | None = None
    """A run folder (its best checkpoint is taken) or a model folder; by default the run under
    runs/ that was saved last."""
    out: Path | None = None
    """The folder to write, which must not exist; by default beside the model: its name with
    -int8."""


def main(config: Config) -> None:
    """Loads, quantises, writes, and says how large both are."""
    from pyllm.generate import find_model
    from pyllm.models import quantize_folder
    from pyllm.models.shards import WEIGHTS

    folder = find_model(config.model).resolve()
    out = config.out or folder.with_name(f"{folder.name}-int8")
    if out.exists():
        raise ValueError(f"{out}: already there; remove it or name another place with --out")
    require_writable(out.parent)
    quantize_folder(folder, out)
    before, after = ((place / WEIGHTS).stat().st_size for place in (folder, out))
    print(f"{before / 1e6:.1f} MB of weights became {after / 1e6:.1f} MB")
    print(out)


if __name__ == "__main__":
    run(main, Config)

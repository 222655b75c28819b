"""Scores a model on a text: python scripts/evaluate.py --model RUN --data FILE."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyllm._checks import check_size
from pyllm._cli import require_writable_file, run

if TYPE_CHECKING:
    from pyllm.evaluate import BitsPerByte, TextScore


@dataclass
class Config:
    """Loss, perplexity, bits per byte, and the loss at each position, of a model on a text."""

    data: str = ""
    """Text to score: .txt (documents end with a line <|endoftext|>), .jsonl, .parquet, or a dataset
    of the hub. Empty: the embedded stories' validation part."""
    model: str | None = None
    """A run folder (its best checkpoint is taken) or a model folder, of pyllm or Hugging Face; by
    default the run under runs/ that was saved last."""
    documents: int = 0
    """How many documents to score, from the first on; 0 for all."""
    context: int = 0
    """Tokens that are scored together; 0 for the model's whole context."""
    text_column: str = "text"
    """The column of .jsonl, .parquet and hub data that holds the text."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto: as saved."""
    threads: int = 0
    """CPU threads; 0 for PyTorch's choice."""
    out: Path | None = None
    """Write everything to this JSON file as well."""
    picture: Path | None = None
    """Draw the loss at each position into this file, .png or .svg."""

    def __post_init__(self) -> None:
        check_size("documents (0 for all)", self.documents, 0)
        check_size("context (0 for the model's)", self.context, 0)
        check_size("threads", self.threads, 0, 1024)
        if self.picture is not None and self.picture.suffix not in (".png", ".svg"):
            raise ValueError(f"picture must end in .png or .svg, got {self.picture}")


def main(config: Config) -> None:
    """Score, print, write."""
    import torch

    from pyllm.data import read_texts, write_stories
    from pyllm.evaluate import bits_per_byte, score_text
    from pyllm.generate import find_model, pick_dtype
    from pyllm.models import choose_device, load_model

    for flag, path in (("--out", config.out), ("--picture", config.picture)):
        if path is not None:
            require_writable_file(flag, path)
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = find_model(config.model)
    model, tokenizer = load_model(folder, choose_device(config.device), pick_dtype(config.dtype))
    if config.data:
        texts = read_texts(config.data, text_column=config.text_column)
    else:
        texts = write_stories(EMBEDDED_STORIES, 0, "valid")
    documents = list(islice(texts, config.documents or None))
    score = score_text(model, tokenizer, documents, context=config.context or None)
    bpb: BitsPerByte | None = None
    try:
        bpb = bits_per_byte(model, tokenizer, documents)
        why = ""
    except ValueError as error:  # a context shorter than 1,024 bytes
        why = str(error)
    show(folder, config.data or "embedded stories", score, bpb, why)
    if config.picture is not None:
        draw(score, config.picture)
    if config.out is not None:
        report: dict[str, Any] = {
            "model": str(folder),
            "data": config.data or "embedded stories",
            "documents": score.documents,
            "tokens": score.tokens,
            "context": config.context or model.config.max_seq_len,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "val_bpb": bpb and bpb.value,
            "position_loss": score.position_loss,
            "position_count": score.position_count,
        }
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


EMBEDDED_STORIES = 400
"""As many as 2% of the default run's."""


def show(folder: Path, data: str, score: TextScore, bpb: BitsPerByte | None, why: str) -> None:
    """Two tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{folder} on {data}", show_header=False)
    table.add_row("documents", f"{score.documents:,}")
    table.add_row("tokens", f"{score.tokens:,}")
    table.add_row("loss, nats per token", f"{score.loss:.4f}")
    table.add_row("perplexity", f"{score.perplexity:.3f}")
    table.add_row("val_bpb, bits per byte", f"{bpb.value:.4f}" if bpb else "left out")
    console.print(table)
    if why:
        console.print(why)
    table = Table("position", "loss, nats per token")
    for first, end, loss in score.buckets():
        table.add_row(str(first) if end == first + 1 else f"{first} to {end - 1}", f"{loss:.4f}")
    console.print(table)


def draw(score: TextScore, path: Path) -> None:
    """The loss at each position, averaged over a hundredth of the context."""
    from pyllm.viz import plot_curves

    width = max(len(score.position_loss) // 100, 1)
    places = range(0, len(score.position_loss), width)
    losses = [score.loss_between(first, first + width) for first in places]
    plot_curves(
        path,
        {"loss": (places, losses)},
        xlabel="position in the document, in tokens",
        ylabel="nats per token",
        title="Loss at each position",
    )


if __name__ == "__main__":
    run(main, Config)

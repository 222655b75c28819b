"""Scores a model on a text: python scripts/evaluate.py --model RUN --data FILE."""

from __future__ import annotations

import json
from collections.abc import Iterable
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
    of the hub. Empty: the validation text of the model's run; of a model without a run, the
    embedded stories."""
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
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
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

    from pyllm.evaluate import bits_per_byte, score_text
    from pyllm.generate import LanguageModel, find_model, pick_dtype
    from pyllm.models import choose_device, load_model

    folder = find_model(config.model)
    name, files, texts = read_documents(config, folder)
    check_outputs(config, folder, files)
    if config.threads:
        torch.set_num_threads(config.threads)
    model, tokenizer = load_model(folder, choose_device(config.device), pick_dtype(config.dtype))
    language_model = LanguageModel(model, tokenizer, folder)
    documents = list(islice(texts, config.documents or None))
    begin = language_model.begin_ids
    score = score_text(
        model,
        tokenizer,
        documents,
        context=config.context or None,
        begin_ids=begin,
        count_end=tokenizer.end_of_text_id in language_model.stop_ids,
    )
    # Documents that are empty, or that are one token and nothing before it, have no bits.
    bpb = bits_per_byte(model, tokenizer, documents, begin_ids=begin) if score.bytes else None
    show(folder, name, score, bpb)
    if config.picture is not None:
        draw(score, config.picture)
    if config.out is not None:
        report: dict[str, Any] = {
            "model": str(folder),
            "data": name,
            "documents": score.documents,
            "tokens": score.tokens,
            "context": config.context or model.config.max_seq_len,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "bytes": score.bytes,
            "val_bpb": bpb and bpb.value,
            "val_bpb_bytes": bpb.bytes if bpb else 0,
            "val_bpb_documents": bpb.stories if bpb else 0,
            "position_loss": score.position_loss,
            "position_count": score.position_count,
        }
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


EMBEDDED_STORIES = 400
"""As many as 2% of the default run's."""


def check_outputs(config: Config, folder: Path, files: list[str]) -> None:
    """What is written replaces neither what is read nor each other.

    Raises:
        ValueError: it would, or it cannot be written.
    """
    given = {"--out": config.out, "--picture": config.picture}
    outputs = {flag: path for flag, path in given.items() if path is not None}
    for flag, path in outputs.items():
        if path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{flag} {path} is inside the model's folder; name another place")
        if any(same_file(path, Path(file)) for file in files):
            raise ValueError(f"{flag} {path} is the text to score; name another file")
        require_writable_file(flag, path)
    if len(outputs) == 2 and same_file(*outputs.values()):
        raise ValueError("--out and --picture are one file; name two")


def same_file(one: Path, other: Path) -> bool:
    """By one name or another, links included."""
    if one.resolve() == other.resolve():
        return True
    return one.exists() and other.exists() and one.samefile(other)


def read_documents(config: Config, folder: Path) -> tuple[str, list[str], Iterable[str]]:
    """What to call the text to score, the files it is of, and its documents; see ``Config.data``.

    Raises:
        ValueError: it is not there, or damaged.
    """
    from pyllm.data import read_texts, write_stories
    from pyllm.train.prepare import documents
    from pyllm.train.run_folder import read_run_config

    if config.data:
        texts = read_texts(config.data, text_column=config.text_column)
        return config.data, [config.data], texts
    run = folder.parent
    if (
        folder.name.removesuffix("-int8") not in ("best", "last")
        or not (run / "config.json").is_file()
    ):
        return "embedded stories", [], write_stories(EMBEDDED_STORIES, 0, "valid")
    try:
        settings = read_run_config(run)
        held_out = documents(settings.data, settings.train.seed, "valid")
    except ValueError as error:
        raise ValueError(f"{error}; it was this run's text, name another with --data") from None
    files = [file for file in (settings.data.valid, settings.data.data) if file]
    name = files[0] if files else "embedded stories"
    part = "" if settings.data.valid else ", the part held out from training"
    return f"{name}{part}", files, held_out


def show(folder: Path, data: str, score: TextScore, bpb: BitsPerByte | None) -> None:
    """Two tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", "", "over", title=f"{folder} on {data}")
    tokens = f"{score.tokens:,} tokens of {score.documents:,} documents"
    table.add_row("loss, nats per token", f"{score.loss:.4f}", tokens)
    table.add_row("perplexity", f"{score.perplexity:.3f}", tokens)
    if score.bits_per_byte is not None and bpb is not None:
        all_bytes = f"{score.bytes:,} bytes of {score.documents:,} documents"
        table.add_row("bits per byte", f"{score.bits_per_byte:.4f}", all_bytes)
        starts = f"the first 1,024 bytes of each, {bpb.bytes:,} of {bpb.stories:,} documents"
        table.add_row("val_bpb, bits per byte", f"{bpb.value:.4f}", starts)
    console.print(table)
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

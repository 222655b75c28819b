"""A whole run: from text to a trained model in a folder, and what to tell the user at the end."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pyllm.data import TokenFile, read_texts, split_documents, write_stories, write_tokens
from pyllm.evaluate import BitsPerByte, bits_per_byte
from pyllm.models import ModelConfig, Transformer, count_parameters, load_model
from pyllm.tokenizers import Tokenizer, train_bpe
from pyllm.train.config import DataConfig, RunConfig, TrainConfig
from pyllm.train.device import apply_threads, autocast, choose_device, choose_dtype
from pyllm.train.log import RunLog, draw
from pyllm.train.trainer import Trainer, seed_everything

VALID_STORIES = 500
VALID_SHARE = 0.02
STORY_TOKENS = 300


@dataclass(frozen=True)
class RunResult:
    """What :func:`run_training` reports."""

    folder: Path
    val_loss: float
    """Best validation loss, nats per token."""
    val_bpb: BitsPerByte
    story: str
    copied: bool
    """Is the story a training story, or does it share a long passage with one?"""
    seconds: float
    """Spent in the training loop, all parts of a resumed run together."""


def run_training(config: RunConfig, console: Console | None = None) -> RunResult:
    """Prepare the text, train, evaluate, tell a story; everything is kept in the run folder.

    Raises:
        ValueError: settings or data that cannot work, with the remedy.
        OSError: the run folder cannot be written.
    """
    console = console or Console()
    if config.resume:
        folder = Path(config.resume)
        config = read_run_config(folder)
    else:
        folder = Path(config.out or default_folder(config.preset))
        if (folder / "config.json").exists():
            raise ValueError(
                f"{folder} already holds a run; give another --out, or --resume {folder}"
            )
    apply_threads(config.train)
    device = choose_device(config.train.device)
    dtype = choose_dtype(config.train.dtype, device)
    seed_everything(config.train.seed)
    started = time.perf_counter()
    text = prepare_text(config, folder)
    if not config.resume:
        config = fit_model(config, text.tokenizer, console)
        folder.mkdir(parents=True, exist_ok=True)
        write_run_config(folder, config)
    train_file, valid_file = prepare_tokens(text, folder)
    parameters = count_parameters(config.model)
    console.print(
        f"[bold]{config.preset}[/]: {parameters.total / 1e6:.1f}M parameters, "
        f"{parameters.active / 1e6:.1f}M active without embeddings; "
        f"{len(train_file):,} training tokens, vocabulary {text.tokenizer.vocab_size:,}; "
        f"{device.type}, {str(dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} threads; text ready in {time.perf_counter() - started:.1f} s"
    )
    model = Transformer(config.model).to(device)
    trainer = Trainer(
        model, text.tokenizer, train_file, valid_file, config.train, folder, device, dtype
    )
    if (folder / "last").exists() or (folder / "last.old").exists():
        trainer.resume()
        console.print(f"resuming {folder} at step {trainer.progress.step}")
    with RunLog(folder, config.train.max_steps, trainer.progress.step, console) as log:
        try:
            progress = trainer.train(log)
        except KeyboardInterrupt:
            log.flush()
            draw(folder)
            console.print(f"stopped at step {trainer.progress.step}; go on with --resume {folder}")
            raise
    draw(folder)
    best, _ = load_model(folder / "best", device)
    trainer.model = best
    bpb = bits_per_byte(best, text.tokenizer, text.valid(), autocast(device, dtype))
    story = trainer.tell(STORY_TOKENS, seed=config.train.seed)
    result = RunResult(
        folder=folder,
        val_loss=progress.best_val_loss,
        val_bpb=bpb,
        story=story,
        copied=is_copy(story, text.train()),
        seconds=progress.trained_seconds,
    )
    report(result, console)
    return result


@dataclass(frozen=True)
class Text:
    """The documents of a run and their tokenizer. ``train`` and ``valid`` start anew each call."""

    data: DataConfig
    seed: int
    tokenizer: Tokenizer

    def train(self) -> Iterable[str]:
        """Training documents."""
        return documents(self.data, self.seed, "train")

    def valid(self) -> Iterable[str]:
        """Validation documents."""
        return documents(self.data, self.seed, "valid")


def documents(data: DataConfig, seed: int, split: str) -> Iterable[str]:
    """The documents of one split: embedded stories, a file of its own, or a share held out."""
    if not data.data:
        n = data.n_stories if split == "train" else VALID_STORIES
        return write_stories(n, seed, split)
    if data.valid:
        return read_texts(
            data.data if split == "train" else data.valid, None, True, data.text_column
        )
    parts = split_documents(read_texts(data.data, None, True, data.text_column), VALID_SHARE, seed)
    return parts[0] if split == "train" else parts[1]


def prepare_text(config: RunConfig, folder: Path) -> Text:
    """Find or train the tokenizer; a resumed run reads the one it began with, if it got so far.

    Raises:
        ValueError: data that is not there, before any time is spent on the rest.
    """
    if config.data.valid:
        if not config.data.data:
            raise ValueError("--valid is given without --data: give the training text too")
        documents(config.data, config.train.seed, "valid")  # refuses a file that is not there
    saved = folder / "tokens" / "tokenizer.json"
    if config.resume and saved.exists():
        tokenizer = Tokenizer.load(saved)
    elif config.data.tokenizer:
        tokenizer = Tokenizer.load(config.data.tokenizer)
    else:
        texts = documents(config.data, config.train.seed, "train")
        tokenizer = train_bpe(texts, config.model.vocab_size)
    return Text(config.data, config.train.seed, tokenizer)


def prepare_tokens(text: Text, folder: Path) -> tuple[TokenFile, TokenFile]:
    """Token files of both splits, written into the run folder unless they are there already."""
    place = folder / "tokens"
    place.mkdir(parents=True, exist_ok=True)
    text.tokenizer.save(place / "tokenizer.json")
    files = []
    for split, texts in (("train", text.train), ("valid", text.valid)):
        path = place / f"{split}.bin"
        if path.exists():
            file = TokenFile.open(path)
            file.require_tokenizer(text.tokenizer)
        else:
            file = write_tokens(texts(), text.tokenizer, path)
        files.append(file)
    return files[0], files[1]


def fit_model(config: RunConfig, tokenizer: Tokenizer, console: Console) -> RunConfig:
    """Give the model the tokenizer's vocabulary, and say so; refuse a context that is too short."""
    model = config.model
    if config.train.seq_len > model.max_seq_len:
        raise ValueError(
            f"train.seq_len ({config.train.seq_len}) exceeds the model's context: raise "
            f"--model.max-seq-len (now {model.max_seq_len})"
        )
    if tokenizer.vocab_size != model.vocab_size:
        console.print(
            f"vocabulary: {model.vocab_size:,} in the preset, {tokenizer.vocab_size:,} in the "
            "tokenizer; the model takes the tokenizer's"
        )
        config = replace(config, model=replace(model, vocab_size=tokenizer.vocab_size))
    return config


def is_copy(story: str, training: Iterable[str], passage: int = 200) -> bool:
    """Does any training story contain a passage of ``passage`` characters of ``story``?"""
    step = max(passage // 4, 1)
    starts = range(0, max(len(story) - passage, 0) + 1, step)
    passages = [story[start : start + passage] for start in starts]
    return any(piece in text for text in training for piece in passages)


def report(result: RunResult, console: Console) -> None:
    """Write ``result.json`` and the final words."""
    bpb = result.val_bpb
    content = {
        "val_loss": result.val_loss,
        "val_bpb": bpb.value,
        "val_bytes": bpb.bytes,
        "val_stories": bpb.stories,
        "train_seconds": result.seconds,
        "story": result.story,
        "story_is_copy": result.copied,
    }
    (result.folder / "result.json").write_text(json.dumps(content, indent=2) + "\n")
    say = console.print
    say(f"\n{result.story}\n", markup=False, highlight=False)
    say(
        "(a passage of this story stands in the training text)"
        if result.copied
        else "(no passage of 200 characters of this story stands in the training text)"
    )
    say(
        f"val_loss {result.val_loss:.4f} nats per token   val_bpb {bpb.value:.4f} bits per byte "
        f"({bpb.stories} stories, {bpb.bytes:,} bytes)   trained in {result.seconds:.0f} s"
    )
    say(f"run folder: {result.folder}", soft_wrap=True)
    say(f"tell more:  python scripts/generate.py --model {result.folder}", soft_wrap=True)


def default_folder(preset: str) -> str:
    """``runs/<preset>-<date>-<time>``."""
    return f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_run_config(folder: Path, config: RunConfig) -> None:
    """Save the resolved settings as ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def read_run_config(folder: Path) -> RunConfig:
    """Read the settings of a run, to resume it.

    Raises:
        ValueError: not a run folder, or unknown settings.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a run folder (no config.json); nothing to resume")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return RunConfig(
            preset=content["preset"],
            out=str(folder),
            resume=str(folder),
            model=ModelConfig(**content["model"]),
            data=DataConfig(**content["data"]),
            train=TrainConfig(**content["train"]),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of a run ({error!r})") from None

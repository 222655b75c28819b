"""A whole run: from text to a trained model in a folder, and what to tell the user at the end."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pyllm.data import (
    TokenFile,
    read_texts,
    sidecar_path,
    split_documents,
    story_windows,
    write_stories,
    write_tokens,
)
from pyllm.evaluate import BitsPerByte, bits_per_byte
from pyllm.models import ModelConfig, Transformer, count_parameters, load_model, preset
from pyllm.tokenizers import Tokenizer, train_bpe
from pyllm.train.config import TRAIN_PRESETS, DataConfig, RunConfig, TrainConfig
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
    val_bpb: BitsPerByte | None
    """None where the model's context is too short for it; said so at the start."""
    story: str
    shared_passage: int
    """Characters of the longest passage the story shares with a training text; 0 if under 63."""
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
        refuse_other_flags(config)
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
        # What was chosen, not "auto": a resumed run must not choose again.
        chosen: Any = {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
        threads = torch.get_num_threads()
        config = replace(config, train=replace(config.train, threads=threads, **chosen))
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
    scored = fits_val_bpb(config.model, text, console)
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
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory on {device.type} ({str(error).splitlines()[0]}); halve "
                "--train.batch-size and double --train.accumulation, or give --train.recompute"
            ) from None
        except KeyboardInterrupt:
            log.flush()
            draw(folder)
            console.print(f"stopped at step {trainer.progress.step}; go on with --resume {folder}")
            raise
    draw(folder)
    best, _ = load_model(folder / "best", device)
    trainer.model = best
    bpb = None
    if scored:
        bpb = bits_per_byte(best, text.tokenizer, text.valid(), autocast(device, dtype))
    story = trainer.tell(STORY_TOKENS, seed=config.train.seed)
    result = RunResult(
        folder=folder,
        val_loss=progress.best_val_loss,
        val_bpb=bpb,
        story=story,
        shared_passage=longest_shared_passage(story, text.train()),
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
        if path.exists() and sidecar_path(path).exists():
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


def refuse_other_flags(config: RunConfig) -> None:
    """A resumed run keeps its settings; flags beside ``--resume`` would be ignored.

    Raises:
        ValueError: there are some.
    """
    fresh = RunConfig(
        preset=config.preset,
        model=preset(config.preset),
        train=TRAIN_PRESETS[config.preset],
        resume=config.resume,
    )
    if config != fresh or config.preset != RunConfig.preset:
        raise ValueError(
            "--resume goes on with the settings in the run's config.json; leave the other flags out"
        )


def fits_val_bpb(model: ModelConfig, text: Text, console: Console) -> bool:
    """Is the context long enough to score 1,024 bytes at once? Said now, not after training."""
    longest = max(len(ids) for ids, _ in story_windows(text.valid(), text.tokenizer))
    if longest > model.max_seq_len:
        console.print(
            f"val_bpb will be left out: 1,024 bytes of the validation text are up to {longest} "
            f"tokens, and the context is {model.max_seq_len} (--model.max-seq-len)"
        )
    return longest <= model.max_seq_len


def longest_shared_passage(story: str, texts: Iterable[str], block: int = 32) -> int:
    """Characters of the longest passage of ``story`` that stands in one of ``texts``.

    Any passage of ``2 * block - 1`` characters holds a whole block of the story, cut at multiples
    of ``block``; so only those are looked for, and what is found is extended both ways. Shorter
    passages are not seen and count as 0.
    """
    blocks = [(at, story[at : at + block]) for at in range(0, len(story) - block + 1, block)]
    longest = 0
    for text in texts:
        for at, piece in blocks:
            found = text.find(piece)
            while found >= 0:
                start, end = 0, block
                while at - start > 0 and found - start > 0:
                    if story[at - start - 1] != text[found - start - 1]:
                        break
                    start += 1
                while at + end < len(story) and found + end < len(text):
                    if story[at + end] != text[found + end]:
                        break
                    end += 1
                longest = max(longest, start + end)
                found = text.find(piece, found + 1)
    return longest if longest >= 2 * block - 1 else 0


def report(result: RunResult, console: Console) -> None:
    """Write ``result.json`` and the final words."""
    bpb = result.val_bpb
    content = {
        "val_loss": result.val_loss,
        "val_bpb": bpb and bpb.value,
        "val_bytes": bpb and bpb.bytes,
        "val_stories": bpb and bpb.stories,
        "train_seconds": result.seconds,
        "story": result.story,
        "story_characters": len(result.story),
        "story_shared_passage": result.shared_passage,
    }
    (result.folder / "result.json").write_text(json.dumps(content, indent=2) + "\n")
    say = console.print
    say(f"\n{result.story}\n", markup=False, highlight=False)
    shared = f"{result.shared_passage}" if result.shared_passage else "under 63"
    say(
        f"({len(result.story)} characters; the longest passage that also stands in a training "
        f"text is {shared} characters)"
    )
    if bpb:
        say(f"val_bpb {bpb.value:.4f} bits per byte ({bpb.stories} stories, {bpb.bytes:,} bytes)")
    say(
        f"val_loss {result.val_loss:.4f} nats per token; trained in {result.seconds:.0f} s",
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

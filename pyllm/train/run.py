"""A whole run: from text to a trained model in a folder, and what to tell the user at the end."""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pyllm._cli import require_writable
from pyllm.evaluate import BitsPerByte, bits_per_byte
from pyllm.models import Transformer, count_parameters, load_model
from pyllm.models.durable import write_file
from pyllm.train.config import TRAIN_PRESETS, RunConfig
from pyllm.train.device import (
    apply_threads,
    autocast,
    choose_device,
    choose_dtype,
    free_memory,
    keep_freed_memory,
)
from pyllm.train.interrupt import Terminated, terminable
from pyllm.train.lock import run_lock
from pyllm.train.log import RunLog, draw
from pyllm.train.plan import plan_batch, usable
from pyllm.train.prepare import (
    check_batch,
    check_length,
    check_optimizer,
    fit_model,
    fits_val_bpb,
    prepare_text,
    prepare_tokens,
)
from pyllm.train.run_folder import (
    checkpoint_to_resume,
    default_folder,
    explained_errors,
    forget_lost_best,
    print_summary,
    read_run_config,
    refuse_other_flags,
    refuse_run_folder,
    require_run_folder,
    seal_run,
    vanish_if_refused,
    write_run_config,
)
from pyllm.train.trainer import Trainer, TrainingError, seed_everything

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
    skipped_steps: int
    """Steps that were left out because their gradient was not finite."""


def run_training(config: RunConfig, console: Console | None = None) -> RunResult:
    """Prepare the text, train, evaluate, tell a story; everything is kept in the run folder.

    Raises:
        ValueError: settings, data or files that cannot work, with the remedy; or another process
            is training in the run folder.
        OSError: the disk is full or the run folder cannot be written; says what is safe.
        KeyboardInterrupt: after a summary; SystemExit (143) for SIGTERM.
    """
    console = console or Console()
    if config.resume:
        folder = Path(config.resume)
        refuse_other_flags(config)
        require_run_folder(folder)
    else:
        folder = Path(config.out or default_folder(config.preset))
    require_writable(folder)
    with run_lock(folder):
        if config.resume:
            config = read_run_config(folder)
        else:
            refuse_run_folder(folder)
        with explained_errors(folder):
            try:
                with terminable():
                    if config.resume:
                        return _train_and_score(config, folder, console)
                    with vanish_if_refused(folder):
                        return _train_and_score(config, folder, console)
            except (KeyboardInterrupt, Terminated):
                print_summary(folder, console)
                raise


def _train_and_score(config: RunConfig, folder: Path, console: Console) -> RunResult:
    apply_threads(config.train)
    device = choose_device(config.train.device)
    dtype = choose_dtype(config.train.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(config.train.seed)
    started = time.perf_counter()
    check_batch(config.train)
    check_optimizer(config.train)
    checkpoint = checkpoint_to_resume(folder, console) if config.resume else None
    text = prepare_text(config, folder)
    if not config.resume:
        config = fit_model(config, text.tokenizer, console)
        # What was chosen, not "auto": a resumed run must not choose again.
        chosen: Any = {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
        threads = torch.get_num_threads()
        config = replace(config, train=replace(config.train, threads=threads, **chosen))
        config = fit_batch(config, device, dtype, console)
        folder.mkdir(parents=True, exist_ok=True)
        write_run_config(folder, config)
    train_file, valid_file = prepare_tokens(text, folder, resume=bool(config.resume))
    check_length(train_file, config)
    seal_run(folder)
    parameters = count_parameters(config.model)
    console.print(
        f"[bold]{config.preset}[/]: {parameters.total / 1e6:.1f}M parameters, "
        f"{parameters.active / 1e6:.1f}M active without embeddings; "
        f"{len(train_file):,} training tokens, vocabulary {text.tokenizer.vocab_size:,}; "
        f"{device.type}, {str(dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} threads; text ready in {time.perf_counter() - started:.1f} s"
    )
    if (device.type, dtype) == ("cpu", torch.float16):
        console.print("float16 is slow on a CPU: --train.dtype float32 or bfloat16 is faster there")
    scored = fits_val_bpb(config.model, text, console)
    model = Transformer(config.model).to(device)
    trainer = Trainer(
        model, text.tokenizer, train_file, valid_file, config.train, folder, device, dtype
    )
    if checkpoint:
        trainer.resume(checkpoint)
        forget_lost_best(folder, trainer.progress, console)
        console.print(f"resuming {folder} at step {trainer.progress.step}")
    start = trainer.progress
    with RunLog(folder, config.train.max_steps, start.step, console, start.logs) as log:
        progress = trainer.train(log)
    draw(folder)
    if not math.isfinite(progress.best_val_loss):
        raise TrainingError(
            f"no validation loss was finite, so there is no best model; {folder / 'last'} holds "
            "the last one; start a run with --train.dtype float32, or with another --valid text"
        )
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
        skipped_steps=progress.skipped_steps,
    )
    report(result, console)
    return result


def fit_batch(
    config: RunConfig, device: torch.device, dtype: torch.dtype, console: Console
) -> RunConfig:
    """On a GPU, unless told otherwise: the largest micro-batch that should fit into its memory.

    Whoever gives another batch size or accumulation than the preset's has chosen. The sequences of
    a step stay the same. What does not fit after all is found by running out of memory, see
    ``Trainer.step``.
    """
    train, usual = config.train, TRAIN_PRESETS[config.preset]
    sizes = (train.batch_size, train.accumulation) == (usual.batch_size, usual.accumulation)
    room = free_memory(device)
    if room is None or not sizes or not train.auto_batch:
        return config
    plan = plan_batch(config.model, train, dtype, usable(room), device.type)
    console.print(
        f"{plan.train.batch_size} sequences at a time, {plan.train.accumulation} times a step: "
        f"about {plan.estimate.total / 2**20:,.0f} of {room / 2**20:,.0f} MiB"
        + ("" if plan.fits else "; see scripts/plan_memory.py for settings that fit"),
        highlight=False,
    )
    return replace(config, train=plan.train)


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
        "skipped_steps": result.skipped_steps,
        "story": result.story,
        "story_characters": len(result.story),
        "story_shared_passage": result.shared_passage,
    }
    write_file(result.folder / "result.json", json.dumps(content, indent=2) + "\n")
    say = console.print
    say(f"\n{result.story}\n", markup=False, highlight=False)
    shared = f"{result.shared_passage}" if result.shared_passage else "under 63"
    say(
        f"({len(result.story)} characters; the longest passage that also stands in a training "
        f"text is {shared} characters)"
    )
    if bpb:
        say(f"val_bpb {bpb.value:.4f} bits per byte ({bpb.stories} stories, {bpb.bytes:,} bytes)")
    say(f"val_loss {result.val_loss:.4f} nats per token; trained in {result.seconds:.0f} s")
    if result.skipped_steps:
        say(f"{result.skipped_steps} steps were skipped: their gradient was not finite")
    say(f"run folder: {result.folder}", soft_wrap=True)
    say(f"tell more:  python scripts/generate.py --model {result.folder}", soft_wrap=True)

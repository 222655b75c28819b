"""The folder of a run: what it may be written into, what it is resumed from, where it stands."""

import contextlib
import errno
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pyllm.models import ModelConfig, preset
from pyllm.models.durable import (
    MANIFEST,
    check_manifest,
    read_json,
    read_manifest,
    settle_folder,
    write_file,
    write_manifest,
)
from pyllm.train.checkpoint import WEIGHTS, Progress, check_checkpoint, saved_progress
from pyllm.train.config import TRAIN_PRESETS, DataConfig, RunConfig, TrainConfig
from pyllm.train.log import METRICS, SAMPLES, draw, read_metrics

CONFIG = "config.json"
TOKENS = ("tokens/tokenizer.json", "tokens/train.json", "tokens/valid.json")
"""The sidecars among them hold the sha256 of their .bin files."""
CHECKPOINTS = ("last", "best", "last.old", "best.old")
BEGUN = ("tokens", METRICS, SAMPLES, "tensorboard", MANIFEST, CONFIG)
"""What a run writes before its first checkpoint."""
SHOWN_RUNS = 3
FULL = (errno.ENOSPC, errno.EDQUOT)


def default_folder(preset: str) -> str:
    """``runs/<preset>-<date>-<time>``."""
    return f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def refuse_run_folder(folder: Path) -> None:
    """A new run never goes where one has been.

    Raises:
        ValueError: there is one.
    """
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder} already holds a run; give another --out, or --resume {folder}")
    for name in (*CHECKPOINTS, *BEGUN):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} already holds {name} of a run, without its {CONFIG}; give another --out"
            )


@contextlib.contextmanager
def vanish_if_refused(folder: Path) -> Iterator[None]:
    """Take a new run back that a ValueError ends before its first step.

    It would end the same way each time it is resumed, and block its ``--out``. An OSError or
    Ctrl-C leaves it: that one can be resumed. :func:`refuse_run_folder` has seen to it that all
    that goes by these names is the run's own.

    Raises:
        ValueError: the same.
    """
    try:
        yield
    except ValueError:
        metrics = folder / METRICS
        stepped = metrics.exists() and metrics.stat().st_size > 0
        if not stepped and not any((folder / name).exists() for name in CHECKPOINTS):
            for place in (folder / name for name in BEGUN):
                if place.is_dir():
                    shutil.rmtree(place)
                else:
                    place.unlink(missing_ok=True)
        raise


def require_run_folder(folder: Path) -> None:
    """Is there a run to resume?

    Raises:
        ValueError: no; names the run around it, or the runs in it.
    """
    if _is_run(folder):
        return
    around = [*folder.parents[:2], *folder.absolute().parents[:2]] if folder.exists() else []
    for place in around:
        if _is_run(place) and (place / MANIFEST).is_file():
            what = "a checkpoint" if (folder / WEIGHTS).is_file() else "a part"
            raise ValueError(f"{folder}: {what} of a run, not the run; give --resume {place}")
    if (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: a model without its run; there is nothing to resume")
    runs = [place for place in folder.iterdir() if _is_run(place)] if folder.is_dir() else []
    if runs:
        runs.sort(key=lambda place: (place / CONFIG).stat().st_mtime, reverse=True)
        newest = ", ".join(str(place) for place in runs[:SHOWN_RUNS])
        raise ValueError(f"{folder}: a folder of runs; --resume one, newest first: {newest}")
    raise ValueError(f"{folder}: not a run folder (no {CONFIG}); nothing to resume")


def _is_run(folder: Path) -> bool:
    """A checkpoint has a ``config.json`` too, but beside weights."""
    return (folder / CONFIG).is_file() and not (folder / WEIGHTS).is_file()


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


def write_run_config(folder: Path, config: RunConfig) -> None:
    """Save the resolved settings as ``config.json``, and a manifest that vouches for them."""
    write_file(folder / CONFIG, json.dumps(asdict(config), indent=2) + "\n")
    write_manifest(folder, [CONFIG])


def read_run_config(folder: Path) -> RunConfig:
    """Read the settings of a run, to resume it.

    Raises:
        ValueError: not a run folder, a changed file, or unknown settings.
    """
    require_run_folder(folder)
    path = folder / CONFIG
    check_run(folder)
    try:
        content: dict[str, Any] = read_json(path)
        return RunConfig(
            preset=content["preset"],
            out=str(folder),
            resume=str(folder),
            model=ModelConfig(**content["model"]),
            data=DataConfig(**content["data"]),
            train=TrainConfig(**content["train"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the settings of a run ({error!r})") from None


def check_run(folder: Path) -> None:
    """Are the settings and the token files those the run began with?

    Raises:
        ValueError: one is not. Token files that are missing are no error: they are made again,
            and checked then.
    """
    check_manifest(folder, [CONFIG], remedy="restore it; a run keeps its settings")
    listed = read_manifest(folder) or {}
    for name in TOKENS:
        if name in listed and (folder / name).exists():
            remedy = "delete it, and --resume makes it again from the text"
            check_manifest(folder, [name], remedy)


def seal_run(folder: Path) -> None:
    """Once the token files are there: add them to the manifest, or check those made again.

    Raises:
        ValueError: the text gives other tokens than those the run began with.
    """
    listed = read_manifest(folder) or {}
    if not set(TOKENS) <= listed.keys():
        write_manifest(folder, [CONFIG, *TOKENS])
    check_manifest(folder, TOKENS, remedy="the text has changed since; start a new run")


def checkpoint_to_resume(folder: Path, console: Console) -> str | None:
    """``last``; where that is gone, ``best``; None where there is none yet.

    Raises:
        ValueError: it is damaged; says what one can go on from.
    """
    for name in ("last", "best"):
        settle_folder(folder / name)
    found = [name for name in ("last", "best") if (folder / name).exists()]
    for name in found:
        try:
            check_checkpoint(folder / name)
        except ValueError as error:
            raise ValueError(f"{error}; {_way_out(folder, name)}") from None
    if found == ["best"]:
        console.print(f"{folder} has no last checkpoint; going on from the best one")
    return found[0] if found else None


def _way_out(folder: Path, name: str) -> str:
    if name == "best":
        if (folder / "last").exists():
            return f"or move {folder / name} away to go on without it"
        return f"or move {folder / name} away to start again at step 0"
    if best := saved_progress(folder / "best"):
        return f"or move {folder / name} away to go on from {folder / 'best'}, step {best.step}"
    return f"or move {folder / name} away (and {folder / 'best'}) to start again at step 0"


def forget_lost_best(folder: Path, progress: Progress, console: Console) -> None:
    """Where ``best`` is gone, the next validation makes a new one, and says so."""
    if not (folder / "best").exists() and math.isfinite(progress.best_val_loss):
        console.print(
            f"{folder / 'best'} is gone (val_loss {progress.best_val_loss:.4f}); the best from "
            "here on will be kept"
        )
        progress.best_val_loss = math.inf


@contextlib.contextmanager
def explained_errors(folder: Path) -> Iterator[None]:
    """To an error of the disk, add what is safe and how to go on.

    Raises:
        OSError: the same, in words.
    """
    try:
        yield
    except (ConnectionError, TimeoutError):  # BrokenPipeError is one too
        raise
    except OSError as error:
        full = error.errno in FULL
        what, remedy = str(error), "when that is put right, "
        if full:
            what = f"the disk is full: {error.filename or folder} could not be written"
            remedy = "make room and "
        raise OSError(
            f"{what}; {_what_is_safe(folder)}; {remedy}{_how_to_go_on(folder)}"
        ) from error


def _what_is_safe(folder: Path) -> str:
    for name in ("last", "best"):
        if progress := saved_progress(folder / name):
            return f"the checkpoint of step {progress.step} in {folder / name} is whole"
    return "there was no checkpoint yet"


def _how_to_go_on(folder: Path) -> str:
    return f"go on with --resume {folder}" if (folder / CONFIG).exists() else "start again"


def print_summary(folder: Path, console: Console) -> None:
    """Where a stopped run stands, read from what it leaves on the disk; and the pictures."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if not (folder / CONFIG).exists():
        say("stopped before the run began; nothing of it is kept")
        return
    progress = saved_progress(folder / "last") or saved_progress(folder / "best")
    rows = read_metrics(folder) if (folder / METRICS).exists() else []
    if progress is None:
        say(f"stopped before the first checkpoint; start again with --resume {folder}")
        return
    max_steps = read_json(folder / CONFIG)["train"]["max_steps"]
    say(
        f"stopped: {progress.step} of {max_steps} steps are saved, trained in "
        f"{progress.trained_seconds:.0f} s; {progress.skipped_steps} skipped (gradient not finite)"
    )
    saved = [row for row in rows if row["step"] <= progress.step]
    losses = [row["train_loss"] for row in saved if math.isfinite(row["train_loss"])]
    if losses:
        best = f"{progress.best_val_loss:.4f}" if math.isfinite(progress.best_val_loss) else "none"
        say(f"train_loss {losses[-1]:.4f}, best val_loss {best} nats per token")
    say(f"run folder: {folder}; go on with --resume {folder}")
    draw(folder)

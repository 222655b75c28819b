"""The checkpoint of a run: the model folder, and beside it all that is needed to go on exactly.

``train_state/`` holds ``optimizer.safetensors`` and ``state.json``: step, loss scaler, every random
generator, the best validation loss. No pickle. The folder's manifest covers all files, so that
weights of one step never meet the optimizer of another. The optimizers' settings are not in it:
they follow from those of the run.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyllm._checks import shown
from pyllm.models import Transformer
from pyllm.models.durable import (
    MANIFEST,
    check_manifest,
    open_tensors,
    read_json,
    save_tensors,
    settle_folder,
    write_folder,
)
from pyllm.models.folder import load_weights, write_model
from pyllm.tokenizers import Tokenizer
from pyllm.train.optimizer import empty_state

WEIGHTS, OPTIMIZER, STATE = (
    "model.safetensors",
    "train_state/optimizer.safetensors",
    "train_state/state.json",
)


@dataclass
class Progress:
    """How far a run has come.

    Raises:
        ValueError: what no run can have counted.
    """

    step: int = 0
    """Optimiser steps done."""
    best_val_loss: float = float("inf")
    skipped_steps: int = 0
    """Steps whose gradient was not finite."""
    bad_in_a_row: int = 0
    """How many of them were the last ones."""
    micro_batch: int = 0
    """Sequences computed at once since memory ran out; 0: it never has."""
    trained_seconds: float = 0.0
    """Time spent in the loop, over all its parts."""
    idle_steps: list[list[int]] = field(default_factory=list)
    """For each MoE layer and expert: steps since it last got a token."""
    logs: dict[str, list[Any]] = field(default_factory=dict)
    """For each file that grows with the run: its size in bytes and sha256, up to this step."""

    def __post_init__(self) -> None:
        counts = [self.step, self.skipped_steps, self.bad_in_a_row, self.micro_batch]
        counts += sum(self.idle_steps, [])
        counts += [size for size, _ in self.logs.values()]
        times = [self.best_val_loss, self.trained_seconds]
        if not all(type(n) is int and n >= 0 for n in counts) or not all(
            isinstance(x, float) and x >= 0 for x in times
        ):
            raise ValueError(f"progress that no run can make: {vars(self)}")


def save_checkpoint(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizers: list[Optimizer],
    scaler: torch.amp.GradScaler,
    progress: Progress,
    settings: dict[str, Any],
) -> None:
    """Write everything to ``folder``; a kill at any moment leaves the last one whole.

    Raises:
        OSError: the disk is full or the place cannot be written; the last checkpoint stays.
    """

    def fill(temporary: Path) -> None:
        write_model(temporary, model, tokenizer)
        (temporary / "train_state").mkdir()
        tensors = _pack_optimizers(optimizers)
        tensors |= {f"rng.{name}": value for name, value in _generators().items()}
        save_tensors(tensors, temporary / OPTIMIZER)
        content = {
            "progress": vars(progress),
            "settings": settings,
            "scaler": scaler.state_dict(),
            "python_rng": random.getstate(),
            "numpy_rng": _numpy_state(),
        }
        (temporary / STATE).write_text(json.dumps(content), encoding="utf-8")

    write_folder(folder, fill)


def load_checkpoint(
    folder: Path,
    model: Transformer,
    optimizers: list[Optimizer],
    scaler: torch.amp.GradScaler,
    settings: dict[str, Any],
) -> Progress:
    """Restore weights, optimizers, scaler and every random generator.

    Args:
        folder: what :func:`save_checkpoint` wrote.
        model, optimizers, scaler: made with the same settings; overwritten.
        settings: those of the run; a checkpoint goes on only with the ones it was made with.

    Raises:
        ValueError: no checkpoint there, a damaged one, or one of another run.
    """
    check_checkpoint(folder)
    path = folder / STATE
    content = read_json(path)
    _require_settings(folder, content.get("settings"), settings)
    with open_tensors(folder / OPTIMIZER) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    load_weights(model, folder / WEIGHTS)
    try:
        progress = Progress(**content["progress"])
        if progress.micro_batch and settings["train.batch_size"] % progress.micro_batch:
            raise ValueError(
                f"{shown(progress.micro_batch)} sequences at a time do not fit a batch"
            )
        _restore_scaler(scaler, content["scaler"])
        _restore_generators(tensors, content)
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{path}: not the state of a training run ({error!r})") from None
    _unpack_optimizers(optimizers, tensors, folder / OPTIMIZER, progress)
    return progress


def check_checkpoint(folder: Path) -> None:
    """Is everything there, as it was written?

    Raises:
        ValueError: no checkpoint there, or a damaged one.
    """
    settle_folder(folder)
    if not (folder / STATE).is_file():
        raise ValueError(f"{folder}: no checkpoint to resume from (no {STATE})")
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder}: no {MANIFEST}, so nothing tells whether its files belong together; "
            "restore it"
        )
    names = (WEIGHTS, "config.json", "tokenizer.json", OPTIMIZER, STATE)
    check_manifest(folder, names, remedy="restore it")


def saved_progress(folder: Path) -> Progress | None:
    """How far the run had come when ``folder`` was written; None without a whole checkpoint."""
    try:
        check_checkpoint(folder)
        return Progress(**read_json(folder / STATE)["progress"])
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _require_settings(folder: Path, saved: Any, settings: dict[str, Any]) -> None:
    saved = saved if isinstance(saved, dict) else {}
    for name, value in json.loads(json.dumps(settings)).items():
        if saved.get(name) != value:
            raise ValueError(
                f"{folder}: made by another run ({name} was {shown(saved.get(name))}, here "
                f"{shown(value)}); "
                "resume with the settings and the text it was made with, or start a new run"
            )


def _pack_optimizers(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"{number}.{index}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def _unpack_optimizers(
    optimizers: list[Optimizer], tensors: dict[str, Tensor], path: Path, progress: Progress
) -> None:
    # load_state_dict takes any shape and any settings: the next step would fail, or go uphill.
    expected = {
        f"{number}.{index}.{name}": value
        for number, optimizer in enumerate(optimizers)
        for index, values in empty_state(optimizer).items()
        for name, value in values.items()
    }
    saved = {name: value for name, value in tensors.items() if not name.startswith("rng.")}
    stepped = progress.step > progress.skipped_steps
    if (saved or stepped) and (odd := sorted(saved.keys() ^ expected.keys())):
        raise ValueError(
            f"{path}: not the optimizer state of this run: {len(saved)} tensors, expected "
            f"{len(expected)} ({shown(odd[0])} is in one only); restore it"
        )
    for name, value in saved.items():
        if (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(
                f"{path}: {name} has shape {tuple(value.shape)} and dtype {value.dtype}, expected "
                f"{tuple(expected[name].shape)} and {expected[name].dtype}; restore it"
            )
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in saved.items():
            owner, index, name = key.split(".")
            if owner == str(number):
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _restore_scaler(scaler: torch.amp.GradScaler, saved: dict[str, Any]) -> None:
    fresh = scaler.state_dict()
    if not fresh:  # no loss scaling in this dtype
        return
    scale, tracker = saved["scale"], saved["_growth_tracker"]
    if not (isinstance(scale, float) and 0 < scale < float("inf")) or not (
        type(tracker) is int and 0 <= tracker < fresh["growth_interval"]
    ):
        raise ValueError(f"no scaler has scale {shown(scale)}, growth tracker {shown(tracker)}")
    scaler.load_state_dict(fresh | {"scale": scale, "_growth_tracker": tracker})


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda.{index}"] = state
    return states


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [name, np.asarray(keys).tolist(), *rest]


def _restore_generators(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"rng.cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
    version, internal, gauss = content["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = content["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))

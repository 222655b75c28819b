"""The checkpoint of a run: the model folder, and beside it all that is needed to go on exactly.

``train_state/`` holds ``optimizer.safetensors`` and ``state.json``: step, optimizer settings, loss
scaler, every random generator, the best validation loss. No pickle. The folder's manifest covers
all files, so that weights of one step never meet the optimizer of another.
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
    trained_seconds: float = 0.0
    """Time spent in the loop, over all its parts."""
    idle_steps: list[list[int]] = field(default_factory=list)
    """For each MoE layer and expert: steps since it last got a token."""
    logs: dict[str, list[Any]] = field(default_factory=dict)
    """For each file that grows with the run: its size in bytes and sha256, up to this step."""

    def __post_init__(self) -> None:
        counts = [self.step, self.skipped_steps, self.bad_in_a_row, *sum(self.idle_steps, [])]
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
        tensors, groups = _pack_optimizers(optimizers)
        tensors |= {f"rng.{name}": value for name, value in _generators().items()}
        save_tensors(tensors, temporary / OPTIMIZER)
        content = {
            "progress": vars(progress),
            "settings": settings,
            "optimizers": groups,
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
        _unpack_optimizers(optimizers, tensors, content["optimizers"])
        scaler.load_state_dict(content["scaler"])
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


def _pack_optimizers(optimizers: list[Optimizer]) -> tuple[dict[str, Tensor], list[Any]]:
    tensors: dict[str, Tensor] = {}
    settings = []
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for index, values in state["state"].items():
            for name, value in values.items():
                tensors[f"{number}.{index}.{name}"] = value.detach().cpu().contiguous()
        settings.append(state["param_groups"])
    return tensors, settings


def _unpack_optimizers(
    optimizers: list[Optimizer], tensors: dict[str, Tensor], settings: list[Any]
) -> None:
    for number, (optimizer, groups) in enumerate(zip(optimizers, settings, strict=True)):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, _, rest = key.partition(".")
            if owner == str(number):
                index, _, name = rest.partition(".")
                state.setdefault(int(index), {})[name] = value
        # load_state_dict takes any shape, and the next step would fail, or broadcast.
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        for at, values in state.items():
            for name, value in values.items():
                if value.dim() and value.shape != parameters[at].shape:
                    raise ValueError(
                        f"{name} of parameter {at} has shape {tuple(value.shape)}, not "
                        f"{tuple(parameters[at].shape)}"
                    )
        optimizer.load_state_dict({"state": state, "param_groups": groups})


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

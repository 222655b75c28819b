"""The checkpoint of a run: the model folder, and beside it all that is needed to go on exactly.

``train_state/`` holds ``optimizer.safetensors`` and ``state.json``: step, optimizer settings, loss
scaler, every random generator, the best validation loss. No pickle.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from pyllm.models import Transformer
from pyllm.models.folder import load_weights, settle_folder, write_folder, write_model
from pyllm.tokenizers import Tokenizer


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps done."""
    best_val_loss: float = float("inf")
    skipped_steps: int = 0
    """Steps whose gradient was not finite."""
    trained_seconds: float = 0.0
    """Time spent in the loop, over all its parts."""
    idle_steps: list[list[int]] = field(default_factory=list)
    """For each MoE layer and expert: steps since it last got a token."""


def save_checkpoint(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizers: list[Optimizer],
    scaler: torch.amp.GradScaler,
    progress: Progress,
) -> None:
    """Write everything to ``folder``; a kill at any moment leaves the last one whole.

    Raises:
        OSError: the disk is full or the place cannot be written; the last checkpoint stays.
    """

    def fill(temporary: Path) -> None:
        write_model(temporary, model, tokenizer)
        state = temporary / "train_state"
        state.mkdir()
        tensors, settings = _pack_optimizers(optimizers)
        tensors |= {f"rng.{name}": value for name, value in _generators().items()}
        save_file(tensors, state / "optimizer.safetensors")
        content = {
            "progress": vars(progress),
            "optimizers": settings,
            "scaler": scaler.state_dict(),
            "python_rng": random.getstate(),
            "numpy_rng": _numpy_state(),
        }
        (state / "state.json").write_text(json.dumps(content), encoding="utf-8")

    write_folder(folder, fill)


def load_checkpoint(
    folder: Path,
    model: Transformer,
    optimizers: list[Optimizer],
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Restore weights, optimizers, scaler and every random generator.

    Raises:
        ValueError: no checkpoint there, or a damaged one.
    """
    settle_folder(folder)
    path = folder / "train_state" / "state.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no checkpoint to resume from (no {path.name} in train_state)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        with safe_open(path.with_name("optimizer.safetensors"), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        load_weights(model, folder / "model.safetensors")
        _unpack_optimizers(optimizers, tensors, content["optimizers"])
        scaler.load_state_dict(content["scaler"])
        _restore_generators(tensors, content)
        return Progress(**content["progress"])
    except (KeyError, TypeError, IndexError, OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder}: damaged checkpoint ({error!r})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}: damaged checkpoint, {path.name}: {error}") from None


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

"""What a script is told in words, found: the model's folder, the device, the dtype."""

from pathlib import Path

import torch

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def find_model(path: str | Path | None = None, runs: str | Path = "runs") -> Path:
    """The model folder meant by ``path``: a model folder itself, or the best of a run.

    Args:
        path: a model folder (it holds ``model.safetensors``) or a run folder (``best/``, else
            ``last/``); by default the run that was saved last.
        runs: where to look for runs.

    Raises:
        ValueError: there is none; the message says how to make one.
    """
    if path is not None:
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such folder; expected a run folder, such as runs/<name>, "
                "or a model folder with model.safetensors"
            )
        found = _model_in(folder)
        if found is None:
            raise ValueError(
                f"{folder}: no model there; expected model.safetensors, or a run folder with "
                "best/ or last/"
            )
        return found
    runs = Path(runs)
    folders = runs.iterdir() if runs.is_dir() else iter(())
    models = [model for folder in folders if folder.is_dir() and (model := _model_in(folder))]
    if not models:
        raise ValueError(
            f"no trained model under {runs}/; train one with python scripts/train_moe.py, or "
            "name a folder with --model"
        )
    return max(models, key=_saved_at)


def _model_in(folder: Path) -> Path | None:
    if (folder / "model.safetensors").is_file():
        return folder
    for name in ("best", "last"):
        # The .old name is what a kill between two renames leaves; loading puts it right.
        for candidate in (folder / name, folder / f"{name}.old"):
            if (candidate / "model.safetensors").is_file():
                return folder / name
    return None


def _saved_at(model: Path) -> float:
    weights = model / "model.safetensors"
    return weights.stat().st_mtime if weights.is_file() else 0.0


def pick_device(name: str = "auto") -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto``: cuda, then mps, then cpu.

    Raises:
        ValueError: unknown, or not on this machine.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {name!r}")
    here = {"cpu": True, "cuda": has_cuda, "mps": has_mps}[device.type]
    if here and device.type == "cuda" and device.index is not None:
        here = device.index < torch.cuda.device_count()
    if not here:
        raise ValueError(f"device {name!r} is not available here; use --device auto")
    return device


def pick_dtype(name: str = "auto") -> torch.dtype | None:
    """``float32``, ``bfloat16``, ``float16``; ``auto`` is None, as saved.

    Raises:
        ValueError: unknown name.
    """
    if name != "auto" and name not in _DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES.get(name)

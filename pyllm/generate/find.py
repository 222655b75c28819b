"""What a script is told in words, found: the model's folder, the dtype."""

from pathlib import Path

import torch

from pyllm.models import named_dtype
from pyllm.models.shards import holds_weights


def find_model(path: str | Path | None = None, runs: str | Path = "runs") -> Path:
    """The model folder meant by ``path``: a model folder itself, or the best of a run.

    Args:
        path: a model folder (it holds ``model.safetensors``, or Hugging Face's index of several
            files) or a run folder (``best/``, else ``last/``); by default the run that was saved
            last.
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
    if holds_weights(folder):
        return folder
    for name in ("best", "last"):
        # The .old name is what a kill between two renames leaves; loading puts it right. A folder
        # that has lost its weights counts: passed over in silence, the other would tell the story.
        if (folder / name).is_dir() or (folder / f"{name}.old").is_dir():
            return folder / name
    return None


def _saved_at(model: Path) -> float:
    weights = model / "model.safetensors"
    return weights.stat().st_mtime if weights.is_file() else 0.0


def pick_dtype(name: str = "auto") -> torch.dtype | None:
    """``float32``, ``bfloat16``, ``float16``; ``auto`` is None: float32, or float64 where saved so.

    Raises:
        ValueError: unknown name.
    """
    return None if name == "auto" else named_dtype(name)

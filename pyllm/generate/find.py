"""What a script is told in words, found: the model's folder, its settings, the dtype."""

from pathlib import Path

import torch

from pyllm._checks import shown
from pyllm.generate.config import SamplingConfig
from pyllm.models import named_dtype
from pyllm.models.device import WEIGHT_DTYPES
from pyllm.models.durable import check_manifest, read_json
from pyllm.models.shards import holds_weights

DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""The settings that say nothing when greedy."""


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


def folder_settings(folder: Path) -> SamplingConfig:
    """How the maker of a model would have it drawn: what ``generation_config.json`` says of
    do_sample (false is greedy), temperature, top_k, top_p, min_p and repetition_penalty; for the
    rest, and without the file, the defaults of :class:`SamplingConfig`.

    Raises:
        ValueError: the file is damaged, or a setting is out of its range.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return SamplingConfig()
    check_manifest(folder, [path.name])
    found = {name: value for name, value in read_json(path).items() if value is not None}
    sampled = found.get("do_sample", True)
    if not isinstance(sampled, bool):
        raise ValueError(f"{path}: do_sample must be true or false, got {shown(sampled)}")
    # Of one that is greedy, the others say nothing, and may be anything.
    names = (*DRAWING, "repetition_penalty") if sampled else ("repetition_penalty",)
    try:
        return SamplingConfig(
            greedy=not sampled, **{name: found[name] for name in names if name in found}
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def pick_dtype(name: str = "auto") -> torch.dtype | None:
    """``float32``, ``bfloat16``, ``float16``, ``int8``; ``auto`` is None: float32, or float64 or
    int8 where saved so.

    Raises:
        ValueError: unknown name.
    """
    return None if name == "auto" else named_dtype(name, WEIGHT_DTYPES)

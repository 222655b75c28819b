"""Saving and loading a model folder: weights, configuration, tokenizer. No pickle is ever read."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pyllm.models.config import ModelConfig
from pyllm.models.transformer import Transformer
from pyllm.tokenizers import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with generation marks: the loss mask of fine-tuning follows from the template."""


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder so that a kill at any moment leaves either the old one or the new one whole.

    ``fill`` writes into a temporary folder beside it; every file is synced; then the two are
    exchanged by renaming. :func:`settle_folder` finishes an exchange that was cut short.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(folder.name + ".tmp")
    previous = folder.with_name(folder.name + ".old")
    settle_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def settle_folder(folder: Path) -> None:
    """If a kill fell between the two renames of :func:`write_folder`, bring the old folder back."""
    previous = folder.with_name(folder.name + ".old")
    if not folder.exists() and previous.exists():
        previous.rename(folder)


def readable_folder(folder: Path) -> Path:
    """The folder itself, or the old one if a kill (or the trainer, right now) is between the two
    renames of :func:`write_folder`. A reader renames nothing: the writer may be at work."""
    previous = folder.with_name(folder.name + ".old")
    return previous if not folder.exists() and previous.exists() else folder


def _sync(path: Path) -> None:
    # Some systems cannot open a folder for syncing; the rename is still ordered after the files.
    with contextlib.suppress(PermissionError, IsADirectoryError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_model(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write the files of a model into an existing folder; see :func:`save_model`."""
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    special = {
        "eos_token_id": tokenizer.end_of_text_id,
        "bos_token_id": tokenizer.end_of_text_id,
    }
    _write_json(
        folder / "config.json",
        {"model_type": "pyllm", "tokenizer_hash": tokenizer.hash, **special} | asdict(model.config),
    )
    tokenizer.save(folder / "tokenizer.json")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "bos_token": "<|endoftext|>",
            "model_max_length": model.config.max_seq_len,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {"do_sample": True, "temperature": 0.8, "top_p": 0.95, **special},
    )


def save_model(folder: str | Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write ``model.safetensors``, ``config.json``, the tokenizer and the generation settings.

    The folder appears whole or not at all.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    write_folder(Path(folder), lambda temporary: write_model(temporary, model, tokenizer))


def load_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json`` of a model folder.

    Raises:
        ValueError: no such folder, not a pyllm model, unknown or impossible settings.
    """
    path = Path(folder) / "config.json"
    settings = _read_json(path)
    if settings.get("model_type") != "pyllm":
        raise ValueError(
            f"{path}: expected a model of type 'pyllm', got {settings.get('model_type')!r}"
        )
    known = {field.name for field in fields(ModelConfig)}
    beside = {"model_type", "tokenizer_hash", "eos_token_id", "bos_token_id"}
    unknown = sorted(settings.keys() - known - beside)
    missing = sorted(known - settings.keys())
    if unknown or missing:
        raise ValueError(f"{path}: unknown settings {unknown}, missing settings {missing}")
    try:
        return ModelConfig(**{name: settings[name] for name in known})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, Tokenizer]:
    """Load a model folder; the model is in evaluation mode.

    Args:
        folder: what :func:`save_model` wrote, or a checkpoint of a run.
        device: where to put it.
        dtype: of the weights; by default as saved.

    Raises:
        ValueError: a file is missing, damaged, or does not belong to the others.
    """
    folder = readable_folder(Path(folder))
    config = load_config(folder)
    tokenizer = Tokenizer.load(folder)
    expected_hash = _read_json(folder / "config.json").get("tokenizer_hash")
    if tokenizer.hash != expected_hash:
        raise ValueError(
            f"{folder}: tokenizer.json is not the tokenizer this model was trained with; "
            "restore the file that was saved beside the weights"
        )
    model = Transformer(config)
    load_weights(model, folder / "model.safetensors")
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def load_weights(model: Transformer, path: Path) -> None:
    """Copy the tensors of a safetensors file into the model.

    Raises:
        ValueError: the file is missing or damaged, a tensor is missing, surplus or misshapen.
    """
    state = model.state_dict()
    try:
        with _open_tensors(path) as file:
            names = set(file.keys())
            if names != state.keys():
                raise ValueError(
                    f"{path}: missing tensors {sorted(state.keys() - names)[:3]}, "
                    f"unknown tensors {sorted(names - state.keys())[:3]}"
                )
            for name, target in state.items():
                tensor = file.get_tensor(name)
                if tensor.shape != target.shape:
                    raise ValueError(
                        f"{path}: {name} must have shape {tuple(target.shape)}, "
                        f"got {tuple(tensor.shape)}"
                    )
                target.copy_(tensor)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a model folder holds model.safetensors")
    with safe_open(path, framework="pt") as file:
        yield file


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a model folder, such as runs/<name>/best")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Saving and loading a model folder: weights, configuration, tokenizer. No pickle is ever read."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllm.models.config import ModelConfig
from pyllm.models.durable import (
    check_manifest,
    open_tensors,
    read_json,
    readable_folder,
    save_tensors,
    write_folder,
)
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

LARGEST_TABLES = 2**28
"""Numbers in the tables of positions, which no weight speaks for: 1 GiB, a context of 4 million
tokens with heads of 64."""


def write_model(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write the files of a model into an existing folder; see :func:`save_model`."""
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
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
    check_manifest(path.parent, [path.name])
    settings = read_json(path)
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

    Every file it reads is compared with the folder's manifest; a folder without one, such as
    another program writes, is taken as it is.

    Args:
        folder: what :func:`save_model` wrote, or a checkpoint of a run.
        device: where to put it.
        dtype: of the weights; by default as saved.

    Raises:
        ValueError: a file is missing, damaged, or does not belong to the others.
    """
    folder = readable_folder(Path(folder))
    config = load_config(folder)
    weights = folder / "model.safetensors"
    check_manifest(folder, [weights.name, "tokenizer.json"])
    tokenizer = Tokenizer.load(folder)
    expected_hash = read_json(folder / "config.json").get("tokenizer_hash")
    if tokenizer.hash != expected_hash:
        raise ValueError(
            f"{folder}: tokenizer.json is not the tokenizer this model was trained with; "
            "restore the file that was saved beside the weights"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size:,} ids, but the model's "
            f"vocab_size is {config.vocab_size:,}; restore the files that were saved together"
        )
    _check_sizes(config, weights)
    model = Transformer(config)
    load_weights(model, weights)
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def _check_sizes(config: ModelConfig, weights: Path) -> None:
    """Refuse a configuration that is not of these weights before memory is taken for it."""
    with open_tensors(weights) as file:
        blocks = {name.split(".")[1] for name in file.keys() if name.startswith("blocks.")}  # noqa: SIM118
        if len(blocks) != config.n_layers:
            raise ValueError(
                f"{weights}: holds {len(blocks)} blocks, but n_layers in config.json is "
                f"{config.n_layers}"
            )
        try:
            with torch.device("meta"):
                model = Transformer(config)
        except (ValueError, RuntimeError, OverflowError, TypeError) as error:
            raise ValueError(
                f"{weights.with_name('config.json')}: {str(error).splitlines()[0]}"
            ) from None
        _check_tensors(file, model.state_dict(), weights)
    tables = sum(buffer.numel() for buffer in model.buffers())
    if tables > LARGEST_TABLES:
        raise ValueError(
            f"{weights.with_name('config.json')}: max_seq_len {config.max_seq_len:,} would need "
            f"tables of {tables:,} positions' numbers; expected at most {LARGEST_TABLES:,}"
        )


def load_weights(model: Transformer, path: Path) -> None:
    """Copy the tensors of a safetensors file into the model.

    Raises:
        ValueError: the file is missing or damaged, a tensor is missing, surplus or misshapen.
    """
    state = model.state_dict()
    with open_tensors(path) as file:
        _check_tensors(file, state, path)
        for name, target in state.items():
            tensor = file.get_tensor(name)
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: {name} must hold floats, got {tensor.dtype}")
            target.copy_(tensor)


def _check_tensors(file: Any, state: Mapping[str, Tensor], path: Path) -> None:
    names = set(file.keys())
    if names != state.keys():
        raise ValueError(
            f"{path}: missing tensors {sorted(state.keys() - names)[:3]}, "
            f"unknown tensors {sorted(names - state.keys())[:3]}"
        )
    for name, target in state.items():
        shape = tuple(file.get_slice(name).get_shape())
        if shape != target.shape:
            raise ValueError(f"{path}: {name} must have shape {tuple(target.shape)}, got {shape}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

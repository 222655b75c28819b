"""Saving and loading a model folder: weights, configuration, tokenizer. No pickle is ever read."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

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
from pyllm.models.ends import read_stop_ids
from pyllm.models.foreign_tokenizer import check_tokenizer_files
from pyllm.models.hugging_face import read_settings
from pyllm.models.shards import (
    ADAPTER,
    WEIGHTS,
    check_weights,
    open_shards,
    read_weights,
    weight_files,
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

CHAT_TEMPLATE_FILE = "chat_template.jinja"

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}

_WITHOUT_TOKENIZER = "pyllm.models.load_transformer loads the model without it"

LARGEST_TABLES = 2**28
"""Numbers in the tables of positions, which no weight speaks for: 1 GiB, a context of 4 million
tokens with heads of 64."""


def write_model(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write the files of a model into an existing folder; see :func:`save_model`."""
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_tensors(weights, folder / WEIGHTS, metadata={"format": "pt"})
    special = special_ids(tokenizer)
    write_json(
        folder / "config.json",
        {"model_type": "pyllm", "tokenizer_hash": tokenizer.hash, **special} | asdict(model.config),
    )
    tokenizer.save(folder / "tokenizer.json")
    write_tokenizer_settings(folder, tokenizer, model.config.max_seq_len)
    write_json(folder / "generation_config.json", SAMPLING | special)


def check_vocabulary(what: str, model: Transformer, tokenizer: Tokenizer) -> None:
    """A vocabulary may be padded, so that the model has more.

    Raises:
        ValueError: the tokenizer has more tokens than the model; the message begins with ``what``.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{what}the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; use the tokenizer that was saved beside the model"
        )


def stored_chat_template(folder: Path, settings: Mapping[str, Any]) -> Any:
    """What ``chat_template.jinja`` of a folder holds, else what ``tokenizer_config.json`` has.

    Args:
        folder: of the model.
        settings: the content of ``tokenizer_config.json``.

    Returns:
        A text as a rule; None where there is no template, or whatever else stands there.

    Raises:
        ValueError: the file is not UTF-8.
    """
    own_file = folder / CHAT_TEMPLATE_FILE
    if not own_file.exists():
        return settings.get("chat_template")
    try:
        return own_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{own_file}: not UTF-8 at byte {error.start}") from None


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The end of a text is also what a text begins with."""
    return {"eos_token_id": tokenizer.end_of_text_id, "bos_token_id": tokenizer.end_of_text_id}


def write_tokenizer_settings(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Write ``tokenizer_config.json``."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "model_max_length": max_seq_len,
        "chat_template": CHAT_TEMPLATE,
    }
    if tokenizer.pad_id is not None:
        settings["pad_token"] = "<|pad|>"
    write_json(folder / "tokenizer_config.json", settings)


def save_model(folder: str | Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write ``model.safetensors``, ``config.json``, the tokenizer and the generation settings.

    The folder appears whole or not at all.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    write_folder(Path(folder), lambda temporary: write_model(temporary, model, tokenizer))


class _Described(NamedTuple):
    """What ``config.json`` of a model folder says."""

    config: ModelConfig
    is_ours: bool
    """Did pyllm write it, and not Hugging Face's programs?"""
    tokenizer_hash: Any
    """Of the tokenizer that a model of ours was trained with."""


def load_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json`` of a model folder, ours or a Hugging Face Llama, Mistral or Mixtral.

    Raises:
        ValueError: no such folder, another kind of model, unknown or impossible settings.
    """
    return _describe(Path(folder)).config


def _describe(folder: Path) -> _Described:
    path, adapter = folder / "config.json", folder / ADAPTER
    if adapter.is_file():
        raise ValueError(
            f"{adapter}: the weights of an adapter (LoRA), which would be left out; merge it first "
            "(peft: merge_and_unload) and save the whole model"
        )
    check_manifest(folder, [path.name])
    settings = read_json(path)
    is_ours = settings.get("model_type") == "pyllm"
    try:
        config = _read_own(settings) if is_ours else read_settings(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _Described(config, is_ours, settings.get("tokenizer_hash"))


def _read_own(settings: Mapping[str, Any]) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    beside = {"model_type", "tokenizer_hash", "eos_token_id", "bos_token_id"}
    unknown = sorted(settings.keys() - known - beside)
    missing = sorted(known - settings.keys())
    if unknown or missing:
        raise ValueError(f"unknown settings {unknown}, missing settings {missing}")
    return ModelConfig(**{name: settings[name] for name in known})


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, Tokenizer]:
    """Load a model folder; the model is in evaluation mode.

    Every file it reads is compared with the folder's manifest; a folder without one, such as
    another program writes, is taken as it is.

    Args:
        folder: what :func:`save_model` wrote, a checkpoint of a run, or a Hugging Face folder of a
            Llama, Mistral or Mixtral (``config.json``, safetensors in one file or several,
            ``tokenizer.json``).
        device: where to put it.
        dtype: of the weights; by default as saved, but never narrower than float32.

    Raises:
        ValueError: a file is missing, damaged, or does not belong to the others; a model or a
            tokenizer that pyllm does not have.
    """
    folder = readable_folder(Path(folder))
    described = _describe(folder)
    if not described.is_ours:
        # Pickled weights are told of before a tokenizer that does not fit.
        weight_files(folder)
    tokenizer = _load_tokenizer(folder, described)
    return _load_transformer(folder, described, device, dtype), tokenizer


def load_transformer(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Load a model without its tokenizer: :func:`load_model` where only token ids are needed.

    So a Hugging Face folder can be run whose tokenizer pyllm refuses, such as the vocabularies of
    Llama 2 and Mixtral, which come from SentencePiece and are not byte-level.

    Raises:
        ValueError: as :func:`load_model`.
    """
    folder = readable_folder(Path(folder))
    return _load_transformer(folder, _describe(folder), device, dtype)


def _load_tokenizer(folder: Path, described: _Described) -> Tokenizer:
    config, is_ours, expected_hash = described
    check_manifest(folder, ["tokenizer.json"])
    if is_ours:
        tokenizer = Tokenizer.load(folder)
    else:
        ends = read_stop_ids(folder, config.vocab_size) or []
        tokenizer = Tokenizer.load(folder, ends, _WITHOUT_TOKENIZER)
        check_tokenizer_files(folder, tokenizer, _WITHOUT_TOKENIZER)
    if is_ours and tokenizer.hash != expected_hash:
        raise ValueError(
            f"{folder}: tokenizer.json is not the tokenizer this model was trained with; "
            "restore the file that was saved beside the weights"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size:,} ids, but the model's "
            f"vocab_size is {config.vocab_size:,}; restore the files that were saved together"
        )
    return tokenizer


def _load_transformer(
    folder: Path, described: _Described, device: str | torch.device, dtype: torch.dtype | None
) -> Transformer:
    config = described.config
    if described.is_ours:
        weights = folder / WEIGHTS
        check_manifest(folder, [WEIGHTS])
        _check_sizes(config, weights)
        model = Transformer(config)
        load_weights(model, weights)
    else:
        check_manifest(folder, weight_files(folder))
        with open_shards(folder) as shards:
            check_weights(shards, config)
            _outline(config, shards.path)
            model = Transformer(config).to(dtype=dtype or shards.widest_dtype())
            read_weights(shards, config, model.state_dict())
    return model.to(device=device, dtype=dtype).eval()


def _check_sizes(config: ModelConfig, weights: Path) -> None:
    """Refuse a configuration that is not of these weights before memory is taken for it."""
    with open_tensors(weights) as file:
        blocks = {name.split(".")[1] for name in file.keys() if name.startswith("blocks.")}  # noqa: SIM118
        if len(blocks) != config.n_layers:
            raise ValueError(
                f"{weights}: holds {len(blocks)} blocks, but n_layers in config.json is "
                f"{config.n_layers}"
            )
        _check_tensors(file, _outline(config, weights).state_dict(), weights)


def _outline(config: ModelConfig, weights: Path) -> Transformer:
    """The model without any numbers, and a refusal of one whose tables would be too large."""
    path = weights.with_name("config.json")
    try:
        with torch.device("meta"):
            model = Transformer(config)
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    tables = sum(buffer.numel() for buffer in model.buffers())
    if tables > LARGEST_TABLES:
        raise ValueError(
            f"{path}: max_seq_len {config.max_seq_len:,} would need tables of {tables:,} "
            f"positions' numbers; expected at most {LARGEST_TABLES:,}"
        )
    return model


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

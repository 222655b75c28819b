"""Saving and loading a model folder: weights, configuration, tokenizer. No pickle is ever read."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyllm._checks import shown
from pyllm.layers.int8 import SCALE
from pyllm.models.config import ModelConfig
from pyllm.models.device import INT8
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
from pyllm.models.int8 import Int8Transformer, fill_int8, quantize_model
from pyllm.models.outline import outlined
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

QUANTIZATION = "quantization"
"""Says in ``config.json`` that the weights are int8; not there for floats."""

CHAT_TEMPLATE_FILE = "chat_template.jinja"

TEXT_FILES = ("generation_config.json", "tokenizer_config.json", CHAT_TEMPLATE_FILE)
"""What says how texts begin, end, are drawn and chatted, and may have been changed by hand."""

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
    settings = {"model_type": "pyllm", "tokenizer_hash": tokenizer.hash, **special}
    if isinstance(model, Int8Transformer):
        settings[QUANTIZATION] = INT8
    write_json(folder / "config.json", settings | asdict(model.config))
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


def quantize_folder(source: str | Path, folder: str | Path) -> None:
    """Write the model of one folder into another with int8 weights, prompted and stopped as it was.

    Raises:
        ValueError: as :func:`load_model`; weights that are int8 already, or a folder that pyllm did
            not write: such a one is quantised when it is loaded.
        OSError: the disk is full or the place cannot be written.
    """
    source = readable_folder(Path(source))
    described = _describe(source)
    if described.is_int8 or not described.is_ours:
        reason = (
            "its weights are int8 already"
            if described.is_int8
            else "pyllm did not write this folder; load it with dtype int8 (--dtype int8), which "
            "quantises what it has read"
        )
        raise ValueError(f"{source}: {reason}")
    model, tokenizer = load_model(source, dtype=torch.int8)
    told = [name for name in TEXT_FILES if (source / name).is_file()]
    check_manifest(source, told)

    def fill(temporary: Path) -> None:
        write_model(temporary, model, tokenizer)
        for name in told:
            shutil.copyfile(source / name, temporary / name)

    write_folder(Path(folder), fill)


class _Described(NamedTuple):
    """What ``config.json`` of a model folder says."""

    config: ModelConfig
    is_ours: bool
    """Did pyllm write it, and not Hugging Face's programs?"""
    tokenizer_hash: Any
    """Of the tokenizer that a model of ours was trained with."""
    is_int8: bool
    """Are the weights int8?"""


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
    is_int8 = is_ours and settings.get(QUANTIZATION) == INT8
    return _Described(config, is_ours, settings.get("tokenizer_hash"), is_int8)


def _read_own(settings: Mapping[str, Any]) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    beside = {"model_type", "tokenizer_hash", "eos_token_id", "bos_token_id", QUANTIZATION}
    unknown = sorted(settings.keys() - known - beside)
    missing = sorted(known - settings.keys())
    if unknown or missing:
        raise ValueError(f"unknown settings {unknown}, missing settings {missing}")
    if settings.get(QUANTIZATION, INT8) != INT8:
        raise ValueError(f"{QUANTIZATION} must be {INT8}, got {shown(settings[QUANTIZATION])}")
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
        dtype: of the weights; by default as saved, but never narrower than float32. ``torch.int8``
            makes a :class:`pyllm.models.Int8Transformer`: of a folder of ours tensor by tensor,
            while it is read, of a Hugging Face folder once the float model is there; a folder that
            holds one is always loaded as such.

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
    config, is_ours, expected_hash, _ = described
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
    if described.is_int8 and dtype not in (None, torch.int8):
        raise ValueError(
            f"{folder}: its weights are int8, got dtype {dtype}; load it as it is, or the model it "
            "was made from"
        )
    if described.is_ours:
        model = _load_own(folder / WEIGHTS, config, described.is_int8, dtype)
    else:
        check_manifest(folder, weight_files(folder))
        with open_shards(folder) as shards:
            check_weights(shards, config)
            _outline(config, shards.path)
            floats = shards.widest_dtype() if dtype in (None, torch.int8) else dtype
            model = Transformer(config).to(dtype=floats)
            read_weights(shards, config, model.state_dict())
        if dtype == torch.int8:
            model = quantize_model(model)
    return model.to(device=device, dtype=None if dtype == torch.int8 else dtype).eval()


def _load_own(
    weights: Path, config: ModelConfig, is_int8: bool, dtype: torch.dtype | None
) -> Transformer:
    check_manifest(weights.parent, [WEIGHTS])
    outline = _check_sizes(config, weights, is_int8)
    if is_int8:
        model: Transformer = Int8Transformer(config, zeros=False)
        load_weights(model, weights)
    elif dtype == torch.int8:
        model = Int8Transformer(config, zeros=False)
        try:
            fill_int8(model, _each_tensor(weights, outline.state_dict()))
        except ValueError as error:
            raise ValueError(f"{weights}: {error}") from None
    else:
        model = Transformer(config)
        load_weights(model, weights)
    return model


def _check_sizes(config: ModelConfig, weights: Path, is_int8: bool) -> Transformer:
    """Refuse a configuration that is not of these weights before memory is taken for it.

    Returns:
        The model without numbers.
    """
    with open_tensors(weights) as file:
        blocks = {name.split(".")[1] for name in file.keys() if name.startswith("blocks.")}  # noqa: SIM118
        if len(blocks) != config.n_layers:
            raise ValueError(
                f"{weights}: holds {len(blocks)} blocks, but n_layers in config.json is "
                f"{config.n_layers}"
            )
        outline = _outline(config, weights, is_int8)
        _check_tensors(file, outline.state_dict(), weights)
    return outline


def _outline(config: ModelConfig, weights: Path, is_int8: bool = False) -> Transformer:
    """The model without any numbers, and a refusal of one whose tables would be too large."""
    path = weights.with_name("config.json")
    try:
        with outlined():
            model = Int8Transformer(config, "meta") if is_int8 else Transformer(config)
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    row = {"rope": 2 * (config.head_dim // 2), "learned": 0, "sinusoidal": config.d_model}
    tables = config.max_seq_len * row[config.position]
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
    for name, tensor in _each_tensor(path, state):
        target = state[name]
        if tensor.is_floating_point() != target.is_floating_point() or (
            tensor.dtype != target.dtype == torch.int8
        ):
            kind = "floats" if target.is_floating_point() else "int8"
            raise ValueError(f"{path}: {name} must hold {kind}, got {tensor.dtype}")
        target.copy_(tensor)
        if name.endswith(SCALE) and not bool(target.isfinite().all()):
            raise ValueError(f"{path}: {name} holds a number that is NaN or infinite")


def _each_tensor(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file by name, one at a time in memory.

    The file is opened for each: what was read of it would else stay mapped, and count, to the end.
    """
    for name in names:
        with open_tensors(path) as file:
            yield name, file.get_tensor(name)


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

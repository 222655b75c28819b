"""A model folder that transformers and vLLM load as a Llama, a Mistral or a Mixtral."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllm.export._checks import check_exportable, check_free, narrowed
from pyllm.export.text_settings import TextSettings
from pyllm.models import Transformer
from pyllm.models.device import DTYPES
from pyllm.models.durable import save_tensors, write_folder
from pyllm.models.folder import write_json
from pyllm.models.hugging_face import tensor_parts, write_settings
from pyllm.models.shards import WEIGHTS, split_rows
from pyllm.tokenizers import Tokenizer


def write_hugging_face(
    folder: str | Path,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: str = "auto",
    texts: TextSettings | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors``, the tokenizer and the generation settings.

    The architecture is LlamaForCausalLM, MistralForCausalLM where the model has a window, or
    MixtralForCausalLM where it has experts. The folder appears whole or not at all.

    Args:
        folder: must not exist.
        model: dense or with experts in every layer.
        tokenizer: saved beside it.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto``: as the weights are.
        texts: how they begin and end; by default with end-of-text, as in pyllm's training.

    Raises:
        ValueError: the folder exists, an unknown dtype, numbers that float16 cannot hold, or a
            model that none of the three architectures is.
        OSError: the disk is full or the place cannot be written.
    """
    folder = Path(folder)
    check_free(folder)
    settings = write_settings(model.config)
    check_exportable(model)
    if dtype == "auto":
        wanted = model.embedding.weight.dtype
    elif dtype in DTYPES:
        wanted = DTYPES[dtype]
    else:
        raise ValueError(
            f"dtype {dtype} is not one of a Hugging Face folder; expected auto, {', '.join(DTYPES)}"
        )
    texts = TextSettings.of_tokenizer(tokenizer) if texts is None else texts
    stops = list(texts.stop_ids)
    special = {
        "bos_token_id": texts.bos_id(tokenizer),
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
    }
    settings |= {"torch_dtype": str(wanted).removeprefix("torch."), **special}
    weights = _tensors(model, wanted)

    def fill(temporary: Path) -> None:
        save_tensors(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / "config.json", settings)
        write_json(temporary / "tokenizer.json", _beginning_with(tokenizer, texts.begin_ids))
        write_json(
            temporary / "tokenizer_config.json",
            _tokenizer_settings(tokenizer, texts, model.config.max_seq_len),
        )
        write_json(temporary / "generation_config.json", dict(texts.generation) | special)

    # No manifest: the programs that this is for change what they load, and pyllm loads it again.
    write_folder(folder, fill, manifest=False)


def _beginning_with(tokenizer: Tokenizer, begin_ids: Sequence[int]) -> dict[str, Any]:
    """tokenizer.json that puts these tokens before a text; one that does so is left as it is."""
    if tokenizer.prefix_ids == list(begin_ids):
        return tokenizer.content
    names = [tokenizer.decode([id_], skip_special=False) for id_ in begin_ids]
    marks = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    first, second = ({"Sequence": {"id": id_, "type_id": n}} for n, id_ in enumerate("AB"))
    return tokenizer.content | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*marks, first],
            "pair": [*marks, first, second],
            "special_tokens": {
                name: {"id": name, "ids": [id_], "tokens": [name]}
                for name, id_ in zip(names, begin_ids, strict=True)
            },
        }
    }


def _tokenizer_settings(
    tokenizer: Tokenizer, texts: TextSettings, max_seq_len: int
) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        **texts.special_names(tokenizer),
    }
    if texts.chat_template is not None:
        settings["chat_template"] = texts.chat_template
    # Where it is told this, transformers 5 makes a post_processor of bos_token alone, and throws
    # away the one in tokenizer.json: so only where the two are the same.
    bos = tokenizer.token_to_id(settings.get("bos_token", ""))
    if list(texts.begin_ids) in ([], [bos]) and not tokenizer.suffix_ids:
        settings["add_bos_token"] = bool(texts.begin_ids)
    return settings


def _tensors(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    state = model.state_dict()
    return {
        part.name: narrowed(part.name, rows, dtype).contiguous()
        for name, parts in tensor_parts(model.config)
        for part, rows in zip(parts, split_rows(state[name], parts), strict=True)
    }

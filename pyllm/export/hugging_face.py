"""A model folder that transformers and vLLM load as a Llama, a Mistral or a Mixtral."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllm.export._checks import check_free, check_router_bias, narrowed
from pyllm.models import Transformer
from pyllm.models.device import DTYPES
from pyllm.models.durable import save_tensors, write_folder
from pyllm.models.folder import (
    CHAT_TEMPLATE,
    SAMPLING,
    special_ids,
    write_json,
    write_tokenizer_settings,
)
from pyllm.models.hugging_face import tensor_parts, write_settings
from pyllm.models.shards import WEIGHTS, split_rows
from pyllm.tokenizers import Tokenizer
from pyllm.tokenizers.byte_level import END_OF_TEXT

END_OF_TURN = "<|im_end|>"


def write_hugging_face(
    folder: str | Path,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: str = "auto",
    chat_template: str = CHAT_TEMPLATE,
) -> None:
    """Write ``config.json``, ``model.safetensors``, the tokenizer and the generation settings.

    The architecture is LlamaForCausalLM, MistralForCausalLM where the model has a window, or
    MixtralForCausalLM where it has experts. The folder appears whole or not at all.

    Args:
        folder: must not exist.
        model: dense or with experts in every layer.
        tokenizer: saved beside it; a text begins with its end-of-text token, as in training.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto``: as the weights are.
        chat_template: Jinja.

    Raises:
        ValueError: the folder exists, an unknown dtype, numbers that float16 cannot hold, or a
            model that none of the three architectures is.
        OSError: the disk is full or the place cannot be written.
    """
    folder = Path(folder)
    check_free(folder)
    settings = write_settings(model.config)
    check_router_bias(model)
    if dtype == "auto":
        wanted = model.embedding.weight.dtype
    elif dtype in DTYPES:
        wanted = DTYPES[dtype]
    else:
        raise ValueError(
            f"dtype {dtype} is not one of a Hugging Face folder; expected auto, {', '.join(DTYPES)}"
        )
    special = special_ids(tokenizer)
    settings |= {"torch_dtype": str(wanted).removeprefix("torch."), **special}
    weights = _tensors(model, wanted)

    def fill(temporary: Path) -> None:
        save_tensors(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / "config.json", settings)
        write_json(temporary / "tokenizer.json", _beginning_with_end_of_text(tokenizer))
        write_tokenizer_settings(temporary, tokenizer, model.config.max_seq_len, chat_template)
        # In a chat, the end of a turn ends the answer.
        ends = [special["eos_token_id"], tokenizer.token_to_id(END_OF_TURN)]
        stops = {"eos_token_id": [end for end in ends if end is not None]}
        write_json(temporary / "generation_config.json", SAMPLING | special | stops)

    write_folder(folder, fill)


def _beginning_with_end_of_text(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json that puts the end-of-text token before a text, as the model was trained."""
    name = END_OF_TEXT
    mark = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": id_, "type_id": n}} for n, id_ in enumerate("AB"))
    return tokenizer.content | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [mark, first],
            "pair": [mark, first, second],
            "special_tokens": {
                name: {"id": name, "ids": [tokenizer.end_of_text_id], "tokens": [name]}
            },
        }
    }


def _tensors(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    state = model.state_dict()
    return {
        part.name: narrowed(part.name, rows, dtype).contiguous()
        for name, parts in tensor_parts(model.config)
        for part, rows in zip(parts, split_rows(state[name], parts), strict=True)
    }

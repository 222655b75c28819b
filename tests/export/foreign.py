"""Model folders as others publish them: transformers' models, tokenizers that are not pyllm's."""

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pyllm.generate import LanguageModel, SamplingConfig
from pyllm.tokenizers import Tokenizer
from pyllm.tokenizers.lossless import SPLITS

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
PROMPT = "Once there was a fox"
GREEDY = SamplingConfig(greedy=True, max_new_tokens=60)
Content = dict[str, Any]
LLAMA3_NAMES = {
    "<|endoftext|>": "<|end_of_text|>",
    "<|pad|>": "<|begin_of_text|>",
    "<|im_start|>": "<|start_header_id|>",
    "<|im_end|>": "<|eot_id|>",
}


def template(*before: str, after: tuple[str, ...] = (), ids: dict[str, int]) -> dict[str, Any]:
    """A post_processor that puts these special tokens around a text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    around = [[{"SpecialToken": {"id": name, "type_id": 0}} for name in x] for x in (before, after)]
    return {
        "type": "TemplateProcessing",
        "single": [*around[0], text, *around[1]],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (*before, *after)
        },
    }


def like_llama3(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json as Llama 3 has it: special tokens behind the vocabulary and not in it, words
    that are tokens left whole, a post_processor of two steps, no ``<|endoftext|>``."""
    content = copy.deepcopy(tokenizer.content)
    model, specials = content["model"], tokenizer.special_tokens
    words = [token for token in model["vocab"] if token not in specials]
    model["vocab"] = {token: id_ for id_, token in enumerate(words)}
    model["ignore_merges"] = True
    for id_, token in enumerate(content["added_tokens"], start=len(words)):
        token["id"], token["content"] = id_, LLAMA3_NAMES[token["content"]]
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLITS["GPT-4 and Llama 3"]},
        "behavior": "Isolated",
        "invert": False,
    }
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [
            BYTE_LEVEL | {"add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            template("<|begin_of_text|>", ids=ids),
        ],
    }
    return content


def make_folder(
    transformers: ModuleType,
    folder: Path,
    content: dict[str, Any],
    stops: Any,
    tokenizer_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A Llama that transformers initialised and wrote, with this tokenizer.json beside it.

    Its weights are large, so that its greedy text is not one token over and over.
    """
    vocab_size = len(
        content["model"]["vocab"].keys() | {t["content"] for t in content["added_tokens"]}
    )
    config = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": stops,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | settings)))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    known = {"tokenizer_class": "PreTrainedTokenizerFast"} | (tokenizer_settings or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    return folder


def bare(tokenizer: Tokenizer) -> tuple[Content, Any, Content]:
    """Nothing before a text; ``<|im_end|>`` ends one, as SmolLM2-Instruct has it."""
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return tokenizer.content, tokenizer.token_to_id("<|im_end|>"), names


def llama3(tokenizer: Tokenizer) -> tuple[Content, Any, Content]:
    content = like_llama3(tokenizer)
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    jinja = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|eot_id|>' }}{% endfor %}"
    return content, [ids["<|end_of_text|>"], ids["<|eot_id|>"]], names | {"chat_template": jinja}


def around(tokenizer: Tokenizer) -> tuple[Content, Any, Content]:
    """Two tokens before a text and one behind it, which generating leaves out."""
    ids = tokenizer.special_tokens
    mark = template("<|pad|>", "<|im_start|>", after=("<|im_end|>",), ids=ids)
    return tokenizer.content | {"post_processor": mark}, 0, {"eos_token": "<|endoftext|>"}


KINDS = {"bare": bare, "llama3": llama3, "around": around}


def change(folder: Path, name: str, **settings: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def stopping(model: LanguageModel) -> int:
    """The first token of its greedy text that is not there before: a stop that is reached."""
    ids = model.tokenizer.encode(model.generate(PROMPT, GREEDY))
    return next(one for at, one in enumerate(ids) if at >= 5 and one not in ids[:at])

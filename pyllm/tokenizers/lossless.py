"""Is a tokenizer one that gives every text back? The `tokenizers` library loads many that do not.

A tokenizer.json may lower the case, drop spaces, cut texts off, leave bytes out, draw merges at
random or give one id to two tokens: all of it loads, and training on it would be silently wrong.
So only the form whose losslessness can be read off the file is let in: byte-level BPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllm._checks import shown
from pyllm.tokenizers.byte_level import ALPHABET

_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TO_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS = {
    # GPT-2's, but for the digits, one a piece: how pyllm cut before it took Digits for them.
    "pyllm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "GPT-4 and Llama 3": rf"{_TO_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
    "Qwen2": rf"{_TO_LETTERS}|\p{{N}}|{_REST}",
}
"""Regular expressions that cut a text into words, as the tokenizer.json of these models has them.

Any other is refused: one that backtracks without end, such as `(a+)+$`, makes the library panic,
and its report of some sixty lines cannot be kept from the terminal.
"""


def check_lossless(content: Mapping[str, Any], vocab: Mapping[str, int]) -> None:
    """Raises ValueError unless ``decode(encode(text)) == text`` holds for every text.

    Args:
        content: what tokenizer.json holds, as the library writes it after loading.
        vocab: token to id, added tokens included, as the library has it.
    """
    model = content["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"its model is {shown(model.get('type'))}; expected BPE")
    _expect_nothing("normalizer", content["normalizer"])
    _expect_nothing("truncation", content["truncation"])
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        _expect_nothing(f"model.{name}", model[name])
    _check_split(content["pre_tokenizer"])
    decoder = (content["decoder"] or {}).get("type")
    if decoder != "ByteLevel":
        raise ValueError(f"its decoder is {shown(decoder)}; expected ByteLevel")
    _check_post_processor(content["post_processor"], len(vocab))
    _check_ids(vocab)
    missing = ALPHABET - model["vocab"].keys()
    if missing:
        raise ValueError(f"{len(missing)} of the 256 bytes have no token, one is {min(missing)!r}")
    _check_added(content["added_tokens"], model)


def _expect_nothing(name: str, value: object) -> None:
    if value:
        raise ValueError(f"its {name} is {shown(value)}, with which texts are lost; expected null")


def _check_post_processor(processor: Any, n_tokens: int) -> None:
    """Around the text, never instead of it: a template without its place gives nothing back.

    The special tokens that TemplateProcessing puts around a text are added only when asked for, and
    ByteLevel moves only offsets. Llama 3 has both, in a Sequence.
    """
    steps = [processor] if processor else []
    if steps and processor["type"] == "Sequence":
        steps = processor["processors"]
    for step in steps:
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise ValueError(
                f"its post_processor is {shown(step['type'])}; expected ByteLevel or "
                "TemplateProcessing"
            )
    for template in (step for step in steps if step["type"] == "TemplateProcessing"):
        for mark in template["special_tokens"].values():
            if max(mark["ids"], default=0) >= n_tokens:
                raise ValueError(
                    f"its post_processor puts {shown(mark['id'])} around a text, with the ids "
                    f"{shown(mark['ids'])}; expected at most {n_tokens - 1}"
                )
        single = template["single"]
        places = [piece["Sequence"]["id"] for piece in single if "Sequence" in piece]
        if places != ["A"]:
            raise ValueError(
                f"its post_processor has the text {len(places)} times in its template for one "
                "text; expected once"
            )


def _check_split(split: Any) -> None:
    """Known cuts that remove nothing, then the step that turns bytes into characters."""
    parts = split["pretokenizers"] if split and split["type"] == "Sequence" else [split or {}]
    *cuts, last = parts or [{}]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        raise ValueError(
            f"its pre_tokenizer ends with {shown(last)}; expected ByteLevel without "
            "add_prefix_space"
        )
    for cut in cuts:
        kept = cut["type"] == "Split" and cut["behavior"] != "Removed"
        if not kept and cut["type"] != "Digits":
            raise ValueError(f"its pre_tokenizer may drop text: {shown(cut)}; expected only Split")
        if cut["type"] == "Split" and cut["pattern"].get("Regex") not in SPLITS.values():
            raise ValueError(
                f"its pre_tokenizer splits at {shown(cut['pattern'])}; expected the pattern of "
                f"{', '.join(SPLITS)}"
            )


def _check_ids(vocab: Mapping[str, int]) -> None:
    """Every id from 0 to V - 1 has one token: a model has V rows, and no more."""
    given = sorted(vocab.values())
    for expected, found in enumerate(given):
        if found > expected:
            raise ValueError(
                f"its {len(given)} tokens leave the id {expected} out; expected 0 to "
                f"{len(given) - 1}, each once"
            )
        if found < expected:
            raise ValueError(f"two of its tokens share the id {found}; expected one id each")


def _check_added(added: list[dict[str, Any]], model: Mapping[str, Any]) -> None:
    """Added tokens take no space with them, and no special one can be met in ordinary text."""
    if model["ignore_merges"]:
        reached = ALPHABET | model["vocab"].keys()
    else:
        reached = ALPHABET | {left + right for left, right in model["merges"]}
    for token in added:
        name = shown(token["content"])
        if token["lstrip"] or token["rstrip"]:
            raise ValueError(f"its added token {name} swallows spaces (lstrip, rstrip)")
        # The decoder takes é for the byte 0xE9; among ASCII, a character is its own byte.
        if not token["content"].isascii() and ALPHABET.issuperset(token["content"]):
            raise ValueError(f"its added token {name} would be decoded as other bytes")
        if token["special"] and token["content"] in reached:
            raise ValueError(f"its special token {name} is also what ordinary text is encoded as")

"""A tokenizer as GGUF has it: tokens with their kinds, merges, and the name of a way to cut words.

llama.cpp does not read the regular expression that cuts a text into words. It has a list of named
ones (``tokenizer.ggml.pre``, in ``src/llama-vocab.cpp``), so a tokenizer is exported only where one
of these cuts every text so that the same tokens come out.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from sys import maxunicode
from typing import Any, NamedTuple

from pyllm._checks import shown
from pyllm.tokenizers import Tokenizer
from pyllm.tokenizers.byte_level import spell
from pyllm.tokenizers.lossless import SPLITS

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""``gguf.TokenType``."""
Merges = Sequence[Sequence[str]]

_LLAMA3 = SPLITS["GPT-4 and Llama 3"]


class Vocabulary(NamedTuple):
    """What goes under ``tokenizer.ggml``."""

    pre: str
    tokens: list[str]
    """By id, spelled with the 256 characters that stand for bytes."""
    kinds: list[int]
    merges: list[str]
    """Two tokens with a space between them, the first to be merged first."""


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary with ``size`` ids; those beyond the tokenizer's are unused.

    Raises:
        ValueError: llama.cpp would cut some text into other tokens.
    """
    content = tokenizer.content
    model = content["model"]
    merges: Merges = model["merges"]
    pre = _pre_tokenizer(content["pre_tokenizer"], bool(model.get("ignore_merges")), merges)
    by_id = {id_: token for token, id_ in model["vocab"].items()}
    kinds = dict.fromkeys(by_id, NORMAL)
    for token in content["added_tokens"]:
        if token["single_word"]:
            raise ValueError(
                f"the tokenizer's token {shown(token['content'])} is one only where it is a whole "
                "word (single_word), which llama.cpp does not have; it cannot be exported to gguf"
            )
        by_id[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    tokens = [by_id.get(id_, f"[PAD{id_}]") for id_ in range(size)]
    return Vocabulary(
        pre,
        tokens,
        [kinds.get(id_, UNUSED) for id_ in range(size)],
        # llama.cpp insists on a list with an item. This merge, of nothing and nothing, is none.
        [f"{left} {right}" for left, right in merges] or [""],
    )


def _pre_tokenizer(split: Mapping[str, Any], ignore_merges: bool, merges: Merges) -> str:
    """Name of llama.cpp's way to cut that is the tokenizer's."""
    parts = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    *cuts, last = parts
    # ByteLevel cuts by GPT-2's expression, if it is told to.
    steps = [_step(cut) for cut in cuts] + ([SPLITS["GPT-2"]] if last["use_regex"] else [])
    names: dict[tuple[tuple[str | None, ...], bool], str] = {
        # The cut, and whether a word that is a token is left whole, merges or not.
        ((SPLITS["pyllm"],), False): "gpt-2",
        ((SPLITS["GPT-2"],), False): "gpt-2",
        (("digits", SPLITS["GPT-2"]), False): "smollm",
        ((SPLITS["Qwen2"],), False): "qwen2",
        ((_LLAMA3,), True): "llama-bpe",
        ((_LLAMA3,), False): "smaug-bpe",
    }
    name = names.get((tuple(steps), ignore_merges))
    if name is None:
        raise ValueError(
            f"llama.cpp cuts no text as the tokenizer does ({shown(split)}, ignore_merges "
            f"{ignore_merges}); it cannot be exported to gguf"
        )
    if steps == [SPLITS["pyllm"]]:
        _check_digits(merges)
    return name


def _step(cut: Mapping[str, Any]) -> str | None:
    if cut["type"] == "Digits":
        return "digits" if cut["individual_digits"] else None
    isolated = cut["behavior"] == "Isolated" and not cut["invert"]
    return str(cut["pattern"]["Regex"]) if isolated else None


def _check_digits(merges: Merges) -> None:
    """Is GPT-2's cut as good as pyllm's, which puts every digit into a word of its own?

    It is if no merge joins two digits: then the tokens of `` 1984`` are the same, whether it is one
    word or four. A vocabulary that was trained with pyllm's cut has none among 0 to 9. Of other
    numerals, of two bytes or more, the end of one and the beginning of the next may be joined by a
    merge that was learnt from letters.
    """
    ends, starts = _numerals()
    for left, right in merges:
        if left in ends and right in starts:
            raise ValueError(
                f"the tokenizer joins {shown(left)} and {shown(right)}, which may be of two digits "
                "that it keeps apart and llama.cpp does not; it cannot be exported to gguf"
            )


@cache
def _numerals() -> tuple[frozenset[str], frozenset[str]]:
    """Ends of numerals (a space before the whole allowed) and starts, as bytes spelled out."""
    ends, starts = set(), set()
    for code in range(maxunicode + 1):
        if unicodedata.category(chr(code)).startswith("N"):
            spelled = spell(chr(code))
            ends |= {spelled[at:] for at in range(len(spelled))} | {spell(" ") + spelled}
            starts |= {spelled[: at + 1] for at in range(len(spelled))}
    return frozenset(ends), frozenset(starts)

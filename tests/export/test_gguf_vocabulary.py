"""Which of llama.cpp's ways to cut a text is the tokenizer's, and when there is none."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from pyllm.export.gguf_vocabulary import CONTROL, UNUSED, USER_DEFINED, gguf_vocabulary
from pyllm.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from pyllm.tokenizers.byte_level import spell
from pyllm.tokenizers.lossless import SPLITS

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
GPT2_CUT = BYTE_LEVEL | {"use_regex": True}


def cut(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": SPLITS[name]},
        "behavior": "Isolated",
        "invert": False,
    } | changes


def digits(one_by_one: bool = True) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": one_by_one}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [*parts, BYTE_LEVEL]}


def changed(tokenizer: Tokenizer, split: dict[str, Any], **model: Any) -> Tokenizer:
    content = tokenizer.content | {"pre_tokenizer": split}
    content["model"] |= model
    if model.get("ignore_merges"):  # then special tokens must stand outside, as Llama 3 has them
        special = {token["content"] for token in content["added_tokens"]}
        words = [token for token in content["model"]["vocab"] if token not in special]
        content["model"]["vocab"] = {token: id_ for id_, token in enumerate(words)}
        for number, token in enumerate(content["added_tokens"]):
            token["id"] = len(words) + number
    return Tokenizer(Backend.from_str(json.dumps(content)))


KNOWN = [
    ("gpt-2", sequence(cut("pyllm")), False),
    ("gpt-2", sequence(cut("GPT-2")), False),
    ("gpt-2", GPT2_CUT, False),
    ("smollm", {"type": "Sequence", "pretokenizers": [digits(), GPT2_CUT]}, False),
    ("qwen2", sequence(cut("Qwen2")), False),
    ("llama-bpe", sequence(cut("GPT-4 and Llama 3")), True),
    ("smaug-bpe", sequence(cut("GPT-4 and Llama 3")), False),
]


@pytest.mark.parametrize(("pre", "split", "ignore_merges"), KNOWN)
def test_known_cuts(tokenizer, pre, split, ignore_merges):
    other = changed(tokenizer, split, ignore_merges=ignore_merges)
    assert gguf_vocabulary(other, other.vocab_size).pre == pre


@pytest.mark.parametrize(
    ("split", "ignore_merges"),
    [
        (sequence(cut("pyllm")), True),
        (sequence(cut("Qwen2")), True),
        (sequence(cut("GPT-2", behavior="MergedWithNext")), False),
        (sequence(cut("GPT-2", invert=True)), False),
        (sequence(digits(False), cut("GPT-2")), False),
        (sequence(cut("GPT-2"), digits()), False),
        (sequence(), False),
        (sequence(digits()), False),
    ],
)
def test_any_other_cut_is_refused(tokenizer, split, ignore_merges):
    other = changed(tokenizer, split, ignore_merges=ignore_merges)
    with pytest.raises(ValueError, match="llama.cpp cuts no text as the tokenizer does .*ignore_m"):
        gguf_vocabulary(other, other.vocab_size)


def test_the_cut_of_gpt_2_serves_for_pyllms(tokenizer, shared_data):
    """Where no merge joins digits, though it cuts elsewhere."""
    ours = changed(tokenizer, sequence(cut("pyllm")))
    gguf_vocabulary(ours, ours.vocab_size)
    theirs = changed(tokenizer, GPT2_CUT)
    texts = ["In 1984, 3.14159  it's 12345 of  67! \u0663\u0664\u0665 \u00bd\u00bd \u216b\u2468"]
    torture = [shared_data / "tokenizer" / name for name in ("blns.txt", "UTF-8-test.txt")]
    texts += [path.read_text(encoding="utf-8", errors="replace") for path in torture]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    ("left", "right", "joined"),
    [
        ("1", "2", True),
        (" 1", "9", True),
        ("\u0663", "\u0664", True),  # two Arabic digits
        (" ", "1", False),
        ("a", "1", False),
        ("1", "st", False),
        ("  1", "2", False),  # no word begins with two spaces and a digit
    ],
)
def test_merges_that_join_digits(tokenizer, left, right, joined):
    content = tokenizer.content
    model = content["model"]
    tokens, merges = list(model["vocab"]), []
    for text in (spell(left), spell(right)):
        merges += [[text[:at], text[at]] for at in range(1, len(text))]
    merges.append([spell(left), spell(right)])
    tokens += [a + b for a, b in merges if a + b not in tokens]
    model["vocab"] = {token: id_ for id_, token in enumerate(dict.fromkeys(tokens))}
    # Also halves of two digits, but only if the last merge is of two digits.
    model["merges"] += merges
    content["pre_tokenizer"] = sequence(cut("pyllm"))
    other = Tokenizer(Backend.from_str(json.dumps(content)))
    if joined:
        with pytest.raises(ValueError, match="which may be of two digits that it keeps apart"):
            gguf_vocabulary(other, other.vocab_size)
        other = changed(other, GPT2_CUT)  # which does not keep them apart
    gguf_vocabulary(other, other.vocab_size)


def test_ends_and_beginnings_of_numerals_count_too():
    """A merge of the last byte of one Arabic digit with the first of the next, as of letters."""
    tokenizer = train_bpe(["abc " * 20], 262)
    content = tokenizer.content
    half, first = spell("\u0663")[1], spell("\u0664")[0]
    content["model"]["merges"].append([half, first])
    content["model"]["vocab"][half + first] = tokenizer.vocab_size
    content["pre_tokenizer"] = sequence(cut("pyllm"))
    other = Tokenizer(Backend.from_str(json.dumps(content)))
    with pytest.raises(ValueError, match="which may be of two digits"):
        gguf_vocabulary(other, other.vocab_size)
    assert changed(other, GPT2_CUT).encode("\u0663\u0664") != other.encode("\u0663\u0664")


def test_kinds_of_tokens(tokenizer, tmp_path: Path):
    backend = Backend.from_str(json.dumps(tokenizer.content))
    backend.add_tokens(["<tool>"])
    other = Tokenizer(backend)
    vocabulary = gguf_vocabulary(other, other.vocab_size + 1)
    assert vocabulary.tokens[-2:] == ["<tool>", f"[PAD{other.vocab_size}]"]
    assert vocabulary.kinds[-2:] == [USER_DEFINED, UNUSED]
    assert vocabulary.kinds[:4] == [CONTROL] * 4
    content = other.content
    content["added_tokens"][-1]["single_word"] = True
    other = Tokenizer(Backend.from_str(json.dumps(content)))
    with pytest.raises(ValueError, match="'<tool>' is one only where it is a whole word"):
        gguf_vocabulary(other, other.vocab_size)


def test_a_vocabulary_of_bytes_has_a_merge_that_does_nothing():
    vocabulary = gguf_vocabulary(byte_tokenizer(), 260)
    assert (vocabulary.pre, vocabulary.merges) == ("smollm", [""])

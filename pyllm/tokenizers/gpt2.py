"""GPT-2's own tokenizer, from the two files that OpenAI published: vocab.bpe and encoder.json."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers

from pyllm._checks import one_line, shown
from pyllm.tokenizers.byte_level import ALPHABET, END_OF_TEXT, byte_level
from pyllm.tokenizers.guard import panic_as_value_error, read_text

REMEDY = "GPT-2's vocab.bpe and encoder.json are needed, in this order"


def read_gpt2(vocab_bpe: Path, encoder_json: Path) -> tokenizers.Tokenizer:
    """The tokenizer of these files, in the library's hands.

    Args:
        vocab_bpe: the merges, one pair a line after a `#version` line.
        encoder_json: token to id.

    Raises:
        ValueError: a file is missing or damaged, or they don't fit each other.
    """
    merges = _read_merges(vocab_bpe)
    vocab = _read_vocab(encoder_json)
    made = {left + right for left, right in merges} | ALPHABET | {END_OF_TEXT}
    if made != vocab.keys():
        odd = min(made ^ vocab.keys())
        lacking, having = (encoder_json, vocab_bpe) if odd in made else (vocab_bpe, encoder_json)
        raise ValueError(
            f"{lacking}: does not fit {having}, which alone has the token {shown(odd)}; {REMEDY}"
        )
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    try:
        with panic_as_value_error():
            return byte_level(vocab, merges, [END_OF_TEXT], split)
    except Exception as error:
        raise ValueError(
            f"{encoder_json}: does not fit {vocab_bpe} ({one_line(error)}); {REMEDY}"
        ) from error


def _read_merges(file: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in read_text(file, "file of merges", REMEDY).split("\n"):
        if line and not line.startswith("#version:"):
            left, space, right = line.partition(" ")
            if not left or not right or " " in right:
                raise ValueError(
                    f"{file}: expected two tokens a line, found {shown(line)}; {REMEDY}"
                )
            merges.append((left, right))
    return merges


def _read_vocab(file: Path) -> dict[str, int]:
    text = read_text(file, "vocabulary", REMEDY)
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({one_line(error)}); {REMEDY}") from None
    if not isinstance(vocab, dict):
        raise ValueError(f"{file}: expected an object of ids, got {shown(vocab)}; {REMEDY}")
    for token, id_ in vocab.items():
        if type(id_) is not int or not 0 <= id_ < len(vocab):
            raise ValueError(
                f"{file}: the id of {shown(token)} is {shown(id_)}; expected a whole number from "
                f"0 to {len(vocab) - 1}; {REMEDY}"
            )
    return vocab

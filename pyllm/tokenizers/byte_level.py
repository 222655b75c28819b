"""Byte-level tokenizers, as GPT-2 writes them down: what all tokenizers of the package share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from pyllm._checks import check_text, shown

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
# Pad is not the end of text: a loss that ignores padding must still learn to stop. The last two
# are ChatML's, reserved here so that a chat model keeps the vocabulary of its base.
SPECIAL_TOKENS = (END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>")

N_BYTES = 256


def _characters_of_bytes() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(N_BYTES)]


BYTE_CHARACTERS = tuple(_characters_of_bytes())
"""The character that stands for each byte in a tokenizer.json, which must be text.

A byte that prints as a character of Latin-1 stands for itself, the other 68 for U+0100, U+0101,
...: a space is written as Ġ (U+0120), and é, which is two bytes of UTF-8, as Ã©.
"""

BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}

ALPHABET = frozenset(BYTE_CHARACTERS)
"""The 256 characters that stand for the bytes."""


def spell(text: str) -> str:
    """The UTF-8 of a text, in the characters that stand for bytes."""
    return "".join(BYTE_CHARACTERS[byte] for byte in text.encode("utf-8"))


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a tokenizer.json stands for.

    A token that is not written in the alphabet, as an added token may be, stands for its UTF-8.
    """
    if ALPHABET.issuperset(token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode("utf-8")


def words_split() -> Any:
    """The cuts between words: each digit by itself, the rest as GPT-2's regular expression has it.

    Numbers are then written in one way only, and a small vocabulary is not spent on years and
    prices. llama.cpp knows exactly these cuts, under the name "smollm".
    """
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def byte_level(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    special_tokens: Sequence[str],
    split: Any = None,
) -> tokenizers.Tokenizer:
    """A tokenizer of the library from its vocabulary and merges, by default cut at `words_split`.

    The special tokens keep the ids that the vocabulary has for them. Raises what the library does
    where vocabulary and merges don't fit.
    """
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = split or words_split()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special(token) for token in special_tokens])
    return backend


def special(token: str) -> AddedToken:
    """A special token, in the library's words."""
    return AddedToken(token, special=True, normalized=False)


def check_special_tokens(special_tokens: Sequence[str]) -> list[str]:
    """Different texts, `<|endoftext|>` first.

    Raises:
        ValueError: they are not.
    """
    special_tokens = list(special_tokens)
    for token in special_tokens:
        check_text(token, "a special token")
    if special_tokens[:1] != [END_OF_TEXT] or len({*special_tokens, ""}) <= len(special_tokens):
        raise ValueError(
            f"special_tokens is {shown(special_tokens)}; expected different tokens, none empty, "
            f"{END_OF_TEXT} first"
        )
    return special_tokens

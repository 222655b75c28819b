"""Tokenizers without words: bytes; and characters, with bytes for the unknown ones.

Both are byte-level BPE like the others, so that tokenizer.json is a file everyone can load. For
bytes the list of merges is empty. For characters it puts the bytes of each known character
together and does nothing else: `…` is E2 80 A6, so it takes the merges (E2, 80) and (E280, A6).
No merge reaches across two characters, for no character of UTF-8 has the first byte of another
inside. An unknown one is left in its bytes, but for a beginning that it shares with a known one:
`—`, which is E2 80 94, becomes E280 and 94.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pyllm._checks import check_texts
from pyllm.tokenizers.bpe import check_vocab_size
from pyllm.tokenizers.byte_level import (
    BYTE_CHARACTERS,
    SPECIAL_TOKENS,
    byte_level,
    check_special_tokens,
    spell,
)
from pyllm.tokenizers.tokenizer import Tokenizer


def byte_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """One token a byte: the id of a byte is its value, the special tokens follow from 256 on.

    Raises ValueError for special tokens without `<|endoftext|>` in front or such as ordinary text
    may hold.
    """
    return _build([], check_special_tokens(special_tokens))


def train_characters(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    """One token a character of the texts, bytes for any other.

    The ids up to 255 are the bytes, and so the characters of ASCII; then come the special tokens,
    then the other characters, frequent ones first.

    Args:
        texts: the documents, read once, as a stream.
        vocab_size: at most so many ids; where they don't suffice, the rarest characters are left
            to their bytes.
        special_tokens: `<|endoftext|>` comes first.

    Raises ValueError as :func:`~pyllm.tokenizers.train_bpe` does.
    """
    special_tokens = check_special_tokens(special_tokens)
    vocab_size = check_vocab_size(vocab_size, special_tokens)
    seen: Counter[str] = Counter()
    for text in check_texts(texts):
        seen.update(text)
    if not seen:
        raise ValueError("there is no text to train a tokenizer on: every document is empty")

    room = vocab_size - len(BYTE_CHARACTERS) - len(special_tokens)
    merges: dict[tuple[str, str], None] = {}
    # Of characters that are equally frequent, the one with the smaller code point goes first.
    for character in sorted(seen, key=lambda character: (-seen[character], character)):
        spelled = spell(character)
        steps = [(spelled[:at], spelled[at]) for at in range(1, len(spelled))]
        new = [step for step in steps if step not in merges]
        if len(merges) + len(new) > room:
            break
        merges.update(dict.fromkeys(new))
    return _build(list(merges), special_tokens)


def _build(merges: list[tuple[str, str]], special_tokens: list[str]) -> Tokenizer:
    tokens = [*BYTE_CHARACTERS, *special_tokens, *(left + right for left, right in merges)]
    # A special token that ordinary text is encoded as is here twice; Tokenizer refuses it.
    vocab = {token: id_ for id_, token in enumerate(dict.fromkeys(tokens))}
    return Tokenizer(byte_level(vocab, merges, special_tokens))

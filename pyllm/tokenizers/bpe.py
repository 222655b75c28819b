"""Training a byte-level BPE tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import tokenizers
from tokenizers import trainers

from pyllm._checks import check_choice, check_size, check_texts
from pyllm.tokenizers.bpe_trainer import MAX_TOKEN_BYTES, MIN_COUNT, count_words, learn_merges
from pyllm.tokenizers.byte_level import (
    ALPHABET,
    N_BYTES,
    SPECIAL_TOKENS,
    byte_level,
    check_special_tokens,
    special,
    words_split,
)
from pyllm.tokenizers.guard import panic_as_value_error
from pyllm.tokenizers.tokenizer import Tokenizer

Trainer = Literal["pyllm", "tokenizers"]

# The library sets this many places aside, and ends the process where there is no room for them:
# 283 GB at 2**32. The largest vocabularies in use have about 262,000.
MAX_VOCAB_SIZE = 2**20

# Characters of a word, or of white space in a row, that a trainer is given at once.
GIANT = 1000
_GIANT_SPACE = re.compile(rf"\s{{{GIANT}}}")
_GIANT_RUN = re.compile(rf"(\S{{{GIANT}}}|\s{{{GIANT}}})")


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    trainer: Trainer = "pyllm",
) -> Tokenizer:
    """Trains byte-level BPE; the same texts give the same tokenizer, whatever the machine.

    Args:
        texts: the documents, read once, as a stream.
        vocab_size: ids wanted, special tokens and the 256 bytes included. Fewer come out when the
            texts hold too few pairs that occur twice.
        special_tokens: take the ids 0, 1, ... in this order; `<|endoftext|>` comes first.
        trainer: who learns the merges: `pyllm`, which is a page of Python
            (`pyllm/tokenizers/bpe_trainer.py`), or the `tokenizers` library. They learn the same.

    Raises ValueError for a vocabulary too small for the bytes or above 2**20, for special tokens
    without `<|endoftext|>` in front or such as ordinary text may hold, for texts that are no str,
    and for texts that are all empty.
    """
    special_tokens = check_special_tokens(special_tokens)
    vocab_size = check_vocab_size(vocab_size, special_tokens)
    check_choice("trainer", trainer, get_args(Trainer))
    documents = check_texts(texts)
    seen = False

    def pieces() -> Iterator[str]:
        nonlocal seen
        for text in documents:
            seen = seen or bool(text)
            yield from _without_giants(text)

    learn = _learn_here if trainer == "pyllm" else _learn_in_the_library
    with panic_as_value_error():
        backend = learn(pieces(), vocab_size, special_tokens)
    if not seen:
        raise ValueError("there is no text to train a tokenizer on: every document is empty")
    return Tokenizer(backend)


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str]) -> int:
    """A vocabulary with room for the bytes and the special tokens.

    Raises:
        ValueError: it has none, or is above 2**20.
    """
    vocab_size = check_size("vocab_size", vocab_size, 1, MAX_VOCAB_SIZE)
    smallest = N_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at least {smallest}, "
            f"{N_BYTES} bytes and {len(special_tokens)} special tokens"
        )
    return vocab_size


def _learn_here(
    texts: Iterable[str], vocab_size: int, special_tokens: list[str]
) -> tokenizers.Tokenizer:
    split = words_split()

    def cut(text: str) -> list[str]:
        return [word for word, _ in split.pre_tokenize_str(text)]

    alphabet = sorted(ALPHABET)
    n_merges = vocab_size - len(special_tokens) - len(alphabet)
    merges = learn_merges(count_words(texts, cut), alphabet, n_merges)
    tokens = [*special_tokens, *alphabet, *(left + right for left, right in merges)]
    # A special token that ordinary text is encoded as is here twice; Tokenizer refuses it.
    vocab = {token: id_ for id_, token in enumerate(dict.fromkeys(tokens))}
    return byte_level(vocab, merges, special_tokens)


def _learn_in_the_library(
    texts: Iterable[str], vocab_size: int, special_tokens: list[str]
) -> tokenizers.Tokenizer:
    backend = byte_level({}, [], [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        show_progress=False,
        special_tokens=[special(token) for token in special_tokens],
        initial_alphabet=sorted(ALPHABET),
        max_token_length=MAX_TOKEN_BYTES + 1,  # the library's tokens stay below it
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return backend


def _without_giants(text: str) -> Iterator[str]:
    """The text, cut within words (or runs of spaces) of over ``GIANT`` characters.

    A trainer goes through a whole word at each merge that concerns it: one word of two million
    letters, as in a file without spaces, kept the library busy for over nine minutes.
    """
    if max(map(len, text.split()), default=0) > GIANT or _GIANT_SPACE.search(text):
        yield from _GIANT_RUN.split(text)
    else:
        yield text

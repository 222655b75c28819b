"""Byte-level byte pair encoding on the `tokenizers` library.

Text becomes UTF-8 bytes, the bytes are cut into words by a regular expression, and inside each
word the most frequent neighbouring pair is merged again and again (Sennrich et al. 2016,
arXiv:1508.07909; on bytes: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"). All 256 bytes are in the vocabulary, so there is no unknown token and nothing is
normalised away: `decode(encode(text)) == text` for every string that has a UTF-8 form.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
# Pad is not the end of text: a loss that ignores padding must still learn to stop. The last two
# are ChatML's, reserved here so that a chat model keeps the vocabulary of its base.
SPECIAL_TOKENS = (END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>")

TOKENIZER_FILE = "tokenizer.json"
N_BYTES = 256

# GPT-2's split, but for the digits: one a piece, so that numbers are written in one way only and a
# small vocabulary is not spent on years and prices.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Longest token, in bytes: a ruler of 500 equals signs in the training text is not worth an id.
MAX_TOKEN_BYTES = 32


class Tokenizer:
    """Text to token ids and back.

    Wraps a `tokenizers.Tokenizer` whose added tokens hold `<|endoftext|>`; raises ValueError
    without it. Special tokens that stand in a user's text are text, unless `allow_special=True`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        end_of_text_id = backend.token_to_id(END_OF_TEXT)
        if end_of_text_id is None:
            raise ValueError(
                f"the tokenizer has no {END_OF_TEXT} token, which marks the end of a document; "
                "train one with scripts/train_tokenizer.py"
            )
        # The library cuts added tokens out of any text it is given, so that a user who types
        # <|endoftext|> ends the document. This switch turns that off; it is not saved in
        # tokenizer.json, hence set at every start.
        backend.encode_special_tokens = True
        self._backend = backend
        self.end_of_text_id: int = end_of_text_id

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def pad_id(self) -> int | None:
        """Id of `<|pad|>`, or None in a vocabulary without one (GPT-2's)."""
        return self.token_to_id(PAD)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in sorted(added.items()) if token.special}

    @cached_property
    def hash(self) -> str:
        """sha256, in hex, of the canonical JSON (sorted keys, no spaces) of the tokenizer."""
        content = json.loads(self._backend.to_str())
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_to_id(self, token: str) -> int | None:
        """Id of a token written as in tokenizer.json, or None when there is none."""
        id_: int | None = self._backend.token_to_id(token)
        return id_

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`.

        With `allow_special`, special tokens spelled out in `text` become their ids. Raises
        ValueError for a text that has no UTF-8 form (a lone surrogate).
        """
        _check_text(text)
        backend = self._special_backend if allow_special else self._backend
        return list(backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores; special tokens in them are text."""
        texts = list(texts)
        for text in texts:
            _check_text(text)
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids (a list, an array or a one-dimensional tensor).

        Special tokens are left out when `skip_special`, and written out otherwise. Bytes that are
        not UTF-8, as a model may emit them, become U+FFFD. Raises ValueError for an id outside
        the vocabulary.
        """
        ids = [int(id_) for id_ in ids]
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(id_ for id_ in ids if not 0 <= id_ < self.vocab_size)
            raise ValueError(
                f"token id {wrong} is outside the vocabulary: expected 0 to {self.vocab_size - 1}"
            )
        return str(self._backend.decode(ids, skip_special_tokens=skip_special))

    def save(self, path: str | Path) -> Path:
        """Writes tokenizer.json: to `path` if it ends in .json, else into the folder `path`.

        Returns the file's path. It appears whole or not at all.
        """
        path = Path(path)
        file = path if path.suffix == ".json" else path / TOKENIZER_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(self._backend.to_str(pretty=True))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        return file

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a folder.

        Raises ValueError, with the file's name and the remedy, where there is none, where it is
        damaged, or where it has no end-of-text token.
        """
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER_FILE
        text = _read_text(file, "tokenizer", "train one with scripts/train_tokenizer.py")
        try:
            # The library raises a bare Exception, whatever is wrong with the file.
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise ValueError(
                f"{file}: not a tokenizer.json of the tokenizers library ({error}); "
                "train a new one with scripts/train_tokenizer.py"
            ) from error
        try:
            return cls(backend)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_gpt2(cls, vocab_bpe: str | Path, encoder_json: str | Path) -> Tokenizer:
        """GPT-2's own tokenizer: 50,257 ids, `<|endoftext|>` is 50256.

        Args:
            vocab_bpe: the merges, one pair a line after a `#version` line (`vocab.bpe`).
            encoder_json: token to id (`encoder.json`).

        Raises ValueError for a file that is missing or damaged.
        """
        remedy = "GPT-2's vocab.bpe and encoder.json are needed, in this order"
        lines = _read_text(Path(vocab_bpe), "file of merges", remedy).splitlines()
        try:
            vocab = json.loads(_read_text(Path(encoder_json), "vocabulary", remedy))
        except json.JSONDecodeError as error:
            raise ValueError(f"{encoder_json}: not JSON ({error}); {remedy}") from error
        merges: list[tuple[str, str]] = []
        for line in lines:
            if line and not line.startswith("#version:"):
                left, space, right = line.partition(" ")
                if not space or not right or " " in right:
                    raise ValueError(
                        f"{vocab_bpe}: expected two tokens a line, found {line[:60]!r}; {remedy}"
                    )
                merges.append((left, right))
        try:
            model = models.BPE(vocab=vocab, merges=merges)
        except Exception as error:
            raise ValueError(f"{encoder_json}: does not fit {vocab_bpe} ({error})") from error
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend = _byte_level(model, split)
        if backend.token_to_id(END_OF_TEXT) is not None:
            backend.add_special_tokens([_special(END_OF_TEXT)])
        return cls(backend)

    @cached_property
    def _special_backend(self) -> tokenizers.Tokenizer:
        # A second one instead of flipping the switch of the first: encode stays safe in threads.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
) -> Tokenizer:
    """Trains byte-level BPE; the same texts give the same tokenizer, whatever the machine.

    Args:
        texts: the documents, read once, as a stream.
        vocab_size: ids wanted, special tokens and the 256 bytes included. Fewer come out when the
            texts hold too few pairs that occur twice.
        special_tokens: take the ids 0, 1, ... in this order; `<|endoftext|>` comes first.

    Raises ValueError for a vocabulary too small for the bytes, for special tokens without
    `<|endoftext|>` in front, and for texts that are all empty.
    """
    special_tokens = list(special_tokens)
    if special_tokens[:1] != [END_OF_TEXT] or len(set(special_tokens)) < len(special_tokens):
        raise ValueError(
            f"special_tokens is {special_tokens}; expected different tokens, {END_OF_TEXT} first"
        )
    smallest = N_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at least {smallest}, "
            f"{N_BYTES} bytes and {len(special_tokens)} special tokens"
        )
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend = _byte_level(models.BPE(), split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[_special(token) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
    )
    seen = False

    def checked() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            _check_text(text)
            seen = seen or bool(text)
            yield text

    backend.train_from_iterator(checked(), trainer=trainer)
    if not seen:
        raise ValueError("there is no text to train a tokenizer on: every document is empty")
    return Tokenizer(backend)


def _byte_level(model: Any, split: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return backend


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"a text to encode must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has no UTF-8 form: character {error.start} is {text[error.start]!r}, "
            "a lone surrogate; decode the bytes it came from with errors='replace'"
        ) from error


def _read_text(file: Path, what: str, remedy: str) -> str:
    if not file.exists():
        raise ValueError(f"{file}: no {what} there; {remedy}")
    if file.is_dir():
        raise ValueError(f"{file}: a folder, where a {what} file was expected; {remedy}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}; {remedy}") from error
    if not text.strip():
        raise ValueError(f"{file}: empty, where a {what} was expected; {remedy}")
    return text

"""Text and bytes to token ids and back, on the `tokenizers` library.

Text becomes UTF-8 bytes, the bytes are cut into words by a regular expression, and inside each
word pairs of neighbours are merged by a list that was learned before (Sennrich et al. 2016,
arXiv:1508.07909; on bytes: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"). All 256 bytes are in the vocabulary, so there is no unknown token and nothing is
normalised away: `decode(encode(text)) == text` for every string that has a UTF-8 form, and
`decode_bytes(encode_bytes(data)) == data` for every byte string.

GPT-2's tokenizer is one of these, and so are bytes and characters: their lists of merges are
empty, or just long enough to put each character together.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import tokenizers

from pyllm._checks import check_text, check_texts, one_line, shown
from pyllm._durable import write_file
from pyllm.tokenizers.byte_level import BYTE_CHARACTERS, END_OF_TEXT, PAD, token_bytes
from pyllm.tokenizers.gpt2 import read_gpt2
from pyllm.tokenizers.guard import RETRAIN, panic_as_value_error, read_text
from pyllm.tokenizers.lossless import check_lossless

TOKENIZER_FILE = "tokenizer.json"

# White space in a row that a text may hold where a pattern of the file's own cuts the words. At
# every one of 10,000,000 the pattern of Llama 3 turns back in search of a line break; the library
# then panics. GPT-2's cuts took 20,000,000.
MAX_SPACES = 5_000_000

# Python decodes a byte that is no UTF-8 to one of these when asked to ("surrogateescape").
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")


class Tokenizer:
    """Text to token ids and back.

    Wraps a `tokenizers.Tokenizer` of byte-level BPE. Special tokens that stand in a user's text
    are text, unless `allow_special=True`.

    Args:
        backend: of the library; its settings for padding and special tokens are changed.
        ends: ids of special tokens that may mark the end of a document, the first that the
            tokenizer has does; by default `<|endoftext|>`, as it does where it has none of them.
        remedy: what a message says to do about a tokenizer that is refused.

    Raises ValueError where there is no end of a document, and for a tokenizer that would not give
    every text back.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, ends: Sequence[int] = (), remedy: str = RETRAIN
    ) -> None:
        content = json.loads(backend.to_str())
        special = {
            token["id"]: token["content"] for token in content["added_tokens"] if token["special"]
        }
        end = next((id_ for id_ in ends if id_ in special), None)
        if end is None:
            end = next((id_ for id_, token in special.items() if token == END_OF_TEXT), None)
        if end is None:
            others = f", and none with an id in {shown(list(ends))}" if ends else ""
            raise ValueError(
                f"the tokenizer has no special token {END_OF_TEXT}, which marks the end of a "
                f"document{others}; {remedy}"
            )
        vocab = backend.get_vocab(with_added_tokens=True)
        try:
            check_lossless(content, vocab)
        except ValueError as error:
            raise ValueError(
                f"the tokenizer is not one that gives every text back: {error}; {remedy}"
            ) from None
        # The library cuts added tokens out of any text it is given, so that a user who types
        # <|endoftext|> ends the document. This switch turns that off; it is not saved in
        # tokenizer.json, hence set at every start.
        backend.encode_special_tokens = True
        # The library would fill the short texts of a batch up with pad tokens.
        backend.no_padding()
        self._backend = backend
        split = content["pre_tokenizer"]
        cuts = split.get("pretokenizers", [split])
        self._turns_back = any(cut["type"] == "Split" for cut in cuts)
        self.end_of_text_id: int = end

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def pad_id(self) -> int | None:
        """Id of `<|pad|>`, or None in a vocabulary without one (GPT-2's)."""
        return self.token_to_id(PAD)

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Ids that tokenizer.json puts before a text when it is asked for special tokens.

        Files of Hugging Face say so where a model was trained with them (Llama 3's
        `<|begin_of_text|>`); pyllm's own say nothing.
        """
        return self._around[0]

    @cached_property
    def suffix_ids(self) -> list[int]:
        """The same for what comes after a text."""
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        text = self.encode("x")  # one token: no merge ends or begins within a byte
        ids = list(self._backend.encode("x", add_special_tokens=True).ids)
        at = ids.index(text[0])
        return ids[:at], ids[at + len(text) :]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in sorted(added.items()) if token.special}

    @property
    def content(self) -> dict[str, Any]:
        """What tokenizer.json holds, as the `tokenizers` library writes it."""
        content: dict[str, Any] = json.loads(self._backend.to_str())
        return content

    @cached_property
    def hash(self) -> str:
        """sha256, in hex, of the canonical JSON (sorted keys, no spaces) of the tokenizer."""
        canonical = json.dumps(self.content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_to_id(self, token: str) -> int | None:
        """Id of a token written as in tokenizer.json, or None when there is none."""
        id_: int | None = self._backend.token_to_id(check_text(token, "the token"))
        return id_

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`.

        With `allow_special`, special tokens spelled out in `text` become their ids. Raises
        ValueError for a text that has no UTF-8 form (a lone surrogate), and, where a pattern of
        tokenizer.json cuts the words, for over 5,000,000 white spaces in a row.
        """
        self._check_spaces(check_text(text))
        backend = self._special_backend if allow_special else self._backend
        with panic_as_value_error():
            return list(backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores; special tokens in them are text.

        Raises ValueError for a text that is no str or has no UTF-8 form, and for a single str.
        """
        texts = list(check_texts(texts))
        for text in texts:
            self._check_spaces(text)
        with panic_as_value_error():
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_bytes(self, data: bytes, allow_special: bool = False) -> list[int]:
        """Token ids of any bytes, for `decode_bytes` to give back exactly.

        What is UTF-8 is encoded as `encode` does it; each byte that is not becomes the token of
        this one byte. Raises ValueError for what is not bytes, and as `encode` does.
        """
        if not isinstance(data, bytes):
            raise ValueError(f"the data must be bytes, not {type(data).__name__}")
        ids: list[int] = []
        parts = _NOT_UTF8.split(data.decode("utf-8", errors="surrogateescape"))
        for number, part in enumerate(parts):
            if number % 2:  # what the pattern found stands between two texts
                stray = part.encode("utf-8", errors="surrogateescape")
                ids += [self._byte_ids[byte] for byte in stray]
            elif part:
                ids += self.encode(part, allow_special)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids (a list, an array or a one-dimensional tensor).

        Special tokens are left out when `skip_special`, and written out otherwise. Bytes that are
        not UTF-8, as a model may emit them, become U+FFFD. Raises ValueError for what is no whole
        number and for an id outside the vocabulary.
        """
        ids = self._check_ids(ids)
        return str(self._backend.decode(ids, skip_special_tokens=skip_special))

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True) -> bytes:
        """The bytes of token ids, also where they are no UTF-8; else as `decode`."""
        left_out = set(self.special_tokens.values()) if skip_special else set()
        return b"".join(
            self._token_bytes[id_] for id_ in self._check_ids(ids) if id_ not in left_out
        )

    def save(self, path: str | Path) -> Path:
        """Writes tokenizer.json: to `path` if it ends in .json, else into the folder `path`.

        Returns the file's path. It appears whole or not at all.
        """
        path = Path(path)
        file = path if path.suffix == ".json" else path / TOKENIZER_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, self._backend.to_str(pretty=True))
        return file

    @classmethod
    def load(cls, path: str | Path, ends: Sequence[int] = (), remedy: str = RETRAIN) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a folder; `ends` and `remedy` as for the class.

        Raises ValueError, with the file's name and the remedy, where there is none, where it is
        damaged, where it has no end-of-text token, and where it would not give every text back.
        """
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER_FILE
        text = read_text(file, "tokenizer", remedy)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None  # the library will say so
        _check_prefix(file, content, remedy)
        _check_added_once(file, content, remedy)
        try:
            # The library raises a bare Exception, whatever is wrong with the file.
            with panic_as_value_error(remedy):
                backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise ValueError(
                f"{file}: not a tokenizer.json of the tokenizers library ({one_line(error)}); "
                f"{remedy}"
            ) from error
        try:
            return cls(backend, ends, remedy)
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
        backend = read_gpt2(Path(vocab_bpe), Path(encoder_json))
        try:
            return cls(backend)
        except ValueError as error:
            raise ValueError(f"{encoder_json}: {error}") from None

    @cached_property
    def _special_backend(self) -> tokenizers.Tokenizer:
        # A second one instead of flipping the switch of the first: encode stays safe in threads.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def _byte_ids(self) -> list[int]:
        vocab = self._backend.get_vocab(with_added_tokens=True)
        return [vocab[character] for character in BYTE_CHARACTERS]

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        vocab = self._backend.get_vocab(with_added_tokens=True)
        return [token_bytes(token) for token in sorted(vocab, key=vocab.__getitem__)]

    def _check_ids(self, ids: Iterable[int]) -> list[int]:
        try:
            found = [index(id_) for id_ in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        except TypeError:
            raise ValueError(
                f"token ids must be a list of whole numbers, got {shown(ids)}"
            ) from None
        if found and (min(found) < 0 or max(found) >= self.vocab_size):
            wrong = next(id_ for id_ in found if not 0 <= id_ < self.vocab_size)
            raise ValueError(
                f"token id {shown(wrong)} is outside the vocabulary: expected 0 to "
                f"{self.vocab_size - 1}"
            )
        return found

    def _check_spaces(self, text: str) -> None:
        if self._turns_back and len(text) > MAX_SPACES:
            longest = max((len(run[0]) for run in re.finditer(r"\s+", text)), default=0)
            if longest > MAX_SPACES:
                raise ValueError(
                    f"the text has {longest:,} white-space characters in a row; expected at most "
                    f"{MAX_SPACES:,}"
                )


def _check_prefix(file: Path, content: Any, remedy: str) -> None:
    # The library panics over one while it reads the file, before anything else can look at it.
    try:
        prefix = content["model"]["continuing_subword_prefix"]
    except (LookupError, TypeError):
        return
    if prefix:
        raise ValueError(
            f"{file}: its model.continuing_subword_prefix is {shown(prefix)}; expected null; "
            f"{remedy}"
        )


def _check_added_once(file: Path, content: Any, remedy: str) -> None:
    # The library keeps both of two, in different places, and then writes only one of them.
    try:
        counts = Counter(str(token["content"]) for token in content["added_tokens"])
    except (LookupError, TypeError):
        return
    for name, count in counts.most_common(1):
        if count > 1:
            raise ValueError(f"{file}: its added token {shown(name)} stands there twice; {remedy}")

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
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from pyllm._checks import check_size, check_text, check_texts, one_line, shown
from pyllm._durable import write_file
from pyllm.tokenizers.lossless import ALPHABET, SPLITS, check_lossless

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
# Pad is not the end of text: a loss that ignores padding must still learn to stop. The last two
# are ChatML's, reserved here so that a chat model keeps the vocabulary of its base.
SPECIAL_TOKENS = (END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>")

TOKENIZER_FILE = "tokenizer.json"
N_BYTES = 256

# White space in a row that a text may hold. At every one of 10,000,000 the pattern of Llama 3 turns
# back in search of a line break; the library then panics.
MAX_SPACES = 5_000_000

# Longest token, in bytes: a ruler of 500 equals signs in the training text is not worth an id.
MAX_TOKEN_BYTES = 32

# The library sets this many places aside, and ends the process where there is no room for them:
# 283 GB at 2**32. The largest vocabularies in use have about 262,000.
MAX_VOCAB_SIZE = 2**20

# Characters of a word, or of white space in a row, that the trainer is given at once.
GIANT = 1000
_GIANT_SPACE = re.compile(rf"\s{{{GIANT}}}")
_GIANT_RUN = re.compile(rf"(\S{{{GIANT}}}|\s{{{GIANT}}})")

RETRAIN = "train one with scripts/train_tokenizer.py"


class Tokenizer:
    """Text to token ids and back.

    Wraps a `tokenizers.Tokenizer` of byte-level BPE whose special tokens hold `<|endoftext|>`;
    raises ValueError without it, and for one that would not give every text back. Special tokens
    that stand in a user's text are text, unless `allow_special=True`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        content = json.loads(backend.to_str())
        special = [token["content"] for token in content["added_tokens"] if token["special"]]
        if END_OF_TEXT not in special:
            raise ValueError(
                f"the tokenizer has no special token {END_OF_TEXT}, which marks the end of a "
                f"document; {RETRAIN}"
            )
        vocab = backend.get_vocab(with_added_tokens=True)
        try:
            check_lossless(content, vocab)
        except ValueError as error:
            raise ValueError(
                f"the tokenizer is not one that gives every text back: {error}; {RETRAIN}"
            ) from None
        # The library cuts added tokens out of any text it is given, so that a user who types
        # <|endoftext|> ends the document. This switch turns that off; it is not saved in
        # tokenizer.json, hence set at every start.
        backend.encode_special_tokens = True
        # The library would fill the short texts of a batch up with pad tokens.
        backend.no_padding()
        self._backend = backend
        self.end_of_text_id: int = vocab[END_OF_TEXT]

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
        ValueError for a text that has no UTF-8 form (a lone surrogate), or over 5,000,000 white
        spaces in a row.
        """
        _check_spaces(check_text(text))
        backend = self._special_backend if allow_special else self._backend
        with _panic_as_value_error():
            return list(backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores; special tokens in them are text.

        Raises ValueError for a text that is no str or has no UTF-8 form, and for a single str.
        """
        texts = list(check_texts(texts))
        for text in texts:
            _check_spaces(text)
        with _panic_as_value_error():
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids (a list, an array or a one-dimensional tensor).

        Special tokens are left out when `skip_special`, and written out otherwise. Bytes that are
        not UTF-8, as a model may emit them, become U+FFFD. Raises ValueError for what is no whole
        number and for an id outside the vocabulary.
        """
        given = ids
        try:
            ids = [index(id_) for id_ in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        except TypeError:
            raise ValueError(
                f"token ids must be a list of whole numbers, got {shown(given)}"
            ) from None
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(id_ for id_ in ids if not 0 <= id_ < self.vocab_size)
            raise ValueError(
                f"token id {shown(wrong)} is outside the vocabulary: expected 0 to "
                f"{self.vocab_size - 1}"
            )
        return str(self._backend.decode(ids, skip_special_tokens=skip_special))

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
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a folder.

        Raises ValueError, with the file's name and the remedy, where there is none, where it is
        damaged, where it has no end-of-text token, and where it would not give every text back.
        """
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER_FILE
        text = _read_text(file, "tokenizer", RETRAIN)
        _check_prefix(file, text)
        try:
            # The library raises a bare Exception, whatever is wrong with the file.
            with _panic_as_value_error():
                backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise ValueError(
                f"{file}: not a tokenizer.json of the tokenizers library ({one_line(error)}); "
                f"{RETRAIN}"
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
        merges = _read_merges(Path(vocab_bpe), remedy)
        vocab = _read_vocab(Path(encoder_json), remedy)
        made = {left + right for left, right in merges} | ALPHABET | {END_OF_TEXT}
        if made != vocab.keys():
            odd = min(made ^ vocab.keys())
            lacking, having = (
                (encoder_json, vocab_bpe) if odd in made else (vocab_bpe, encoder_json)
            )
            raise ValueError(
                f"{lacking}: does not fit {having}, which alone has the token {shown(odd)}; "
                f"{remedy}"
            )
        try:
            with _panic_as_value_error():
                model = models.BPE(vocab=vocab, merges=merges)
        except Exception as error:
            raise ValueError(
                f"{encoder_json}: does not fit {vocab_bpe} ({one_line(error)}); {remedy}"
            ) from error
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend = _byte_level(model, split)
        backend.add_special_tokens([_special(END_OF_TEXT)])
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

    Raises ValueError for a vocabulary too small for the bytes or above 2**20, for special tokens
    without `<|endoftext|>` in front or such as ordinary text may hold, for texts that are no str,
    and for texts that are all empty.
    """
    special_tokens = list(special_tokens)
    for token in special_tokens:
        check_text(token, "a special token")
    if special_tokens[:1] != [END_OF_TEXT] or len({*special_tokens, ""}) <= len(special_tokens):
        raise ValueError(
            f"special_tokens is {shown(special_tokens)}; expected different tokens, none empty, "
            f"{END_OF_TEXT} first"
        )
    vocab_size = check_size("vocab_size", vocab_size, 1, MAX_VOCAB_SIZE)
    smallest = N_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at least {smallest}, "
            f"{N_BYTES} bytes and {len(special_tokens)} special tokens"
        )
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS["pyllm"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend = _byte_level(models.BPE(), split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[_special(token) for token in special_tokens],
        initial_alphabet=sorted(ALPHABET),
        max_token_length=MAX_TOKEN_BYTES,
    )
    documents = check_texts(texts)
    seen = False

    def checked() -> Iterable[str]:
        nonlocal seen
        for text in documents:
            seen = seen or bool(text)
            yield from _without_giants(text)

    with _panic_as_value_error():
        backend.train_from_iterator(checked(), trainer=trainer)
    if not seen:
        raise ValueError("there is no text to train a tokenizer on: every document is empty")
    return Tokenizer(backend)


def _without_giants(text: str) -> Iterator[str]:
    """The text, cut within words (or runs of spaces) of over ``GIANT`` characters.

    The trainer goes through a whole word at each merge that concerns it: one word of two million
    letters, as in a file without spaces, kept it busy for over nine minutes.
    """
    if max(map(len, text.split()), default=0) > GIANT or _GIANT_SPACE.search(text):
        yield from _GIANT_RUN.split(text)
    else:
        yield text


def _byte_level(model: Any, split: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return backend


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _check_spaces(text: str) -> None:
    if len(text) > MAX_SPACES:
        longest = max((len(run[0]) for run in re.finditer(r"\s+", text)), default=0)
        if longest > MAX_SPACES:
            raise ValueError(
                f"the text has {longest:,} white-space characters in a row; expected at most "
                f"{MAX_SPACES:,}"
            )


def _check_prefix(file: Path, text: str) -> None:
    # The library panics over one while it reads the file, before anything else can look at it.
    try:
        prefix = json.loads(text)["model"]["continuing_subword_prefix"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return  # no tokenizer.json, as the library will say, or one without the key
    if prefix:
        raise ValueError(
            f"{file}: its model.continuing_subword_prefix is {shown(prefix)}; expected null; "
            f"{RETRAIN}"
        )


@contextmanager
def _panic_as_value_error() -> Iterator[None]:
    # A Rust panic arrives as a BaseException, which no `except Exception` stops. Those that are
    # known are headed off, for a panic has written to the terminal by now.
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"the tokenizers library gave up ({one_line(error)}); the tokenizer is damaged: "
            f"{RETRAIN}"
        ) from None


def _read_merges(file: Path, remedy: str) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for line in _read_text(file, "file of merges", remedy).split("\n"):
        if line and not line.startswith("#version:"):
            left, space, right = line.partition(" ")
            if not left or not right or " " in right:
                raise ValueError(
                    f"{file}: expected two tokens a line, found {shown(line)}; {remedy}"
                )
            merges.append((left, right))
    return merges


def _read_vocab(file: Path, remedy: str) -> dict[str, int]:
    text = _read_text(file, "vocabulary", remedy)
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({one_line(error)}); {remedy}") from None
    if not isinstance(vocab, dict):
        raise ValueError(f"{file}: expected an object of ids, got {shown(vocab)}; {remedy}")
    for token, id_ in vocab.items():
        if type(id_) is not int or not 0 <= id_ < len(vocab):
            raise ValueError(
                f"{file}: the id of {shown(token)} is {shown(id_)}; expected a whole number from "
                f"0 to {len(vocab) - 1}; {remedy}"
            )
    return vocab


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

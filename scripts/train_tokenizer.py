"""Trains a tokenizer: python scripts/train_tokenizer.py --data train.txt."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pyllm._checks import check_size
from pyllm._cli import require_writable, run

if TYPE_CHECKING:
    from pyllm.tokenizers import Tokenizer


@dataclass
class Config:
    """Trains a tokenizer, or makes one that needs no text, and writes its tokenizer.json."""

    data: str = ""
    """Text to learn from: a .txt (documents separated by lines <|endoftext|>), .jsonl or .parquet
    file, or a data set of the Hugging Face hub as owner/name. Kinds byte and gpt2 need none."""
    kind: Literal["bpe", "char", "byte", "gpt2"] = "bpe"
    """bpe: frequent pieces of words; char: the characters of the text, and bytes for any other;
    byte: the 256 bytes; gpt2: GPT-2's, from its own two files."""
    vocab_size: int = 4096
    """Number of token ids, with the 256 bytes and the special tokens; for char the most there may
    be. Kinds byte and gpt2 have their own."""
    trainer: Literal["pyllm", "tokenizers"] = "pyllm"
    """Who learns the pieces of bpe: pyllm in plain Python, or the tokenizers library; the result
    is the same."""
    vocab_bpe: str = ""
    """For gpt2: the file of merges, vocab.bpe."""
    encoder_json: str = ""
    """For gpt2: the file of ids, encoder.json."""
    out: Path = Path("tokenizer")
    """Folder for tokenizer.json, or the file's own name if it ends in .json; the file must not
    exist."""
    text_column: str = "text"
    """Column (or JSON key) that holds the text."""

    def __post_init__(self) -> None:
        check_size("vocab_size", self.vocab_size, 260, 2**31 - 1)  # 256 bytes, 4 special tokens


def main(config: Config) -> None:
    """Trains, saves and reports."""
    check_files(config)
    named = config.out.suffix == ".json"
    require_writable(config.out.parent if named else config.out)
    refuse_existing(config.out if named else config.out / "tokenizer.json")
    n_documents = n_bytes = 0

    def counted() -> Iterator[str]:
        from pyllm.data import read_texts

        nonlocal n_documents, n_bytes
        for text in read_texts(config.data, text_column=config.text_column):
            n_documents += 1
            n_bytes += len(text.encode())
            yield text

    tokenizer = make(config, counted())
    path = tokenizer.save(config.out)
    if config.data:
        print(f"{tokenizer.vocab_size} tokens from {n_documents:,} documents ({n_bytes:,} bytes)")
    else:
        print(f"{tokenizer.vocab_size} tokens")
    if config.kind == "bpe" and tokenizer.vocab_size < config.vocab_size:
        print(f"fewer than the {config.vocab_size} asked for: the text holds no more pairs")
    print(path)


def check_files(config: Config) -> None:
    """Is there all that this kind is made from, and nothing else? Nor a flag that would do nothing.

    Raises:
        ValueError: no; names the flag.
    """
    given = {
        "--data": config.data,
        "--vocab-bpe": config.vocab_bpe,
        "--encoder-json": config.encoder_json,
    }
    needed = {"bpe": ["--data"], "char": ["--data"], "gpt2": ["--vocab-bpe", "--encoder-json"]}
    for flag, value in given.items():
        wanted = flag in needed.get(config.kind, [])
        if wanted and not value:
            raise ValueError(f"{flag} is missing; --kind {config.kind} is made from that file")
        if value and not wanted:
            raise ValueError(f"{flag} is given, but --kind {config.kind} has no use for it")
    usual = Config()
    idle = {
        "--vocab-size": config.vocab_size != usual.vocab_size and config.kind in ("byte", "gpt2"),
        "--trainer": config.trainer != usual.trainer and config.kind != "bpe",
        "--text-column": config.text_column != usual.text_column and not config.data,
    }
    for flag, does_nothing in idle.items():
        if does_nothing:
            raise ValueError(f"{flag} is given, but --kind {config.kind} has no use for it")


def refuse_existing(file: Path) -> None:
    """A model reads with the tokenizer it was trained with: another one in its place ruins it.

    Raises:
        ValueError: there is such a file.
    """
    if os.path.lexists(file):
        raise ValueError(f"{file}: already there; remove it or name another place with --out")


def make(config: Config, texts: Iterator[str]) -> "Tokenizer":
    """The tokenizer of that kind."""
    from pyllm.tokenizers import Tokenizer, byte_tokenizer, train_bpe, train_characters

    if config.kind == "byte":
        return byte_tokenizer()
    if config.kind == "gpt2":
        return Tokenizer.from_gpt2(config.vocab_bpe, config.encoder_json)
    if config.kind == "char":
        return train_characters(texts, config.vocab_size)
    return train_bpe(texts, config.vocab_size, trainer=config.trainer)


if __name__ == "__main__":
    run(main, Config)

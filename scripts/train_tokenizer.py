"""Trains a byte-level BPE tokenizer: python scripts/train_tokenizer.py --data train.txt."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyllm._checks import check_size
from pyllm._cli import require_writable, run


@dataclass
class Config:
    """Trains a byte-level BPE tokenizer and writes its tokenizer.json."""

    data: str
    """Text to learn from: a .txt (documents separated by lines <|endoftext|>), .jsonl or .parquet
    file, or a data set of the Hugging Face hub as owner/name."""
    vocab_size: int = 4096
    """Number of token ids, with the 256 bytes and the special tokens."""
    out: Path = Path("tokenizer")
    """Folder for tokenizer.json, or the file's own name if it ends in .json."""
    text_column: str = "text"
    """Column (or JSON key) that holds the text."""

    def __post_init__(self) -> None:
        check_size("vocab_size", self.vocab_size, 260, 2**31 - 1)  # 256 bytes, 4 special tokens


def main(config: Config) -> None:
    """Trains, saves and reports."""
    require_writable(config.out.parent if config.out.suffix == ".json" else config.out)
    from pyllm.data import read_texts
    from pyllm.tokenizers import train_bpe

    n_documents = n_bytes = 0

    def counted() -> Iterator[str]:
        nonlocal n_documents, n_bytes
        for text in read_texts(config.data, text_column=config.text_column):
            n_documents += 1
            n_bytes += len(text.encode())
            yield text

    tokenizer = train_bpe(counted(), config.vocab_size)
    path = tokenizer.save(config.out)
    print(f"{tokenizer.vocab_size} tokens from {n_documents:,} documents ({n_bytes:,} bytes)")
    if tokenizer.vocab_size < config.vocab_size:
        print(f"fewer than the {config.vocab_size} asked for: the text holds no more pairs")
    print(path)


if __name__ == "__main__":
    run(main, Config)

"""Fetches a data set as plain text: python scripts/download_data.py tinystories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from pyllm._checks import check_size
from pyllm._cli import require_writable, run


@dataclass
class Config:
    """Streams a data set from the Hugging Face hub into <out>/<name>/train.txt and valid.txt."""

    name: Positional[Literal["tinystories", "openwebtext"]] = "tinystories"
    """Which data set; openwebtext is large, and --max-documents takes a part of it."""
    max_documents: int | None = None
    """Documents to take of the train split; by default all of tinystories, 100,000 of
    openwebtext."""
    out: Path = Path("data")
    """Folder in which the folder <name> is made."""

    def __post_init__(self) -> None:
        if self.max_documents is not None:
            check_size("max_documents", self.max_documents, 2, 2**31 - 1)


def main(config: Config) -> None:
    """Downloads and reports."""
    folder = config.out / config.name
    require_writable(folder)
    from pyllm.data.download import download

    counts = download(config.name, folder, config.max_documents)
    for file, documents in counts.items():
        print(f"{folder / file}: {documents:,} documents")


if __name__ == "__main__":
    run(main, Config)

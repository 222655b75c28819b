"""Which text a benchmark trains on: TinyStories where it is at hand, else the embedded stories."""

import os
from pathlib import Path

from pyllm.train import DataConfig


def default_folder() -> str:
    """Where TinyStories is looked for: PYLLM_SHARED_DATA, by default ../shared/data."""
    return str(Path(os.environ.get("PYLLM_SHARED_DATA", "../shared/data")) / "tinystories")


def choose_text(folder: str, tokenizer: str = "") -> tuple[str, DataConfig]:
    """The text's name and its settings.

    Raises:
        ValueError: train.txt is there, and valid.txt is not.
    """
    train, valid = Path(folder) / "train.txt", Path(folder) / "valid.txt"
    if not train.is_file():
        print(f"{folder}: no TinyStories there; the embedded stories are trained on")
        return "embedded stories", DataConfig(tokenizer=tokenizer)
    if not valid.is_file():
        raise ValueError(f"{valid}: no such file; put it beside train.txt")
    return "TinyStories", DataConfig(data=str(train), valid=str(valid), tokenizer=tokenizer)

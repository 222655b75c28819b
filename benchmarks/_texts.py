"""Which text a benchmark trains on: TinyStories where it is at hand, else the embedded stories."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyllm.train import DataConfig


def tinystories(folder: str = "") -> "DataConfig | None":
    """TinyStories in a folder, as train.txt and valid.txt; None, and said so, if it is not there.

    Args:
        folder: where to look; empty: tinystories in PYLLM_SHARED_DATA, by default ../shared/data.

    Raises:
        ValueError: train.txt is there, and valid.txt is not.
    """
    from pyllm.train import DataConfig

    shared = Path(os.environ.get("PYLLM_SHARED_DATA", "../shared/data"))
    place = Path(folder) if folder else shared / "tinystories"
    train, valid = place / "train.txt", place / "valid.txt"
    if not train.is_file():
        print(f"{place}: no TinyStories there; only the embedded stories are trained on")
        return None
    if not valid.is_file():
        raise ValueError(f"{valid}: no such file; put it beside train.txt")
    return DataConfig(data=str(train), valid=str(valid))


def choose_text(folder: str = "") -> "tuple[str, DataConfig]":
    """The name and the settings of TinyStories, or else of the embedded stories."""
    from pyllm.train import DataConfig

    found = tinystories(folder)
    return ("embedded stories", DataConfig()) if found is None else ("TinyStories", found)

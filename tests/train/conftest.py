"""A model of a few thousand parameters, two hundred stories, and a trainer of the one on the other.

One CPU thread: for so little work more only add noise, and sums then have one order everywhere.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pyllm.data import TokenFile, write_stories, write_tokens
from pyllm.models import ModelConfig, Transformer
from pyllm.tokenizers import Tokenizer, train_bpe
from pyllm.train import DataConfig, RunConfig, TrainConfig, Trainer
from pyllm.train.checkpoint import load_checkpoint, save_checkpoint
from pyllm.train.trainer import seed_everything

TINY = ModelConfig(
    vocab_size=300, max_seq_len=1024, n_layers=2, d_model=32, n_heads=4, d_ff=32, n_experts=4
)
QUICK: dict[str, Any] = {
    "max_steps": 20,
    "batch_size": 8,
    "seq_len": 32,
    "warmup_steps": 4,
    "learning_rate": 3e-3,
    "eval_tokens": 1024,
    "dtype": "float32",
    "device": "cpu",
    "sample_every": 0,
}


class Text(NamedTuple):
    """Stories as token files."""

    tokenizer: Tokenizer
    train: TokenFile
    valid: TokenFile


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("text")
    stories = list(write_stories(200, 0, "train"))
    tokenizer = train_bpe(stories, TINY.vocab_size)
    train = write_tokens(stories, tokenizer, folder / "train.bin")
    valid = write_tokens(write_stories(5, 0, "valid"), tokenizer, folder / "valid.bin")
    return Text(tokenizer, train, valid)


@pytest.fixture
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture
def quick() -> dict[str, Any]:
    """Settings of `TrainConfig` for a run of a second."""
    return dict(QUICK)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunConfig]:
    """A run of a second in a folder, from texts that are written there; its checkpoints are of
    200 kB. Keywords go to `TrainConfig`."""

    def make(folder: Path, **train: Any) -> RunConfig:
        for name, count in (("train", 60), ("valid", 3)):
            text = "\n<|endoftext|>\n".join(write_stories(count, 0, name))
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        return RunConfig(
            out=str(folder / "whole"),
            model=ModelConfig(vocab_size=300, max_seq_len=1024, n_layers=1, d_model=16, d_ff=16),
            data=DataConfig(data=str(folder / "train.txt"), valid=str(folder / "valid.txt")),
            train=TrainConfig(
                batch_size=2,
                seq_len=16,
                warmup_steps=2,
                eval_tokens=32,
                dtype="float32",
                device="cpu",
                threads=1,
                **train,
            ),
        )

    return make


@pytest.fixture
def make_trainer(text: Text, tmp_path: Path) -> Callable[..., Trainer]:
    """A new trainer with the same weights each time; keywords go to `TrainConfig`."""

    def make(model: ModelConfig = TINY, **train: Any) -> Trainer:
        config = TrainConfig(**(QUICK | train))
        seed_everything(config.seed)
        return Trainer(
            model=Transformer(model),
            tokenizer=text.tokenizer,
            train_file=text.train,
            valid_file=text.valid,
            config=config,
            folder=tmp_path,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    return make


@pytest.fixture(scope="session")
def save() -> Callable[[Trainer, Path], None]:
    """Write a trainer's checkpoint into a folder."""

    def save(trainer: Trainer, folder: Path) -> None:
        save_checkpoint(
            folder,
            trainer.model,
            trainer.tokenizer,
            trainer.optimizers,
            trainer.scaler,
            trainer.progress,
            trainer.settings,
        )

    return save


@pytest.fixture(scope="session")
def load() -> Callable[[Trainer, Path], None]:
    """Read a checkpoint into a trainer."""

    def load(trainer: Trainer, folder: Path) -> None:
        trainer.progress = load_checkpoint(
            folder, trainer.model, trainer.optimizers, trainer.scaler, trainer.settings
        )

    return load

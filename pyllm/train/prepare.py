"""From text to token files: what has to be there before the first step."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from pyllm.data import (
    TokenFile,
    read_texts,
    sidecar_path,
    split_documents,
    story_windows,
    write_stories,
    write_tokens,
)
from pyllm.data.packing import MAX_TOKENS
from pyllm.models import ModelConfig
from pyllm.tokenizers import Tokenizer, byte_tokenizer, train_bpe, train_characters
from pyllm.train.adamw8bit import require_adamw8bit
from pyllm.train.config import DataConfig, RunConfig, TrainConfig

VALID_STORIES = 500
VALID_SHARE = 0.02


@dataclass(frozen=True)
class Text:
    """The documents of a run and their tokenizer. ``train`` and ``valid`` start anew each call."""

    data: DataConfig
    seed: int
    tokenizer: Tokenizer

    def train(self) -> Iterable[str]:
        """Training documents."""
        return documents(self.data, self.seed, "train")

    def valid(self) -> Iterable[str]:
        """Validation documents."""
        return documents(self.data, self.seed, "valid")


def documents(data: DataConfig, seed: int, split: str) -> Iterable[str]:
    """The documents of one split: embedded stories, a file of its own, or a share held out."""
    if not data.data:
        n = data.n_stories if split == "train" else VALID_STORIES
        return write_stories(n, seed, split)
    if data.valid:
        return read_texts(
            data.data if split == "train" else data.valid, None, True, data.text_column
        )
    texts = list(read_texts(data.data, None, True, data.text_column))
    try:
        parts = split_documents(texts, VALID_SHARE, seed)
    except ValueError as error:
        raise ValueError(f"{data.data}: {error} (--valid)") from None
    return parts[0] if split == "train" else parts[1]


def check_batch(train: TrainConfig) -> None:
    """Could there be such a batch? Asked before any time is spent on the text.

    Raises:
        ValueError: no; names the flags.
    """
    if train.batch_size * train.seq_len > MAX_TOKENS:
        raise ValueError(
            f"--train.batch-size {train.batch_size:,} x --train.seq-len {train.seq_len:,} is too "
            f"large: expected at most {MAX_TOKENS:,} tokens in a batch; lower one of them"
        )


def check_optimizer(train: TrainConfig) -> None:
    """Is the library there that it comes from?

    Raises:
        ValueError: no; says how to get it.
    """
    if train.optimizer == "adamw8bit":
        require_adamw8bit()


def check_length(train_file: TokenFile, config: RunConfig) -> None:
    """Does the text fill one sequence?

    Raises:
        ValueError: no; names the text and the flags.
    """
    if len(train_file) < config.train.seq_len:
        raise ValueError(
            f"{config.data.data or 'the embedded stories'}: {len(train_file):,} training tokens, "
            f"but one block needs {config.train.seq_len:,}; give more text "
            f"({'--data' if config.data.data else '--n-stories'}) or a smaller --train.seq-len"
        )


def tokenizer_place(given: str) -> Path:
    """Where the tokenizer lies; a run keeps its own among its tokens."""
    place, of_run = Path(given), Path(given, "tokens", "tokenizer.json")
    return of_run if of_run.is_file() and not (place / "tokenizer.json").exists() else place


def prepare_text(config: RunConfig, folder: Path) -> Text:
    """Find, make or train the tokenizer; a resumed run reads its own, if it got so far.

    Raises:
        ValueError: data that is not there, before any time is spent on the rest; or, of a resumed
            run, a tokenizer that is no longer the model's.
    """
    if config.data.valid:
        documents(config.data, config.train.seed, "valid")  # refuses a file that is not there
    saved = folder / "tokens" / "tokenizer.json"
    if config.resume and saved.exists():
        tokenizer = Tokenizer.load(saved)
    elif config.data.tokenizer == "byte":
        tokenizer = byte_tokenizer()
    elif config.data.tokenizer not in ("", "char"):
        tokenizer = Tokenizer.load(tokenizer_place(config.data.tokenizer))
    else:
        train = train_characters if config.data.tokenizer else train_bpe
        texts = documents(config.data, config.train.seed, "train")
        tokenizer = train(texts, config.model.vocab_size)
    if config.resume and tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, but the run in {folder} began with "
            f"{config.model.vocab_size:,}: its text or its tokenizer has changed since; start a "
            "new run"
        )
    return Text(config.data, config.train.seed, tokenizer)


def prepare_tokens(text: Text, folder: Path, resume: bool) -> tuple[TokenFile, TokenFile]:
    """Token files of both splits in the run folder; a resumed run takes what it finds there.

    Raises:
        ValueError: what is there is damaged.
        OSError: the disk is full or the folder cannot be written.
    """
    place = folder / "tokens"
    place.mkdir(parents=True, exist_ok=True)
    for leftover in place.glob("*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    if not resume or not (place / "tokenizer.json").exists():
        text.tokenizer.save(place / "tokenizer.json")
    files = []
    for split, texts in (("train", text.train), ("valid", text.valid)):
        path = place / f"{split}.bin"
        if resume and path.exists() and sidecar_path(path).exists():
            try:
                file = TokenFile.open(path, verify=True)
                file.require_tokenizer(text.tokenizer)
            except ValueError as error:
                raise ValueError(f"{error} (delete it, and --resume writes it again)") from None
        else:
            file = write_tokens(texts(), text.tokenizer, path)
        files.append(file)
    return files[0], files[1]


def fit_model(config: RunConfig, tokenizer: Tokenizer, console: Console) -> RunConfig:
    """Give the model the tokenizer's vocabulary, and say so."""
    model = config.model
    if tokenizer.vocab_size != model.vocab_size:
        console.print(
            f"vocabulary: {model.vocab_size:,} in the preset, {tokenizer.vocab_size:,} in the "
            "tokenizer; the model takes the tokenizer's"
        )
        config = replace(config, model=replace(model, vocab_size=tokenizer.vocab_size))
    return config


def fits_val_bpb(model: ModelConfig, text: Text, console: Console) -> bool:
    """Is the context long enough to score 1,024 bytes at once? Said now, not after training."""
    longest = max(len(ids) for ids, _ in story_windows(text.valid(), text.tokenizer))
    if longest > model.max_seq_len:
        console.print(
            f"val_bpb will be left out: 1,024 bytes of the validation text are up to {longest} "
            f"tokens, and the context is {model.max_seq_len} (--model.max-seq-len)"
        )
    return longest <= model.max_seq_len

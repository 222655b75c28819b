"""The settings of a training run, one frozen dataclass per concern. Needs no torch."""

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Literal, get_args

from tyro.conf import arg

from pyllm._checks import check_size, check_text, is_finite, shown
from pyllm.models.config import ModelConfig

MOST = 2**31 - 1
"""Of anything that is counted here: more is a slip of the keyboard, and overflows further down."""
LARGEST_NUMBER = 1e6
"""Of any rate or weight: beyond lie slips of the keyboard, and numbers no float32 can hold."""
_LIMITS = {"seed": 2**32 - 1, "threads": 1024}  # NumPy's seeds; more threads than any machine
_AT_LEAST_ONE = (
    "max_steps",
    "batch_size",
    "accumulation",
    "seq_len",
    "eval_every",
    "eval_tokens",
    "save_every",
)


@dataclass(frozen=True)
class TrainConfig:
    """How to train: schedule, optimiser, precision. Everything is counted in steps.

    Raises:
        ValueError: a setting that cannot work.
    """

    max_steps: int = 360
    """Optimiser steps."""
    batch_size: int = 24
    """Sequences in a micro-batch."""
    accumulation: int = 1
    """Micro-batches in a step; their gradients are averaged."""
    auto_batch: bool = True
    """On a CUDA device, cut the preset's batch_size x accumulation sequences of a step into the
    largest micro-batches that a memory estimate says fit. Other sizes than the preset's stay."""
    seq_len: int = 320
    """Tokens in a sequence."""
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "muon"
    """muon (matrices; AdamW for the rest), adamw, or adamw8bit: a state of 8 bits for the matrices,
    from bitsandbytes, a quarter of adamw's memory (pip install 'pyllm[gpu]')."""
    learning_rate: float = 1e-2
    """Peak learning rate."""
    min_lr_ratio: float = 0.05
    """Final learning rate as a share of the peak (cosine)."""
    warmup_steps: int = 50
    """Steps of linear warmup."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    balance_coef: float = 0.01
    """Weight of the load-balancing loss (Switch Transformer's 1e-2)."""
    bias_rate: float = 0.001
    """How far a step moves each bias of a model with --model.router-bias (DeepSeek-V3's 1e-3); give
    --train.balance-coef 0 to balance by it alone."""
    z_coef: float = 0.001
    """Weight of the router's z-loss (ST-MoE's 1e-3)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; auto: bfloat16 where it is fast, else float16 with loss
    scaling on a GPU, else float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto: cuda, then mps, then cpu."""
    threads: int = 0
    """CPU threads; 0 for PyTorch's choice."""
    recompute: bool = False
    """Keep only each block's input and compute the rest again in the backward: less memory."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    eval_every: int = 60
    """Steps between evaluations on the fixed validation set."""
    eval_tokens: int = 32_768
    """Tokens of that set."""
    save_every: int = 60
    """Steps between checkpoints."""
    sample_every: int = 120
    """Steps between sample stories; 0 for none."""

    def __post_init__(self) -> None:
        for item in fields(self):
            name, value = f"train.{item.name}", getattr(self, item.name)
            if item.type is int:
                least = int(item.name in _AT_LEAST_ONE)
                check_size(name, value, least, _LIMITS.get(item.name, MOST))
            elif item.type is float:
                if not is_finite(value) or not 0 <= value <= LARGEST_NUMBER:
                    raise ValueError(
                        f"{name} must be a number from 0 to {LARGEST_NUMBER:,.0f}, "
                        f"got {shown(value)}"
                    )
            elif item.type is bool:
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be true or false, got {shown(value)}")
            elif value not in get_args(item.type):
                choices = ", ".join(get_args(item.type))
                raise ValueError(f"{name} must be one of {choices}, got {shown(value)}")
        if self.learning_rate == 0:
            raise ValueError("train.learning_rate must be positive, got 0.0")
        if not self.beta1 < 1 or not self.beta2 < 1 or not self.min_lr_ratio <= 1:
            raise ValueError(
                f"train.beta1 and beta2 must be below 1 and min_lr_ratio at most 1, got "
                f"{self.beta1}, {self.beta2} and {self.min_lr_ratio}"
            )
        if self.batch_size * self.seq_len > MOST:
            raise ValueError(
                f"train.batch_size x train.seq_len must be at most {MOST:,} tokens, got "
                f"{self.batch_size} x {self.seq_len}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimiser step."""
        return self.batch_size * self.accumulation * self.seq_len


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Raises:
        ValueError: settings that do not go together, or are of another type.
    """

    data: str = ""
    """Text to train on: .txt (stories end with a line <|endoftext|>), .jsonl, .parquet, or a
    dataset of the hub such as roneneldan/TinyStories. Empty: the embedded stories."""
    valid: str = ""
    """Text to validate on; empty: 2% of the training documents are held out."""
    tokenizer: str = ""
    """A tokenizer.json, or a folder with one; byte: the 256 bytes; char: the characters of the
    training text; empty: pieces of words, learned from the training text."""
    n_stories: int = 20_000
    """How many embedded stories to write."""
    text_column: str = "text"
    """The column of .jsonl, .parquet and hub data that holds the text."""

    def __post_init__(self) -> None:
        for name in ("data", "valid", "tokenizer", "text_column"):
            check_text(getattr(self, name), name)
        check_size("n_stories", self.n_stories, 1, MOST)
        if self.valid and not self.data:
            raise ValueError("valid is given without data; give the training text too")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: the model, the data, the training.

    Raises:
        ValueError: the sequences are longer than the model's context.
    """

    preset: str = "moe-tiny"
    """Which model; its settings are the defaults of --model and --train."""
    out: str = ""
    """Run folder; empty: runs/<preset>-<date>-<time>."""
    resume: str = ""
    """A run folder to go on with; all other settings are read from it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    data: Annotated[DataConfig, arg(name="")] = field(default_factory=DataConfig)
    """The text; its flags carry no prefix: --data FILE --valid FILE."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""

    def __post_init__(self) -> None:
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"train.seq_len ({self.train.seq_len}) exceeds the model's context: lower it, or "
                f"raise model.max_seq_len (now {self.model.max_seq_len})"
            )


TRAIN_PRESETS: dict[str, TrainConfig] = {
    "moe-tiny": TrainConfig(),
    "moe-158m-gpt": TrainConfig(
        max_steps=5000,
        batch_size=4,
        accumulation=8,
        seq_len=512,
        learning_rate=3e-3,
        warmup_steps=200,
        eval_every=200,
        save_every=200,
        sample_every=500,
        recompute=True,
    ),
}
# The larger a model, the smaller its best learning rate; published runs of 1B and 3B take 3e-4 with
# AdamW. None of the presets from dense-50m up has been trained to the end here.
TRAIN_PRESETS |= dict.fromkeys(
    ("moe-158m", "dense-21m", "dense-50m", "dense-124m"), TRAIN_PRESETS["moe-158m-gpt"]
)
TRAIN_PRESETS |= dict.fromkeys(
    ("dense-500m", "dense-1b", "dense-3b"),
    replace(TRAIN_PRESETS["moe-158m-gpt"], batch_size=1, accumulation=32, learning_rate=1e-3),
)

"""Validation loss on fixed batches, and bits per byte of whole stories."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pyllm._checks import check_size, shown
from pyllm.data import story_windows
from pyllm.models import Transformer
from pyllm.models.transformer import IGNORE_INDEX
from pyllm.tokenizers import Tokenizer


class BitsPerByte(NamedTuple):
    """The result of :func:`bits_per_byte`."""

    value: float
    """Total bits over total bytes."""
    stories: int
    tokens: int
    bytes: int


@torch.inference_mode()
def validation_loss(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: AbstractContextManager[object] | None = None,
) -> float:
    """Mean cross-entropy in nats per token over ``batches`` of (inputs, targets), (B, T) each.

    A model whose weights are not finite gives NaN: that is its loss.

    Raises:
        ValueError: a batch is no pair of tensors or does not fit the model, no target counts.
    """
    total, count = 0.0, 0
    device = model.embedding.weight.device
    with evaluating(model), autocast or nullcontext():
        for batch in batches:
            pair = isinstance(batch, tuple | list) and len(batch) == 2
            if not pair or not all(isinstance(part, Tensor) for part in batch):
                raise ValueError(
                    f"val_loss: a batch must be a pair of tensors (inputs, targets), got "
                    f"{shown(batch)}"
                )
            inputs, targets = batch
            output = model(inputs.to(device), targets.to(device), reduction="sum")
            assert output.loss is not None
            total += output.loss.item()
            count += int((targets != IGNORE_INDEX).sum())
    if count == 0:
        raise ValueError("val_loss: there is no target to score; give at least one batch with one")
    return total / count


@torch.inference_mode()
def bits_per_byte(
    model: Transformer,
    tokenizer: Tokenizer,
    stories: Iterable[str],
    autocast: AbstractContextManager[object] | None = None,
    tokens_per_batch: int = 8192,
) -> BitsPerByte:
    """``val_bpb``: how many bits the model needs per byte of text, comparable across tokenizers.

    Each story is scored from an empty context (an end-of-text token), its first 1,024 bytes cut
    back to a whole character; the end marker is not counted; total bits over total bytes.

    Raises:
        ValueError: no story, a text that is no str, a story longer than the model's context, a
            tokenizer of another vocabulary than the model's.
    """
    check_size("val_bpb: tokens_per_batch", tokens_per_batch, 1)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"val_bpb: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; use the tokenizer that was saved beside the model"
        )
    device = model.embedding.weight.device
    windows = [window for window in story_windows(stories, tokenizer) if window[1] > 0]
    if not windows:
        raise ValueError("val_bpb: the validation text holds no story")
    longest = max(len(ids) for ids, _ in windows)
    if longest > model.config.max_seq_len:
        raise ValueError(
            f"val_bpb: 1,024 bytes of text are {longest} tokens here, more than the model's "
            f"context of {model.config.max_seq_len}; use a larger vocabulary or context"
        )
    nats = 0.0
    with evaluating(model), autocast or nullcontext():
        begin = tokenizer.end_of_text_id
        pairs = [([begin, *ids[:-1]], ids) for ids, _ in windows]
        for _, inputs, targets in padded_batches(pairs, tokens_per_batch):
            output = model(inputs.to(device), targets.to(device), reduction="sum")
            assert output.loss is not None
            nats += output.loss.item()
    n_bytes = sum(size for _, size in windows)
    n_tokens = sum(len(ids) for ids, _ in windows)
    return BitsPerByte(nats / math.log(2) / n_bytes, len(windows), n_tokens, n_bytes)


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode, and the old one again afterwards, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def padded_batches(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], tokens_per_batch: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of rows of about one length: which rows, and their inputs and targets, (B, T) each.

    Args:
        rows: inputs, and the token after each. What they are padded with comes last in its row
            and has no target.
        tokens_per_batch: how much to compute at once.
    """
    waiting = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    while waiting:
        longest = len(rows[waiting[-1]][0])
        take = max(tokens_per_batch // longest, 1)
        batch, waiting = waiting[-take:], waiting[:-take]
        inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
        targets = torch.full((len(batch), longest), IGNORE_INDEX)
        for place, row in enumerate(batch):
            given, wanted = rows[row]
            inputs[place, : len(given)] = torch.tensor(given)
            targets[place, : len(wanted)] = torch.tensor(wanted)
        yield batch, inputs, targets

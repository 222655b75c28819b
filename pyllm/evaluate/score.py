"""Validation loss on fixed batches, and bits per byte of whole stories."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pyllm.data import story_windows
from pyllm.models import Transformer
from pyllm.tokenizers import Tokenizer

IGNORE = -100


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
    """Mean cross-entropy in nats per token over ``batches`` of (inputs, targets), (B, T) each."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    device = model.embedding.weight.device
    with autocast or nullcontext():
        for inputs, targets in batches:
            output = model(inputs.to(device), targets.to(device), reduction="sum")
            assert output.loss is not None
            total += output.loss.item()
            count += int((targets != IGNORE).sum())
    model.train(was_training)
    return total / max(count, 1)


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
        ValueError: no story, or a story longer than the model's context.
    """
    was_training = model.training
    model.eval()
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
    with autocast or nullcontext():
        for inputs, targets in _padded(
            [ids for ids, _ in windows], tokenizer.end_of_text_id, tokens_per_batch
        ):
            output = model(inputs.to(device), targets.to(device), reduction="sum")
            assert output.loss is not None
            nats += output.loss.item()
    model.train(was_training)
    n_bytes = sum(size for _, size in windows)
    n_tokens = sum(len(ids) for ids, _ in windows)
    return BitsPerByte(nats / math.log(2) / n_bytes, len(windows), n_tokens, n_bytes)


def _padded(
    rows: Sequence[Sequence[int]], end_of_text: int, tokens_per_batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of about one length; what is padded has no target and comes last in its row."""
    waiting = sorted(rows, key=len)
    while waiting:
        longest = len(waiting[-1])
        take = max(tokens_per_batch // longest, 1)
        batch, waiting = waiting[-take:], waiting[:-take]
        inputs = torch.full((len(batch), longest), end_of_text)
        targets = torch.full((len(batch), longest), IGNORE)
        for row, ids in enumerate(batch):
            inputs[row, 1 : len(ids)] = torch.tensor(ids[:-1])
            targets[row, : len(ids)] = torch.tensor(ids)
        yield inputs, targets

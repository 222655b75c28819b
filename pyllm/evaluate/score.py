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
from pyllm.models.folder import check_vocabulary
from pyllm.models.transformer import IGNORE_INDEX
from pyllm.tokenizers import Tokenizer


class Window(NamedTuple):
    """Tokens that are scored together."""

    inputs: Sequence[int]
    targets: Sequence[int]
    """The token after each, or ``IGNORE_INDEX``."""
    begins: bool
    """Does a document begin here?"""


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
    begin_ids: Sequence[int] | None = None,
) -> BitsPerByte:
    """``val_bpb``: how many bits the model needs per byte of text, comparable across tokenizers.

    Each story is scored from an empty context (an end-of-text token), its first 1,024 bytes cut
    back to a whole character; the end marker is not counted; total bits over total bytes. Where
    these bytes are more tokens than the model's context, they are scored in windows, each from its
    own first token.

    Args:
        model, tokenizer: of one vocabulary.
        stories: the texts; empty ones are left out.
        autocast: a context to compute in.
        tokens_per_batch: how much to compute at once.
        begin_ids: what a text begins with, by default end-of-text. Where it is nothing, the first
            token of a story follows nothing, and neither it nor its bytes are counted.

    Raises:
        ValueError: no story, a text that is no str, a tokenizer of more tokens than the model has.
    """
    check_size("val_bpb: tokens_per_batch", tokens_per_batch, 1)
    check_vocabulary("val_bpb: ", model, tokenizer)
    begin = [tokenizer.end_of_text_id] if begin_ids is None else list(begin_ids)
    device = model.embedding.weight.device
    n_stories, n_bytes, pairs = 0, 0, []
    for ids, size in story_windows(stories, tokenizer):
        counted = size - unscored_bytes(tokenizer, ids, begin)
        if counted > 0:
            n_stories, n_bytes = n_stories + 1, n_bytes + counted
            windows = cut_windows([*begin, *ids], len(begin), model.config.max_seq_len)
            pairs += [(window.inputs, window.targets) for window in windows]
    if not n_stories:
        raise ValueError("val_bpb: the validation text holds no story")
    nats, n_tokens = 0.0, 0
    with evaluating(model), autocast or nullcontext():
        for _, inputs, targets in padded_batches(pairs, tokens_per_batch):
            output = model(inputs.to(device), targets.to(device), reduction="sum")
            assert output.loss is not None
            nats += output.loss.item()
            n_tokens += int((targets != IGNORE_INDEX).sum())
    return BitsPerByte(nats / math.log(2) / n_bytes, n_stories, n_tokens, n_bytes)


def unscored_bytes(tokenizer: Tokenizer, ids: Sequence[int], begin: Sequence[int]) -> int:
    """Bytes of a text's first token where nothing stands before it to draw it from, else 0."""
    return 0 if begin else len(tokenizer.decode_bytes(ids[:1]))


def cut_windows(ids: Sequence[int], n_begin: int, context: int) -> Iterator[Window]:
    """A document, cut so that each token is a target once, those that begin it excepted.

    Args:
        ids: what it begins with and the document itself.
        n_begin: how many of them it begins with.
        context: tokens in a window.
    """
    n_unscored = max(n_begin - 1, 0)
    targets = [*[IGNORE_INDEX] * n_unscored, *ids[1 + n_unscored :]]
    for start in range(0, len(targets), context):
        end = start + context
        yield Window(ids[:-1][start:end], targets[start:end], start == 0)


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

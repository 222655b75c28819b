"""A model on a text: loss, perplexity, and the loss at each position of a context."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from pyllm._checks import check_size
from pyllm.evaluate.score import (
    Window,
    cut_windows,
    evaluating,
    padded_batches,
    unscored_bytes,
)
from pyllm.models import Transformer
from pyllm.models.folder import check_vocabulary
from pyllm.models.transformer import IGNORE_INDEX
from pyllm.tokenizers import Tokenizer


@dataclass(frozen=True)
class TextScore:
    """The result of :func:`score_text`."""

    loss: float
    """Nats per token, over every token of every document and its end."""
    tokens: int
    documents: int
    bits: float
    """Of the documents, their ends left out."""
    bytes: int
    """Of UTF-8, that ``bits`` are of."""
    position_loss: tuple[float, ...]
    """Nats per token at each position after a document's beginning, up to the context."""
    position_count: tuple[int, ...]
    """How many documents are that long."""

    @property
    def perplexity(self) -> float:
        """``exp(loss)``: among how many equally likely tokens the model wavers."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Of the whole text, comparable across tokenizers; None where all documents are empty."""
        return self.bits / self.bytes if self.bytes else None

    def buckets(self) -> Iterator[tuple[int, int, float]]:
        """``(first, end, loss)`` over positions 0, 1, 2 to 3, 4 to 7, ..., weighted by tokens."""
        first, n_positions = 0, len(self.position_loss)
        while first < n_positions:
            end = min(max(2 * first, 1), n_positions)
            yield first, end, self.loss_between(first, end)
            first = end

    def loss_between(self, first: int, end: int) -> float:
        """Nats per token over the positions from ``first`` on, before ``end``."""
        weights, losses = self.position_count[first:end], self.position_loss[first:end]
        return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


@torch.inference_mode()
def score_text(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    context: int | None = None,
    autocast: AbstractContextManager[object] | None = None,
    tokens_per_batch: int = 8192,
    begin_ids: Sequence[int] | None = None,
    count_end: bool = True,
) -> TextScore:
    """Score every token once: documents are cut into windows, each scored on its own.

    The first window of a document starts from what texts begin with, the others from their own
    first token: what lies before a window is not seen, so a longer context gives a lower loss.

    Args:
        model, tokenizer: of one vocabulary.
        documents: the texts.
        context: tokens in a window; by default the model's context.
        autocast: a context to compute in.
        tokens_per_batch: how much to compute at once.
        begin_ids: what a text begins with, by default end-of-text, as in pyllm's training. Where it
            is nothing, the first token of a document follows nothing, and is not counted.
        count_end: does end-of-text follow a document, as in pyllm's training?

    Raises:
        ValueError: no document, a context beyond the model's or too short for what texts begin
            with, a tokenizer of more tokens than the model has.
    """
    begin = [tokenizer.end_of_text_id] if begin_ids is None else list(begin_ids)
    most = model.config.max_seq_len
    context = check_size("context", most if context is None else context, max(len(begin), 1), most)
    check_size("tokens_per_batch", tokens_per_batch, 1)
    check_vocabulary("evaluate: ", model, tokenizer)
    end = [tokenizer.end_of_text_id] if count_end else []
    windows: list[Window] = []
    n_documents = n_bytes = 0
    for document in documents:
        n_documents += 1
        ids = tokenizer.encode(document)
        n_bytes += len(document.encode("utf-8")) - unscored_bytes(tokenizer, ids, begin)
        windows += cut_windows([*begin, *ids, *end], len(begin), context)
    if all(target == IGNORE_INDEX for window in windows for target in window.targets):
        raise ValueError("evaluate: there is no document to score")
    # In float64, so that millions of tokens are added up as exactly as ten.
    sums_T = torch.zeros(context, dtype=torch.float64)
    counts_T = torch.zeros(context, dtype=torch.int64)
    nats, text_nats, n_tokens = 0.0, 0.0, 0
    device = model.embedding.weight.device
    with evaluating(model), autocast or nullcontext():
        pairs = [(window.inputs, window.targets) for window in windows]
        for rows, inputs, targets in padded_batches(pairs, tokens_per_batch):
            begins_B = torch.tensor([windows[row].begins for row in rows])
            output = model(inputs.to(device), targets.to(device), reduction="none")
            assert output.loss is not None
            loss_BT = output.loss.double().cpu()
            counted_BT = targets != IGNORE_INDEX
            nats += float(loss_BT[counted_BT].sum())
            # No text holds this token: special tokens spelled out in one are text.
            is_text_BT = counted_BT & (targets != tokenizer.end_of_text_id)
            text_nats += float(loss_BT[is_text_BT].sum())
            n_tokens += int(counted_BT.sum())
            first_BT = counted_BT & begins_B.unsqueeze(1)
            length = inputs.shape[1]
            sums_T[:length] += loss_BT.where(first_BT, 0.0).sum(0)
            counts_T[:length] += first_BT.sum(0)
    first, longest = max(len(begin) - 1, 0), int((counts_T > 0).sum())
    sums_T, counts_T = sums_T[first:], counts_T[first:]
    position_loss = sums_T[:longest] / counts_T[:longest]
    return TextScore(
        loss=nats / n_tokens,
        tokens=n_tokens,
        documents=n_documents,
        bits=text_nats / math.log(2),
        bytes=n_bytes,
        position_loss=tuple(position_loss.tolist()),
        position_count=tuple(counts_T[:longest].tolist()),
    )

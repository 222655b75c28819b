"""A model on a text: loss, perplexity, and the loss at each position of a context."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pyllm._checks import check_size
from pyllm.evaluate.score import evaluating, padded_batches
from pyllm.models import Transformer
from pyllm.models.transformer import IGNORE_INDEX
from pyllm.tokenizers import Tokenizer


class Window(NamedTuple):
    """Tokens that are scored together."""

    inputs: Sequence[int]
    targets: Sequence[int]
    """The token after each."""
    begins: bool
    """Does a document begin here?"""


@dataclass(frozen=True)
class TextScore:
    """The result of :func:`score_text`."""

    loss: float
    """Nats per token, over every token of every document and its end."""
    tokens: int
    documents: int
    position_loss: tuple[float, ...]
    """Nats per token at each position after a document's beginning, up to the context."""
    position_count: tuple[int, ...]
    """How many documents are that long."""

    @property
    def perplexity(self) -> float:
        """``exp(loss)``: among how many equally likely tokens the model wavers."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

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
) -> TextScore:
    """Score every token once: documents are cut into windows, each scored on its own.

    A document begins with an end-of-text token and ends with one, as in training. The first window
    of it starts from there, the others from their own first token: what lies before a window is not
    seen, so a longer context gives a lower loss.

    Args:
        model, tokenizer: of one vocabulary.
        documents: the texts.
        context: tokens in a window; by default the model's context.
        autocast: a context to compute in.
        tokens_per_batch: how much to compute at once.

    Raises:
        ValueError: no document, a context beyond the model's, another vocabulary.
    """
    most = model.config.max_seq_len
    context = check_size("context", most if context is None else context, 1, most)
    check_size("tokens_per_batch", tokens_per_batch, 1)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"evaluate: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; use the tokenizer that was saved beside the model"
        )
    windows, n_documents = [], 0
    for document in documents:
        n_documents += 1
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(document), tokenizer.end_of_text_id]
        windows += list(_windows(ids, context))
    if not windows:
        raise ValueError("evaluate: there is no document to score")
    # In float64, so that millions of tokens are added up as exactly as ten.
    sums_T = torch.zeros(context, dtype=torch.float64)
    counts_T = torch.zeros(context, dtype=torch.int64)
    nats, n_tokens = 0.0, 0
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
            n_tokens += int(counted_BT.sum())
            first_BT = counted_BT & begins_B.unsqueeze(1)
            length = inputs.shape[1]
            sums_T[:length] += loss_BT.where(first_BT, 0.0).sum(0)
            counts_T[:length] += first_BT.sum(0)
    longest = int((counts_T > 0).sum())
    position_loss = sums_T[:longest] / counts_T[:longest]
    return TextScore(
        loss=nats / n_tokens,
        tokens=n_tokens,
        documents=n_documents,
        position_loss=tuple(position_loss.tolist()),
        position_count=tuple(counts_T[:longest].tolist()),
    )


def _windows(ids: Sequence[int], context: int) -> Iterator[Window]:
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        yield Window(window[:-1], window[1:], start == 0)

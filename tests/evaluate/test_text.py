"""Loss and loss by position against a plain loop that knows nothing of batches or padding."""

import math

import pytest
import torch
import torch.nn.functional as F

from pyllm.data import write_stories
from pyllm.evaluate import score_text
from pyllm.models import ModelConfig, Transformer
from pyllm.tokenizers import Tokenizer, train_bpe

CONFIG = ModelConfig(vocab_size=300, max_seq_len=48, n_layers=1, d_model=32, d_ff=32, n_experts=4)
DOCUMENTS = [*write_stories(3, 0), "", "x", "Once upon a time there was a fox."]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(write_stories(50, 0), 300)


def random_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from uniform, so that every mistake shows
    return model


def plain(model: Transformer, tokenizer: Tokenizer, context: int) -> tuple[list, dict]:
    """Every token's loss, and those at each place of a document's first window."""
    losses, by_position = [], {}
    for document in DOCUMENTS:
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(document), tokenizer.end_of_text_id]
        for at in range(1, len(ids)):
            start = (at - 1) // context * context
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:at]])).logits[0, -1]
            loss = F.cross_entropy(logits.double(), torch.tensor(ids[at])).item()
            losses.append(loss)
            if start == 0:
                by_position.setdefault(at - 1, []).append(loss)
    return losses, by_position


@pytest.mark.parametrize("context", [None, 7, 1])
@pytest.mark.parametrize("tokens_per_batch", [1, 100, 8192])
def test_every_token_is_scored_once(
    tokenizer: Tokenizer, context: int | None, tokens_per_batch: int
) -> None:
    model = random_model().train()
    score = score_text(
        model, tokenizer, DOCUMENTS, context=context, tokens_per_batch=tokens_per_batch
    )
    losses, by_position = plain(model.eval(), tokenizer, context or CONFIG.max_seq_len)
    assert (score.tokens, score.documents) == (len(losses), len(DOCUMENTS))
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.position_count == tuple(len(each) for each in by_position.values())
    wanted = [sum(each) / len(each) for each in by_position.values()]
    assert score.position_loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("context", [None, 5])
@pytest.mark.parametrize("begin", [[], [0], [5, 6, 7]])
@pytest.mark.parametrize("count_end", [True, False])
def test_texts_of_a_model_that_begins_and_ends_them_otherwise(
    tokenizer: Tokenizer, context: int | None, begin: list[int], count_end: bool
) -> None:
    """A token is scored where one stands before it; bits and bytes are those of the text alone."""
    model = random_model().eval()
    documents = [DOCUMENTS[0][:150], *DOCUMENTS[3:]]
    score = score_text(
        model, tokenizer, documents, context=context, begin_ids=begin, count_end=count_end
    )
    length, end = context or CONFIG.max_seq_len, tokenizer.end_of_text_id
    nats, text_nats, n_bytes, at_first = [], 0.0, 0, []
    for document in documents:
        ids = [*begin, *tokenizer.encode(document), *[end] * count_end]
        for at in range(max(len(begin), 1), len(ids)):
            start = (at - 1) // length * length
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:at]])).logits[0, -1]
            nats.append(F.cross_entropy(logits.double(), torch.tensor(ids[at])).item())
            if at == max(len(begin), 1):
                at_first.append(nats[-1])
            if not (count_end and at == len(ids) - 1):
                text_nats += nats[-1]
                n_bytes += len(tokenizer.decode_bytes([ids[at]]))
    assert (score.tokens, score.documents, score.bytes) == (len(nats), len(documents), n_bytes)
    assert score.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(text_nats / math.log(2) / n_bytes, rel=1e-5)
    assert score.position_count[0] == len(at_first)
    assert score.position_loss[0] == pytest.approx(sum(at_first) / len(at_first), rel=1e-5)
    assert all(score.position_count)


def test_empty_documents_have_no_bits_per_byte(tokenizer: Tokenizer) -> None:
    score = score_text(random_model(), tokenizer, ["", ""])
    assert (score.tokens, score.bytes, score.bits_per_byte) == (2, 0, None)
    with pytest.raises(ValueError, match="there is no document to score"):
        score_text(random_model(), tokenizer, ["", "x"], begin_ids=[], count_end=False)


def test_buckets_hold_all_positions_by_weight(tokenizer: Tokenizer) -> None:
    score = score_text(random_model(), tokenizer, DOCUMENTS)
    buckets = list(score.buckets())
    assert [(first, end) for first, end, _ in buckets[:4]] == [(0, 1), (1, 2), (2, 4), (4, 8)]
    assert buckets[-1][1] == len(score.position_loss) == 48
    nats = sum(loss * sum(score.position_count[first:end]) for first, end, loss in buckets) / sum(
        score.position_count
    )
    pairs = zip(score.position_loss, score.position_count, strict=True)
    assert nats == pytest.approx(sum(x * w for x, w in pairs) / sum(score.position_count))


def test_the_mode_of_the_model_is_left_as_it_was(tokenizer: Tokenizer) -> None:
    model = random_model().train()
    score_text(model, tokenizer, ["x"])
    assert model.training


def test_impossible_requests_are_value_errors(tokenizer: Tokenizer) -> None:
    model = random_model()
    with pytest.raises(ValueError, match="evaluate: there is no document to score"):
        score_text(model, tokenizer, [])
    with pytest.raises(ValueError, match="context must be a whole number from 1 to 48, got 49"):
        score_text(model, tokenizer, ["x"], context=49)
    with pytest.raises(ValueError, match="context must be a whole number from 2 to 48, got 1"):
        score_text(model, tokenizer, ["x"], context=1, begin_ids=[5, 6])
    with pytest.raises(ValueError, match="the tokenizer has 320 tokens and the model 300"):
        score_text(model, train_bpe(write_stories(50, 0), 320), ["x"])

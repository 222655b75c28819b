"""Bits per byte against a plain loop that knows nothing of batches, padding or chunks."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pyllm.data import read_texts, write_stories
from pyllm.evaluate import bits_per_byte, validation_loss
from pyllm.models import ModelConfig, Transformer
from pyllm.tokenizers import Tokenizer, train_bpe

CONFIG = ModelConfig(vocab_size=300, max_seq_len=1100, n_layers=2, d_model=32, d_ff=32, n_experts=4)
LONG_WORDS = "\u043f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d \U0001f600 "  # 2, 3 and 4 bytes
STORIES = [
    "Once upon a time there was a fox.",
    "x",
    "",
    *(lead + LONG_WORDS * 60 for lead in ("", "a", "ab", "abc")),  # the cut falls everywhere
    "a" * 1024,
    "b" * 1023 + "\u00e9",  # its last character straddles byte 1,024
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(write_stories(50, 0), 300)


def random_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from uniform, so that every mistake shows
    return model


def plain_bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, stories: list[str]
) -> tuple[float, int, int, int]:
    bits, n_stories, n_tokens, n_bytes = 0.0, 0, 0, 0
    model.eval()
    for story in stories:
        data = story.encode("utf-8")[:1024]
        while True:
            try:
                text = data.decode("utf-8")
                break
            except UnicodeDecodeError:
                data = data[:-1]
        if not text:
            continue
        ids = tokenizer.encode(text)
        context = torch.tensor([[tokenizer.end_of_text_id, *ids[:-1]]])
        with torch.no_grad():
            logits = model(context).logits
        nats = F.cross_entropy(logits[0].double(), torch.tensor(ids), reduction="sum").item()
        bits += nats / math.log(2)
        n_stories, n_tokens, n_bytes = n_stories + 1, n_tokens + len(ids), n_bytes + len(data)
    return bits / n_bytes, n_stories, n_tokens, n_bytes


@pytest.mark.parametrize("tokens_per_batch", [1, 700, 100_000])
def test_against_a_plain_loop(tokenizer: Tokenizer, tokens_per_batch: int) -> None:
    model = random_model()
    result = bits_per_byte(model, tokenizer, STORIES, tokens_per_batch=tokens_per_batch)
    value, *counts = plain_bits_per_byte(model, tokenizer, STORIES)
    assert list(result[1:]) == counts
    assert result.value == pytest.approx(value, rel=1e-5)


def test_the_cut_is_at_a_whole_character(tokenizer: Tokenizer) -> None:
    model = random_model()
    assert bits_per_byte(model, tokenizer, ["b" * 1023 + "\u00e9"]).bytes == 1023
    assert bits_per_byte(model, tokenizer, ["b" * 1022 + "\u00e9" + "tail"]).bytes == 1024


def test_uniform_logits_cost_log2_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    model = random_model()
    model.embedding.weight.data.zero_()  # tied: all logits are zero
    result = bits_per_byte(model, tokenizer, STORIES)
    expected = math.log2(CONFIG.vocab_size) * result.tokens / result.bytes
    assert result.value == pytest.approx(expected, rel=1e-6)


def test_real_stories(tokenizer: Tokenizer, shared_data: Path) -> None:
    stories = list(read_texts(shared_data / "tinystories" / "valid.txt"))[:8]
    model = random_model()
    result = bits_per_byte(model, tokenizer, stories)
    assert result.value == pytest.approx(
        plain_bits_per_byte(model, tokenizer, stories)[0], rel=1e-5
    )


def test_the_mode_of_the_model_is_kept(tokenizer: Tokenizer) -> None:
    model = random_model()
    for training in (True, False):
        model.train(training)
        bits_per_byte(model, tokenizer, ["a story"])
        assert model.training is training
        validation_loss(model, [(torch.zeros(1, 2).long(), torch.zeros(1, 2).long())])
        assert model.training is training
        with pytest.raises(ValueError, match="input_ids must be between 0 and 299"):
            validation_loss(model, [(torch.full((1, 2), 300), torch.zeros(1, 2).long())])
        assert model.training is training


def test_nothing_to_score(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="val_bpb: the validation text holds no story"):
        bits_per_byte(random_model(), tokenizer, ["", ""])
    nothing = torch.full((1, 3), -100)
    for batches in ([], [(nothing + 101, nothing)]):
        with pytest.raises(ValueError, match="val_loss: there is no target to score"):
            validation_loss(random_model(), batches)


IDS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IDS, IDS.t()), r"targets must have shape \(2, 3\), got \(3, 2\)"),
        ((IDS, IDS.float()), "targets must be int32 or int64, got torch.float32"),
        ((IDS, IDS - 1), "targets must be between 0 and 299, got values from -1 to -1"),
        ((IDS,), "must be a pair of tensors"),
        (IDS, "must be a pair of tensors"),
        ([1, 2], r"must be a pair of tensors \(inputs, targets\), got \[1, 2\]"),
    ],
)
def test_batches_that_do_not_fit(batch, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        validation_loss(random_model(), [batch])
    assert "\n" not in str(error.value)


def test_what_cannot_be_scored(tokenizer: Tokenizer) -> None:
    model = random_model()
    with pytest.raises(ValueError, match="must be a list or stream of str, got 'a story'"):
        bits_per_byte(model, tokenizer, "a story")
    with pytest.raises(ValueError, match="text 1 must be a str, not NoneType"):
        bits_per_byte(model, tokenizer, ["a story", None])
    with pytest.raises(ValueError, match="text 0 has no UTF-8 form"):
        bits_per_byte(model, tokenizer, ["\ud800"])
    with pytest.raises(ValueError, match="tokens_per_batch must be a whole number .*, got 0"):
        bits_per_byte(model, tokenizer, ["a story"], tokens_per_batch=0)
    with pytest.raises(ValueError, match="tokenizer has 320 tokens and the model 300; use the tok"):
        bits_per_byte(model, train_bpe(write_stories(50, 0), 320), ["a story"])


def test_a_broken_model_has_no_finite_score(tokenizer: Tokenizer) -> None:
    model = random_model()
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))
    assert math.isnan(bits_per_byte(model, tokenizer, ["a story"]).value)
    assert math.isnan(validation_loss(model, [(IDS, IDS)]))


def nats_of(model: Transformer, context: list[int], target: int) -> float:
    with torch.no_grad():
        logits = model.eval()(torch.tensor([context])).logits[0, -1]
    return F.cross_entropy(logits.double(), torch.tensor(target)).item()


@pytest.mark.parametrize("n_begin", [0, 1, 3])
def test_a_start_longer_than_the_context_is_scored_in_windows(
    tokenizer: Tokenizer, n_begin: int
) -> None:
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, max_seq_len=16))
    story = "a longer story than sixteen tokens " * 3
    begin = [tokenizer.end_of_text_id, 7, 8][:n_begin]
    ids = [*begin, *tokenizer.encode(story)]
    assert len(ids) > 33
    scored = range(max(n_begin, 1), len(ids))
    nats = sum(nats_of(model, ids[(at - 1) // 16 * 16 : at], ids[at]) for at in scored)
    n_bytes = len(story) - (0 if begin else len(tokenizer.decode(ids[:1])))
    result = bits_per_byte(model, tokenizer, [story, "b"], begin_ids=begin)
    if not begin:  # of the second story, one token, nothing is left to score
        expected, wanted = nats / math.log(2) / n_bytes, (1, len(scored), n_bytes)
    else:
        nats += nats_of(model, begin, tokenizer.encode("b")[0])
        expected, wanted = nats / math.log(2) / (n_bytes + 1), (2, len(scored) + 1, n_bytes + 1)
    assert result[1:] == wanted
    assert result.value == pytest.approx(expected, rel=1e-5)


def test_a_padded_vocabulary_is_scored(tokenizer: Tokenizer) -> None:
    model = random_model()
    small = train_bpe(["Once upon a time"], 270)
    assert small.vocab_size < CONFIG.vocab_size
    value, *_ = plain_bits_per_byte(model, small, STORIES)
    assert bits_per_byte(model, small, STORIES).value == pytest.approx(value, rel=1e-5)


def test_validation_loss_is_the_mean_over_all_tokens() -> None:
    model = random_model()
    torch.manual_seed(1)
    batches = [(torch.randint(300, (rows, 9)), torch.randint(300, (rows, 9))) for rows in (1, 3)]
    batches[1][1][0, 4:] = -100  # these count nowhere
    losses = []
    for inputs, targets in batches:
        logits = model.eval()(inputs).logits.double()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss[targets.flatten() != -100])
    expected = torch.cat(losses).mean().item()
    assert validation_loss(model, batches) == pytest.approx(expected, rel=1e-5)

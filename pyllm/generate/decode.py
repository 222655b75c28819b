"""Writing text: the prompt in one pass, then one token at a time with a kv cache."""

from collections.abc import Iterator, Sequence
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm._checks import shown
from pyllm.generate.config import SamplingConfig
from pyllm.generate.sampling import sample_token
from pyllm.generate.stream import TextStream
from pyllm.layers import KVCache
from pyllm.models import Transformer
from pyllm.tokenizers import Tokenizer


def next_logits(model: Transformer, ids_BT: Tensor, cache: KVCache) -> Tensor:
    """Run T new tokens and return the logits (B, V) of what follows the last of them.

    Only the last position is projected to the vocabulary: the logits of a prompt of 1,024 tokens
    and 50,257 words would take 0.2 GB.
    """
    x_BTD, _ = model.hidden(ids_BT, cache)
    return F.linear(x_BTD[:, -1], model.output_weight)


def checked_ids(name: str, model: Transformer, ids: Sequence[int]) -> list[int]:
    """The ids as ints.

    Args:
        name: of the function whose argument they are, for the message.

    Raises:
        ValueError: none, not whole numbers, or not in the model's vocabulary.
    """
    try:
        if any(isinstance(token, bool) for token in ids):
            raise TypeError  # which Python counts among the whole numbers
        checked = [index(token) for token in ids]
    except TypeError:
        raise ValueError(f"{name}: the ids must be whole numbers, got {shown(ids)}") from None
    if not checked:
        raise ValueError(f"{name}: expected at least one token to begin with, got none")
    wrong = [token for token in checked if not 0 <= token < model.config.vocab_size]
    if wrong:
        raise ValueError(
            f"{name}: token {shown(wrong[0])} is not in the model's vocabulary of "
            f"{model.config.vocab_size}"
        )
    return checked


@torch.inference_mode()
def generate_ids(
    model: Transformer,
    ids: Sequence[int],
    config: SamplingConfig,
    *,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow ``ids``, at most ``config.max_new_tokens``.

    When the context is full, it slides: the second half of it is run again from position 0 in an
    emptied cache, and the first half is forgotten. So a text may be longer than the context, at
    the price of one prefill for every half context. A prompt longer than the context is cut to
    its end in the same way.

    Args:
        model: where it is, is where this runs.
        ids: the prompt, at least one token.
        config: how to draw.
        stop_id: ends the text and is not yielded.

    Raises:
        ValueError: an empty prompt, an id that is not in the vocabulary, NaN in the logits.
    """
    history = checked_ids("generate_ids", model, ids)
    generator = torch.Generator()
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    device = model.embedding.weight.device
    context = model.config.max_seq_len
    cache = model.new_cache(1, min(context, len(history) + config.max_new_tokens))
    new = history
    for _ in range(config.max_new_tokens):
        if cache.length + len(new) > context:
            cache.truncate(0)
            new = history[-max(context // 2, 1) :]
        logits_1V = next_logits(model, torch.tensor([new], device=device), cache)
        token = int(sample_token(logits_1V, config, generator))
        if token == stop_id:
            return
        yield token
        history.append(token)
        new = [token]


def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str, config: SamplingConfig
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` in pieces of whole characters, until the text ends.

    The model sees an end-of-text token and then the prompt, as a text began in training; an empty
    prompt begins a new text. Special tokens spelled out in the prompt are ordinary text.

    Raises:
        ValueError: the tokenizer does not fit the model; see also :func:`generate_ids`.
    """
    stream = TextStream(tokenizer)
    for token in generate_ids(
        model, prompt_ids(model, tokenizer, prompt), config, stop_id=tokenizer.end_of_text_id
    ):
        piece = stream.push(token)
        if piece:
            yield piece
    rest = stream.end()
    if rest:
        yield rest


def generate_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, config: SamplingConfig
) -> str:
    """The whole continuation of ``prompt`` (without it); see :func:`generate`."""
    return "".join(generate(model, tokenizer, prompt, config))


def prompt_ids(model: Transformer, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """End-of-text, then the prompt: what the model is given.

    Raises:
        ValueError: the tokenizer and the model have vocabularies of different size.
    """
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; use the tokenizer that was saved beside the model"
        )
    return [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]

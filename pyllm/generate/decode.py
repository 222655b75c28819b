"""Writing text after a prompt, or after several at once: ids to ids, and text to text."""

from collections.abc import Collection, Iterator, Sequence

from pyllm.generate.config import SamplingConfig
from pyllm.generate.session import Session, checked_ids
from pyllm.generate.stream import TextStream
from pyllm.models import Transformer
from pyllm.models.folder import check_vocabulary
from pyllm.tokenizers import Tokenizer


def generate_ids(
    model: Transformer,
    ids: Sequence[int],
    config: SamplingConfig,
    *,
    stop_id: int | None = None,
    kv_cache_dtype: str = "auto",
) -> Iterator[int]:
    """Yield the tokens that follow ``ids``, at most ``config.max_new_tokens``.

    A full context slides, as :class:`Session` has it. The stop strings of ``config`` are text, and
    not looked for here.

    Args:
        model: where it is, is where this runs.
        ids: the prompt, at least one token.
        config: how to draw.
        stop_id: ends the text and is not yielded.
        kv_cache_dtype: see :class:`Session`.

    Raises:
        ValueError: an empty prompt, an id that is not in the vocabulary, NaN in the logits.
    """
    ids = checked_ids("generate_ids", model, ids)
    context = len(ids) + config.max_new_tokens
    session = Session(model, context=context, kv_cache_dtype=kv_cache_dtype)
    session.begin([ids], config, () if stop_id is None else (stop_id,))
    while session.running:
        for _, token in session.step():
            yield token


def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str, config: SamplingConfig
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` in pieces of whole characters, until the text ends.

    The model sees an end-of-text token and then the prompt, as a text began in training; an empty
    prompt begins a new text. Special tokens spelled out in the prompt are ordinary text.

    Raises:
        ValueError: the tokenizer does not fit the model; see also :func:`generate_ids`.
    """
    ids = prompt_ids(model, tokenizer, prompt)
    session = new_session(model, tokenizer, [ids], config, [tokenizer.end_of_text_id])
    for _, piece in stream_texts(session, tokenizer, [ids], config, [tokenizer.end_of_text_id]):
        yield piece


def generate_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, config: SamplingConfig
) -> str:
    """The whole continuation of ``prompt`` (without it); see :func:`generate`."""
    return "".join(generate(model, tokenizer, prompt, config))


def new_session(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    begin_ids: Sequence[int] = (),
    kv_cache_dtype: str = "auto",
) -> Session:
    """A session with as much room as these prompts and their continuations can take, up to the
    model's context; ``begin_ids`` and ``kv_cache_dtype`` as :class:`Session` has them."""
    longest = max(map(len, prompts)) + config.max_new_tokens
    return Session(model, len(prompts), longest, tokenizer.vocab_size, begin_ids, kv_cache_dtype)


def stream_texts(
    session: Session,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    stop_ids: Collection[int],
) -> Iterator[tuple[int, str]]:
    """Yield (row, piece of its continuation) as they come, each of whole characters.

    A row ends with one of ``stop_ids``, before one of ``config.stop``, or after
    ``config.max_new_tokens``. Every step of the model gives all running rows a token.

    Raises:
        ValueError: see :meth:`Session.begin` and :meth:`Session.step`.
    """
    streams = [TextStream(tokenizer, config.stop) for _ in prompts]
    session.begin(prompts, config, with_special_stops(tokenizer, config, stop_ids))
    while rows := session.running:
        drawn = dict(session.step())
        for row in rows:
            stream = streams[row]
            piece = stream.push(drawn[row]) if row in drawn else ""
            if stream.stopped:
                session.end(row)
            if row not in session.running:
                piece += stream.end()
            if piece:
                yield row, piece


def with_special_stops(
    tokenizer: Tokenizer, config: SamplingConfig, stop_ids: Collection[int]
) -> frozenset[int]:
    """These and the special tokens among ``config.stop``: in the text they would never be met, for
    special tokens are left out of it."""
    special = tokenizer.special_tokens
    return frozenset(stop_ids) | {special[text] for text in config.stop if text in special}


def prompt_ids(model: Transformer, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """End-of-text, then the prompt: what the model is given.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    check_vocabulary("", model, tokenizer)
    return [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]

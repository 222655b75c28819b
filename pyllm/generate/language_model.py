"""A model and its tokenizer as one thing that writes text: what ``pyllm.load`` gives."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch

from pyllm._checks import shown
from pyllm.generate.chat import ChatTemplate, Message
from pyllm.generate.config import SamplingConfig
from pyllm.generate.decode import new_session, prompt_ids, stream_texts
from pyllm.generate.find import DRAWING, find_model, folder_settings, pick_dtype
from pyllm.generate.session import Session, pick_cache_dtype
from pyllm.models import (
    ModelConfig,
    Transformer,
    choose_device,
    count_parameters,
    load_model,
)
from pyllm.models.device import WEIGHT_DTYPES
from pyllm.models.durable import read_json, readable_folder
from pyllm.models.ends import read_stop_ids
from pyllm.tokenizers import Tokenizer

NOT_TUNED = "this model was not fine-tuned for chat: it goes on writing, and may not answer"


class LanguageModel:
    """Writes text, from one prompt or many, and answers in a chat.

    ::

        model = pyllm.load("runs/NAME")
        model.generate("Once upon a time", max_new_tokens=50)
        for piece in model.generate("Once upon a time", stream=True):
            print(piece, end="")

    Args:
        model: the transformer, in evaluation mode.
        tokenizer: its tokenizer.
        folder: the model folder, whose settings say which tokens begin and end a text, how it is
            drawn, and how a conversation is written; without it, end-of-text does both, and there
            is no chat.
        kv_cache_dtype: of the sessions' caches: ``auto``, the model's, or ``int8``.

    Attributes:
        begin_ids: what the model is given before every prompt.
        stop_ids: the tokens that end a text.
        defaults: how to draw, unless told otherwise: as the folder's ``generation_config.json``
            has it, else those of :class:`SamplingConfig`.

    Raises:
        ValueError: the tokenizer has more tokens than the model, a file of the folder is damaged,
            or the cache's dtype is unknown.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        folder: str | Path | None = None,
        kv_cache_dtype: str = "auto",
    ) -> None:
        pick_cache_dtype(kv_cache_dtype)  # refuses an unknown one
        prompt_ids(model, tokenizer, "")  # refuses those that do not belong together
        self.model = model
        self.tokenizer = tokenizer
        self.folder = None if folder is None else Path(folder)
        self.kv_cache_dtype = kv_cache_dtype
        self.begin_ids: list[int] = [tokenizer.end_of_text_id]
        self.stop_ids: frozenset[int] = frozenset([tokenizer.end_of_text_id])
        self.defaults = SamplingConfig()
        if self.folder is not None:
            self._read_ends(readable_folder(self.folder))
            self.defaults = folder_settings(readable_folder(self.folder))

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        kv_cache_dtype: str = "auto",
    ) -> "LanguageModel":
        """See :func:`pyllm.load`; without a path, the run under runs/ that was saved last."""
        pick_cache_dtype(kv_cache_dtype)  # before a large model is read
        folder = find_model(path)
        if isinstance(dtype, torch.dtype):
            known = WEIGHT_DTYPES.items()
            dtype = next((name for name, one in known if one == dtype), str(dtype))
        place = choose_device(str(device) if isinstance(device, torch.device) else device)
        number_format = pick_dtype(dtype)
        return cls(*load_model(folder, place, number_format), folder, kv_cache_dtype)

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self.model.config

    def __repr__(self) -> str:
        parameters = count_parameters(self.config).total
        weight = self.model.embedding.weight
        kind = str(weight.dtype).removeprefix("torch.")
        return f"LanguageModel({self.folder}, {parameters:,} parameters, {kind}, {weight.device})"

    @overload
    def generate(
        self,
        prompt: str,
        config: SamplingConfig | None = None,
        *,
        stream: Literal[False] = False,
        **settings: Any,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        config: SamplingConfig | None = None,
        *,
        stream: Literal[False] = False,
        **settings: Any,
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        prompt: str,
        config: SamplingConfig | None = None,
        *,
        stream: Literal[True],
        **settings: Any,
    ) -> Iterator[str]: ...
    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        config: SamplingConfig | None = None,
        *,
        stream: Literal[True],
        **settings: Any,
    ) -> Iterator[tuple[int, str]]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        config: SamplingConfig | None = None,
        *,
        stream: bool = False,
        **settings: Any,
    ) -> str | list[str] | Iterator[str] | Iterator[tuple[int, str]]:
        """What the model writes after a prompt (which is not repeated), or after each of several.

        Several prompts, of any lengths, run side by side. Each gives what it would give alone; the
        one at place ``b`` draws with the seed ``seed + b``. A prompt longer than the model's
        context is cut to its end, as :class:`Session` has it, with a warning.

        Args:
            prompt: one text or a list of them; special tokens in it are text. An empty one begins
                a new text.
            config: the settings; by default ``defaults``.
            stream: yield the text in pieces as it comes; of several prompts, pairs of the place in
                the list and the piece.
            settings: of :class:`SamplingConfig`, instead of those in ``config``:
                ``max_new_tokens=50, temperature=0.7, stop=["The end"], seed=1``.

        Returns:
            A str, or a list of one for each prompt; with ``stream``, an iterator.

        Raises:
            ValueError: an unknown or impossible setting, a prompt that is no text, a batch that
                the machine's memory has no room for.
        """
        config = _settings(config, settings, self.defaults)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple):
            raise ValueError(f"prompt must be a text or a list of texts, got {shown(prompt)}")
        ids = [self.prompt_ids(one) for one in prompts]
        pieces: Iterator[tuple[int, str]] = iter(())
        if ids:
            session = new_session(
                self.model, self.tokenizer, ids, config, self.begin_ids, self.kv_cache_dtype
            )
            pieces = stream_texts(session, self.tokenizer, ids, config, self.stop_ids)
        if isinstance(prompt, str):
            alone = (piece for _, piece in pieces)
            return alone if stream else "".join(alone)
        if stream:
            return pieces
        texts = [""] * len(ids)
        for row, piece in pieces:
            texts[row] += piece
        return texts

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        config: SamplingConfig | None = None,
        *,
        session: Session | None = None,
        stream: Literal[False] = False,
        **settings: Any,
    ) -> str: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        config: SamplingConfig | None = None,
        *,
        session: Session | None = None,
        stream: Literal[True],
        **settings: Any,
    ) -> Iterator[str]: ...

    def chat(
        self,
        messages: Sequence[Message],
        config: SamplingConfig | None = None,
        *,
        session: Session | None = None,
        stream: bool = False,
        **settings: Any,
    ) -> str | Iterator[str]:
        """The assistant's answer to a conversation. Warns when the model never learned to.

        Nothing of the conversation is forgotten in silence: the answer ends where the session's
        context does, at the latest.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": text}``, the last one
                the user's. Special tokens in a content are text.
            config: the settings; by default ``defaults``.
            session: from :meth:`new_session`, kept for the whole conversation: then only what is
                new in ``messages`` is computed.
            stream: yield the answer in pieces as it comes.
            settings: of :class:`SamplingConfig`, instead of those in ``config``.

        Raises:
            ValueError: an unknown or impossible setting, messages of another form, so many tokens
                that the session's context has no room for an answer, a model without a chat
                template or without the tokens it needs.
        """
        config = _settings(config, settings, self.defaults)
        drawn = {} if session is None else session.answers
        ids = self.template.ids(messages, drawn)
        if not self.tuned_for_chat:
            warnings.warn(NOT_TUNED, stacklevel=2)
        session = self.new_session() if session is None else session
        room = session.context - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, and the model looks back on "
                f"{session.context}, its answer included; leave out its oldest messages"
            )
        config = replace(config, max_new_tokens=min(config.max_new_tokens, room))
        answer = self._answer(session, ids, config)
        return answer if stream else "".join(answer)

    def _answer(self, session: Session, ids: list[int], config: SamplingConfig) -> Iterator[str]:
        """Yield an answer in pieces, and remember its tokens."""
        text = ""
        stops = self.stop_ids | {self.template.end_id}
        for _, piece in stream_texts(session, self.tokenizer, [ids], config, stops):
            text += piece
            yield piece
        self.remember(session, text, session.ids[0][len(ids) :])

    def remember(self, session: Session, text: str, ids: list[int]) -> None:
        """Keep the tokens of an answer for the next turn, if they are this text and no more.

        A special token that the model drew in the middle of an answer would be one in the
        conversation, and after a stop string more was drawn than is told.
        """
        if self.tokenizer.decode(ids, skip_special=False) == text:
            session.answers[text] = ids

    def new_session(self, context: int | None = None) -> Session:
        """An empty session for one text or conversation that goes on.

        Args:
            context: see :class:`Session`.
        """
        return Session(
            self.model,
            1,
            context,
            self.tokenizer.vocab_size,
            self.begin_ids,
            self.kv_cache_dtype,
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens that the model is given for a prompt: those that begin a text, then its own.

        Raises:
            ValueError: not a text.
        """
        ids = [*self.begin_ids, *self.tokenizer.encode(prompt)]
        return ids or [self.tokenizer.end_of_text_id]

    @cached_property
    def template(self) -> ChatTemplate:
        """How a conversation becomes tokens.

        Raises:
            ValueError: the model has no chat template.
        """
        if self.folder is None:
            raise ValueError("a chat needs the template in a model folder; use pyllm.load(folder)")
        return ChatTemplate.load(readable_folder(self.folder), self.tokenizer)

    @property
    def tuned_for_chat(self) -> bool:
        """Do the folder's settings name the template's end of an answer as an end of text?

        That is how a chat model is published, for otherwise no program would stop after an answer.
        """
        return self.template.end_id in self.stop_ids

    def _read_ends(self, folder: Path) -> None:
        """Which tokens begin and end a text, from the folder's files."""
        stops = read_stop_ids(folder, self.config.vocab_size)
        if stops is not None:
            self.stop_ids = frozenset(stops)
        if read_json(folder / "config.json").get("model_type") != "pyllm":
            # pyllm's tokenizer.json does not say what its models are trained to begin with.
            self.begin_ids = self.tokenizer.prefix_ids


def _settings(
    config: SamplingConfig | None, settings: dict[str, Any], defaults: SamplingConfig
) -> SamplingConfig:
    """The settings as a whole.

    Raises:
        ValueError: an unknown one, one out of its range, or a config of another kind.
    """
    if config is None:
        # A model whose folder says greedy is not, once it is told how to draw.
        told = any(name in settings for name in DRAWING)
        config = replace(defaults, greedy=False) if told else defaults
    elif not isinstance(config, SamplingConfig):
        raise ValueError(
            f"config must be a SamplingConfig, got {shown(config)}; give single settings by name, "
            "such as max_new_tokens=50"
        )
    known = [field.name for field in fields(SamplingConfig)]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(
                f"unknown setting {name!r}; did you mean {near[0]!r}? "
                f"Known settings: {', '.join(known)}"
            )
    return replace(config, **settings)

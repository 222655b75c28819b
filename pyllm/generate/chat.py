"""Conversations as tokens: a model's own Jinja template, in which a user's words stay words."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pyllm._checks import check_text, one_line, shown
from pyllm.models.durable import check_manifest, read_json
from pyllm.models.folder import CHAT_TEMPLATE_FILE, stored_chat_template
from pyllm.models.foreign_tokenizer import named_tokens
from pyllm.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]
"""``{"role": "user", "content": "Hello"}``, as Hugging Face and OpenAI have it."""

MARK, N_MARKS = 0xDC00, 1024
"""The characters that stand for drawn answers: the low surrogates."""
_ANSWER = "the answer, wherever it stands"


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for the loss mask of fine-tuning. Here
    its contents are just that."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Turns messages into the tokens that a chat model was trained on.

    The template runs in Jinja's sandbox, with what Hugging Face gives it. Special tokens are those
    that the template writes; the same characters in a message are ordinary text, so that nobody
    can end a turn, or begin another's, from within one.

    Args:
        source: the Jinja template.
        tokenizer: its special tokens are the template's.
        names: ``bos_token`` and the like, for templates that use them.

    Raises:
        ValueError: the template is not one.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, names: Mapping[str, str] | None = None
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(check_text(source, "the chat template"))
        except (TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template is not Jinja: {one_line(error)}") from None
        self._tokenizer = tokenizer
        self._names = dict(names or {})

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template of a model folder: ``chat_template.jinja``, or in ``tokenizer_config.json``.

        Raises:
            ValueError: there is none, or a file is damaged.
        """
        config_file, own_file = folder / "tokenizer_config.json", folder / CHAT_TEMPLATE_FILE
        config: dict[str, Any] = {}
        if config_file.exists():
            check_manifest(folder, [config_file.name])
            config = read_json(config_file)
        if own_file.exists():
            check_manifest(folder, [own_file.name])
        source = stored_chat_template(folder, config)
        if isinstance(source, list):  # several, each with a name
            named = {
                one.get("name"): one.get("template") for one in source if isinstance(one, dict)
            }
            source = named.get("default")
        if not isinstance(source, str):
            raise ValueError(
                f"{folder}: no chat template there; expected chat_template in "
                f"{config_file.name}, as the trainer writes it, or a file {own_file.name}"
            )
        try:
            return cls(source, tokenizer, named_tokens(config))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    @cached_property
    def end_id(self) -> int:
        """The special token that the template writes after an answer.

        Raises:
            ValueError: it writes none that the tokenizer has.
        """
        asked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
        _, answer, after = self._render(asked, {}, add_generation_prompt=False).rpartition(_ANSWER)
        found = self._special.search(after) if answer else None
        if found is None:
            raise ValueError(
                "the chat template ends an answer with no special token that the tokenizer has, "
                "so that answers would never end; use a tokenizer that has the template's tokens, "
                "such as scripts/train_tokenizer.py trains"
            )
        return self._tokenizer.special_tokens[found[0]]

    def ids(
        self, messages: Sequence[Message], drawn: Mapping[str, Sequence[int]] | None = None
    ) -> list[int]:
        """The tokens of a conversation, up to where the assistant's answer begins.

        Args:
            messages: the last one is the user's.
            drawn: the tokens that the model drew for an answer, by the answer's text. They stand in
                its place, where the template leaves the text as it is: encoded anew, it may be cut
                into other tokens, and what a cache has of it would be computed again.

        Raises:
            ValueError: no messages, one that is not of the form ``{"role": ..., "content": ...}``,
                a last one that is not the user's, or the template refuses them.
        """
        messages = checked_messages(messages)
        # While the template is at work, lone surrogates, which no text holds, stand in the messages
        # for the characters that special tokens begin and end with, and for whole drawn answers.
        tokens = self._tokenizer.special_tokens
        ends = sorted({token[place] for token in tokens for place in (0, -1)})
        stands_for = {chr(0xD800 + number): end for number, end in enumerate(ends)}
        replaced = {ord(end): one for one, end in stands_for.items()}
        back = {ord(one): end for one, end in stands_for.items()}
        text, answers = self._with_marks(messages, replaced, drawn or {})
        marks = re.compile(f"([{''.join(answers)}])") if answers else None
        ids: list[int] = []

        def add(words: str) -> None:
            for piece in marks.split(words) if marks else [words]:
                known = answers.get(piece)
                ids.extend(
                    self._tokenizer.encode(piece.translate(back)) if known is None else known
                )

        place = 0
        for special in self._special.finditer(text):
            add(text[place : special.start()])
            ids.append(tokens[special[0]])
            place = special.end()
        add(text[place:])
        return ids

    def _with_marks(
        self,
        messages: Sequence[Message],
        replaced: Mapping[int, str],
        drawn: Mapping[str, Sequence[int]],
    ) -> tuple[str, dict[str, Sequence[int]]]:
        """The conversation as text, with marks where drawn answers belong, and what each is."""
        plain = self._render(messages, replaced)
        said = [
            place
            for place, message in enumerate(messages)
            if message["role"] == "assistant" and drawn.get(message["content"])
        ][:N_MARKS]
        marks = {place: chr(MARK + number) for number, place in enumerate(said)}

        def marked(places: Sequence[int]) -> str | None:
            """The text with these answers marked; None where the template alters one of them."""
            changed = [
                {**message, "content": marks[place]} if place in places else message
                for place, message in enumerate(messages)
            ]
            try:
                text = self._render(changed, replaced)
            except ValueError:  # it looks into the answer
                return None
            filled = text
            for place in places:
                content = messages[place]["content"].translate(replaced)
                filled = filled.replace(marks[place], content)
            return text if filled == plain else None

        text = marked(said)
        if text is None:
            said = [place for place in said if marked([place]) is not None]
            text = marked(said)
        if text is None:
            return plain, {}
        return text, {marks[place]: drawn[messages[place]["content"]] for place in said}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Special tokens; of two that begin at one place the longer one."""
        tokens = sorted(self._tokenizer.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)))

    def _render(
        self,
        messages: Sequence[Message],
        replaced: Mapping[int, str],
        add_generation_prompt: bool = True,
    ) -> str:
        given = [
            {"role": message["role"], "content": message["content"].translate(replaced)}
            for message in messages
        ]
        try:
            return self._template.render(
                messages=given, add_generation_prompt=add_generation_prompt, **self._names
            )
        except Exception as error:  # whatever a template does
            raise ValueError(f"the chat template refuses the messages: {one_line(error)}") from None


def checked_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as dicts of role and content.

    Raises:
        ValueError: see :meth:`ChatTemplate.ids`.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages must be a list of {{'role': ..., 'content': ...}}, got {shown(messages)}"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(
                f"message {number} must have a role and a content, nothing else, got "
                f"{shown(message)}"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {number}: role must be one of {', '.join(ROLES)}, got "
                f"{shown(message['role'])}"
            )
        check_text(message["content"], f"message {number}: content")
    if not messages or messages[-1]["role"] != "user":
        last = shown(messages[-1]["role"]) if messages else "no message at all"
        raise ValueError(f"the last message must be the user's, to be answered, got {last}")
    return [dict(message) for message in messages]


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

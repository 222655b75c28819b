"""Stories and chats at a terminal: what is written appears as it comes, and Ctrl-C ends only it."""

import sys
from collections.abc import Callable, Collection
from typing import Protocol

from pyllm.generate.config import SamplingConfig
from pyllm.generate.language_model import NOT_TUNED, LanguageModel
from pyllm.generate.stream import TextStream

NEW = "/new"
"""Typed before anything else, it begins another story or conversation."""


class TooLongError(ValueError):
    """A message that the model's context has no room for."""


class Turns(Protocol):
    """What :func:`interact` gives the lines to."""

    def greet(self) -> None:
        """Say what can be typed."""

    def take(self, line: str) -> None:
        """Answer a line."""


def interact(turns: Turns, ask: Callable[[str], str] = input) -> None:
    """Hand on every line that ``ask`` gives, until it raises EOFError (Ctrl-D).

    Raises:
        ValueError: a line is not UTF-8.
    """
    turns.greet()
    print("Ctrl-C ends what is being written, Ctrl-D the program.")
    while True:
        try:
            turns.take(ask("> "))
        except KeyboardInterrupt:
            print()
        except TooLongError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise ValueError(
                f"what was typed is not UTF-8 ({error.object[error.start]:#04x}); expected UTF-8"
            ) from None


class Writer:
    """Prints what a model writes; its cache is kept from one text to the next.

    Args:
        model: what writes.
        config: how to draw.
        context: see :class:`Session`.
        stats: print tokens and seconds after each text.
        afterwards: called with the tokens of a text that was not interrupted.

    Attributes:
        ids: the tokens of the text so far.
        text: what was written last.
        ended: it came to its end, and was not cut short.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: SamplingConfig,
        context: int | None = None,
        stats: bool = False,
        afterwards: Callable[[list[int]], None] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.session = model.new_session(context)
        self.ids: list[int] = []
        self.text = ""
        self.ended = True
        self._stats = stats
        self._afterwards = afterwards

    def write(self, ids: list[int], stop_ids: Collection[int]) -> None:
        """Go on after these tokens, until the text ends or is interrupted."""
        stream = TextStream(self.model.tokenizer, self.config.stop)
        self.text, self.ended = "", False
        try:
            self.session.begin([ids], self.config, stop_ids)
            while self.session.running:
                drawn = self.session.step()
                for _, token in drawn:
                    self._print(stream.push(token))
                self.ended = stream.stopped or not drawn
                if stream.stopped:
                    self.session.end(0)
        finally:
            self._print(stream.end())
            self.ids = self.session.ids[0]
            if stream.stopped:  # the tokens of a stop string are no part of the text
                self.ids = [*ids, *self.model.tokenizer.encode(self.text)]
            print(flush=True)
            if self._stats:
                print(self.session.timing, flush=True)
        if self._afterwards is not None:
            self._afterwards(self.ids)

    def _print(self, piece: str) -> None:
        self.text += piece
        print(piece, end="", flush=True)


class Story:
    """A story that the model and whoever types tell together.

    A line goes on with the story so far. After an empty one the model goes on by itself, or, when
    the story has come to its end, begins another.

    Args:
        writer: prints it.
        fresh: each line begins a new story.
    """

    def __init__(self, writer: Writer, fresh: bool = False) -> None:
        self.writer = writer
        self.fresh = fresh
        self._told = ""

    def greet(self) -> None:
        """Say what can be typed."""
        print(f"Type how a story begins, and then how it goes on. {NEW} begins another one.")

    def take(self, line: str) -> None:
        """Print the line, and what the model makes of it."""
        line, new = _without_command(line)
        model, before = self.writer.model, self.writer.ids
        if new or self.fresh or (self.writer.ended and not line):
            before, self._told = [], ""
        if self._told and line and not (self._told[-1].isspace() or line[0].isspace()):
            line = f" {line}"
        print(line, end="", flush=True)
        ids = [*before, *model.tokenizer.encode(line)] if before else model.prompt_ids(line)
        try:
            self.writer.write(ids, model.stop_ids)
        finally:
            self._told += line + self.writer.text


class Chat:
    """A conversation, as the model's chat template has it.

    Its oldest messages are forgotten when the model's context has no room for them any more.

    Args:
        writer: prints the answers.
        system: what the model is told before all messages.

    Raises:
        ValueError: the model has no chat template, or not the tokens it needs.
    """

    def __init__(self, writer: Writer, system: str = "") -> None:
        self.writer = writer
        model = writer.model
        self._stop_ids = model.stop_ids | {model.template.end_id}
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []
        self._warned = model.tuned_for_chat

    def greet(self) -> None:
        """Say what can be typed, and that the model may not answer, if so."""
        self._warn()
        print(f"Type a message. {NEW} begins another conversation.")

    def take(self, line: str) -> None:
        """Print the answer to a message; an empty one gets none.

        Raises:
            TooLongError: the context has no room for the message.
        """
        line, new = _without_command(line)
        if new:
            self._messages = []
        if not line:
            return
        ids = self._with(line)
        self._warn()
        try:
            self.writer.write(ids, self._stop_ids)
        finally:
            self._messages.append({"role": "assistant", "content": self.writer.text})

    def _warn(self) -> None:
        if not self._warned:
            print(f"warning: {NOT_TUNED}", file=sys.stderr, flush=True)
        self._warned = True

    def _with(self, line: str) -> list[int]:
        """The tokens of the conversation with one more message, and room for an answer."""
        context = self.writer.session.context
        room = min(self.writer.config.max_new_tokens, context // 2)
        messages = [*self._messages, {"role": "user", "content": line}]
        while True:
            ids = self.writer.model.template.ids([*self._system, *messages])
            if len(ids) + room <= context or (len(messages) == 1 and len(ids) <= context):
                self._messages = messages
                return ids
            if len(messages) == 1:
                raise TooLongError(
                    f"the message is {len(ids)} tokens with all that belongs to it, and the model "
                    f"looks back on {context}; expected a shorter one"
                )
            messages = messages[2:]  # a message and its answer


def _without_command(line: str) -> tuple[str, bool]:
    """What follows ``/new``, and whether it stands there."""
    command, _, rest = line.partition(" ")
    return (rest, True) if command == NEW else (line, False)

"""Stories and chats at a terminal: what is written appears as it comes, and Ctrl-C ends only it."""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

from pyllm.generate.config import SamplingConfig
from pyllm.generate.decode import with_special_stops
from pyllm.generate.language_model import NOT_TUNED, LanguageModel
from pyllm.generate.stream import TextStream

NEW = "/new"
"""Typed before anything else, it begins another story or conversation."""


NO_SPACE_BEFORE = ",.;:!?…')]}’”»"


class TooLongError(ValueError):
    """A message that the model's context has no room for."""


class Turns(Protocol):
    """What :func:`interact` gives the lines to."""

    def greet(self) -> None:
        """Say what can be typed."""

    def take(self, line: str) -> None:
        """Answer a line."""


def interact(turns: Turns, ask: Callable[[str], str] | None = None) -> None:
    """Hand on every line that is typed, until Ctrl-D. One that is no text is asked for again.

    Args:
        turns: take the lines.
        ask: given a prompt, gives a line, or raises EOFError (Ctrl-D); by default the keyboard.
    """
    ask = ask or _keyboard()
    turns.greet()
    print("Ctrl-C ends what is being written, Ctrl-D the program.")
    while True:
        try:
            try:
                line = ask("> ")
                line.encode()  # what was no UTF-8 may have come as lone surrogates
                turns.take(line)
            except KeyboardInterrupt:
                print()
            except TooLongError as error:
                _complain(str(error))
            except UnicodeDecodeError as error:
                _complain_of_byte(error.object[error.start])
            except UnicodeEncodeError as error:
                _complain_of_byte(ord(error.object[error.start]) & 0xFF)
        except KeyboardInterrupt:  # pressed once more, while the first one was dealt with
            continue
        except EOFError:
            print()
            return


def _keyboard() -> Callable[[str], str]:
    """``input``, which edits lines where the system can, and reads on after bytes of no text."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # such as on Windows
            import readline  # without it an arrow key is three characters of the line

            # Its switches for the terminal would stand before every prompt.
            readline.parse_and_bind("set enable-bracketed-paste off")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Otherwise one byte would take what is read ahead with it: all lines of a pipe.
        sys.stdin.reconfigure(errors="surrogateescape")
    return input


def _complain(what: str) -> None:
    print(f"error: {what}", file=sys.stderr, flush=True)


def _complain_of_byte(byte: int) -> None:
    _complain(f"what was typed is not UTF-8 ({byte:#04x}); expected UTF-8")


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
        self._turns = 0
        self._stats = stats
        self._afterwards = afterwards

    def write(self, ids: list[int], stop_ids: Collection[int], most: int | None = None) -> None:
        """Go on after these tokens, until the text ends or is interrupted.

        Args:
            ids: what is there already.
            stop_ids: each ends the text.
            most: no more tokens than this, if ``config`` allows more.
        """
        stream = TextStream(self.model.tokenizer, self.config.stop)
        stop_ids = with_special_stops(self.model.tokenizer, self.config, stop_ids)
        self.text, self.ended = "", False
        config = self._config_of_turn(most)
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                self.session.begin([ids], config, stop_ids)
            for warning in told:  # in one line, without the code it comes from
                print(f"warning: {warning.message}", file=sys.stderr, flush=True)
            while self.session.running:
                drawn = self.session.step()
                for _, token in drawn:
                    self._print(stream.push(token))
                self.ended = stream.stopped or not drawn
                if stream.stopped:
                    self.session.end(0)
        finally:
            rest = stream.end()
            self.text += rest
            self.ids = self.session.ids[0]
            if stream.stopped:  # the tokens of a stop string are no part of the text
                self.ids = [*ids, *self.model.tokenizer.encode(self.text)]
            print(rest, flush=True)
            if self._stats:
                # In a file or a pipe, the text is the text alone.
                to = sys.stdout if sys.stdout.isatty() else sys.stderr
                print(self.session.timing, file=to, flush=True)
        if self._afterwards is not None:
            self._afterwards(self.ids)

    def _config_of_turn(self, most: int | None) -> SamplingConfig:
        """How to draw the next text: each has a seed of its own, or all would be told alike."""
        config, turn = self.config, self._turns
        self._turns += 1
        if config.seed is not None:
            config = replace(config, seed=(config.seed + turn) % 2**63)
        if most is not None:
            config = replace(config, max_new_tokens=min(most, config.max_new_tokens))
        return config

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
        if self._told and line and not self._told[-1].isspace() and _begins_a_word(line):
            line = f" {line}"
        print(line, end="", flush=True)
        ids = [*before, *model.tokenizer.encode(line)] if before else model.prompt_ids(line)
        try:
            self.writer.write(ids, model.stop_ids)
        finally:
            self._told += line + self.writer.text


class Chat:
    """A conversation, as the model's chat template has it.

    Its oldest messages are forgotten, with a line that says so, when the model's context has no
    room for them any more. What it was told before all messages is not.

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
        ids, messages = self._fitting(line)
        self._warn()
        n_forgotten = len(self._messages) + 1 - len(messages)
        session = self.writer.session
        if n_forgotten:
            _note(f"forgotten: the oldest messages, for the context of {session.context} is full")
        room = session.context - len(ids)
        # All at once and at the end: an interruption leaves a message with its answer, or neither.
        self.writer.text = ""
        try:
            self.writer.write(ids, self._stop_ids, room)
        finally:
            text = self.writer.text
            self.writer.model.remember(session, text, self.writer.ids[len(ids) :])
            self._messages = [*messages, {"role": "assistant", "content": text}]
        if not self.writer.ended and room < self.writer.config.max_new_tokens:
            _note(f"cut short: the context of {session.context} is full")

    def _warn(self) -> None:
        if not self._warned:
            print(f"warning: {NOT_TUNED}", file=sys.stderr, flush=True)
        self._warned = True

    def _fitting(self, line: str) -> tuple[list[int], list[dict[str, str]]]:
        """The tokens of the conversation with one more message, with room for an answer after
        them, and the messages they are for."""
        session = self.writer.session
        room = min(self.writer.config.max_new_tokens, session.context // 2)
        messages = [*self._messages, {"role": "user", "content": line}]
        while True:
            told = [*self._system, *messages]
            ids = self.writer.model.template.ids(told, session.answers)
            # A message alone is answered as far as there is room.
            if len(ids) + (room if len(messages) > 1 else 1) <= session.context:
                return ids, messages
            if len(messages) == 1:
                raise TooLongError(
                    f"the message is {len(ids)} tokens with all that belongs to it, and the model "
                    f"looks back on {session.context}, its answer included; expected a shorter one"
                )
            messages = messages[2:]  # a message and its answer


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


def _begins_a_word(line: str) -> bool:
    """Does a line that goes on with a text need a space before it?"""
    first, after = line[0], line[1:2]
    if first == '"':  # opens what somebody says, or closes it
        return after.isalnum()
    return not first.isspace() and first not in NO_SPACE_BEFORE


def _without_command(line: str) -> tuple[str, bool]:
    """What follows ``/new``, and whether it stands there."""
    command, _, rest = line.partition(" ")
    return (rest, True) if command == NEW else (line, False)

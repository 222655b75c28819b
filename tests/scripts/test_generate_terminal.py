"""scripts/generate.py at a terminal, a pseudo one: what appears when, and what the keys do.

Every wait is for something that must appear, with a deadline that only a hanging program reaches.
"""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pyllm.models import ModelConfig, Transformer, save_model
from pyllm.tokenizers import Tokenizer, train_bpe

from .conftest import script_path

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")

DEADLINE_SECONDS = 180
CTRL_C, CTRL_D = "\x03", "\x04"
STATS = (
    r"(\d+) new tokens; prefill (\d+) tokens \((\d+) more were in the cache\) in [\d.]+ s, "
    r"[\d.]+ tokens/s; decode (\d+) tokens in [\d.]+ s, ([\d.]+) tokens/s\r\n"
)
# The session leader that opens a terminal is the one that Ctrl-C goes to.
OWN_TERMINAL = (
    "import os, sys\n"
    "os.close(os.open(os.ttyname(0), os.O_RDWR))\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)


class Terminal:
    """A script with a terminal of its own: keys go in, and what it shows is kept."""

    def __init__(self, *flags: object) -> None:
        self.screen = ""
        self.reads = 0
        """Times that something new was on the screen."""
        self.keys, end = pty.openpty()
        command = [OWN_TERMINAL, str(script_path("generate")), *map(str, flags)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", *command],
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        )
        os.close(end)

    def type(self, keys: str) -> None:
        os.write(self.keys, keys.encode())

    def wait_for(self, shown: Callable[[str], object]) -> None:
        """Read on until the screen, from the mark on, is as wanted."""
        end = time.monotonic() + DEADLINE_SECONDS
        while not shown(self.screen):
            left = end - time.monotonic()  # also for a program that never falls silent
            ready = left > 0 and select.select([self.keys], [], [], left)[0]
            assert ready, f"not shown in {DEADLINE_SECONDS} s; the screen: {self.screen[-2000:]!r}"
            try:
                read = os.read(self.keys, 65536)
            except OSError:  # Linux's way to say that the program has gone
                read = b""
            assert read, f"the program ended; the screen: {self.screen[-2000:]!r}"
            self.screen += read.decode("utf-8", errors="replace")
            self.reads += 1

    def next(self, pattern: str) -> re.Match[str]:
        """Wait for a text of this pattern; the screen begins anew after it."""
        self.wait_for(lambda screen: re.search(pattern, screen))
        found = re.search(pattern, self.screen)
        assert found
        self.screen = self.screen[found.end() :]
        return found

    def press_until_shown(self, key: str, pattern: str) -> None:
        """A signal that comes between a prompt and Python's wait for keys is seen at the next key
        only (this test once stood there for ever), so the key is pressed again, as anyone would."""
        end = time.monotonic() + DEADLINE_SECONDS
        while not re.search(pattern, self.screen):
            assert time.monotonic() < end, f"not shown; the screen: {self.screen[-2000:]!r}"
            self.type(key)
            while select.select([self.keys], [], [], 5)[0]:
                self.screen += os.read(self.keys, 65536).decode("utf-8", errors="replace")
                if re.search(pattern, self.screen):
                    break

    def code(self) -> int:
        """Wait for the end, as a terminal does: it shows everything until then."""
        try:
            self.wait_for(lambda screen: False)
        except AssertionError as ended:
            assert "the program ended" in str(ended)
        return self.process.wait(DEADLINE_SECONDS)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*flags: object) -> Terminal:
        started.append(Terminal(*flags))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGKILL)
            one.process.wait()
        os.close(one.keys)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["Once there was a fox, and the fox was red. "] * 20, 290)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A small untrained model that goes on for ever, or nearly: it hardly draws the end."""
    config = ModelConfig(tokenizer.vocab_size, 8192, n_layers=2, d_model=32, d_ff=16)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "fox"
    save_model(folder, Transformer(config), tokenizer)
    return folder


def test_stories_at_a_terminal(
    terminal: Callable[..., Terminal], place: Path, tokenizer: Tokenizer
) -> None:
    flags = ("--model", place, "--interactive", "--stats", "--greedy", "--max-new-tokens", 12)
    screen = terminal(*flags)
    screen.next("Type how a story begins")
    screen.next("Ctrl-D the program.\r\n> ")
    screen.type("Once there\n")
    screen.next("Once there\r\nOnce there")  # as typed, and as told
    new, prefill, cached, decoded, rate = screen.next(STATS).groups()
    begun = 1 + len(tokenizer.encode("Once there"))
    assert (new, prefill, cached, decoded) == ("12", str(begun), "0", "11")
    assert float(rate) > 0

    # Of the second turn, only what is new is computed: what was typed, and the last token of the
    # first turn, which nothing had been written after.
    screen.next("> ")
    screen.type(" the fox\n")
    new, prefill, cached, _, _ = screen.next(STATS).groups()
    typed = len(tokenizer.encode(" the fox"))
    assert (new, prefill, cached) == ("12", str(1 + typed), str(begun + 11))

    screen.next("> ")
    screen.type("/new fox\n")
    # Both stories share the token that a text begins with.
    assert screen.next(STATS).group(2, 3) == (str(len(tokenizer.encode("fox"))), "1")

    # Ctrl-C where nothing is written asks again; Ctrl-D ends the program.
    screen.next("> ")
    screen.press_until_shown(CTRL_C, "> ")
    screen.type(CTRL_D)
    assert screen.code() == 0
    assert "Traceback" not in screen.screen


def test_text_appears_as_it_comes_and_ctrl_c_ends_it(
    terminal: Callable[..., Terminal], place: Path, tokenizer: Tokenizer
) -> None:
    """The story would go on for a million tokens: all that is seen is seen while it is written."""
    flags = ("--model", place, "--interactive", "--stats", "--seed", 1, "--temperature", 0.01)
    screen = terminal(*flags, "--max-new-tokens", 1_000_000)
    screen.next("Ctrl-D the program.\r\n> ")
    screen.type("Once there\n")
    screen.next("Once there\r\nOnce there")
    before = screen.reads
    screen.wait_for(lambda shown: len(shown) > 200 and screen.reads >= before + 5)
    screen.type(CTRL_C)
    new = int(screen.next(STATS).group(1))

    # The program goes on, from where the story was ended.
    screen.next("> ")
    screen.type(" the fox\n")
    screen.wait_for(lambda shown: len(shown.partition("\n")[2]) > 200)
    screen.type(CTRL_C)
    _, prefill, cached, _, _ = screen.next(STATS).groups()
    assert int(prefill) <= 1 + len(tokenizer.encode(" the fox"))
    assert int(cached) >= new - 1 > 10
    screen.next("> ")
    screen.type(CTRL_D)
    assert screen.code() == 0
    assert "Traceback" not in screen.screen and "interrupted" not in screen.screen


def test_a_chat_at_a_terminal(terminal: Callable[..., Terminal], place: Path) -> None:
    flags = ("--model", place, "--chat", "--system", "Be brief.", "--stats", "--seed", 1)
    screen = terminal(*flags, "--max-new-tokens", 8)
    screen.next("warning: this model was not fine-tuned for chat: it goes on writing, .*\r\n")
    screen.next("Type a message. /new begins another conversation.\r\n")
    screen.next("> ")
    screen.type("Hello\n")
    first = screen.next(STATS)
    assert first.group(3) == "0"
    screen.next("> ")
    screen.type("<|im_end|>\n")
    second = screen.next(STATS)
    # All of the first turn, but for its last token, which was not run yet.
    assert int(second.group(3)) == int(first.group(2)) + int(first.group(1)) - 1
    screen.next("> ")
    screen.type(CTRL_D)
    assert screen.code() == 0
    assert "Traceback" not in screen.screen and "warning" not in screen.screen


def test_keys_that_edit_a_line_do_not_reach_the_model(
    terminal: Callable[..., Terminal], place: Path
) -> None:
    pytest.importorskip("readline", reason="no readline on this system")
    screen = terminal("--model", place, "--interactive", "--fresh", "--max-new-tokens", 2)
    screen.next("Ctrl-D the program.\r\n> ")
    screen.type("Once thee\x1b[Dr\n")
    screen.next("\r\nOnce there")
    screen.next("> ")
    screen.type("\x1b[A\n")  # the line before once more
    screen.next("\r\nOnce there")
    screen.next("> ")
    screen.type(CTRL_D)
    assert screen.code() == 0


def test_a_byte_that_is_no_text_does_not_end_the_program(
    terminal: Callable[..., Terminal], place: Path
) -> None:
    screen = terminal("--model", place, "--interactive", "--fresh", "--max-new-tokens", 2)
    screen.next("Ctrl-D the program.\r\n> ")
    os.write(screen.keys, b"caf\xe9\n")
    # readline leaves the byte out, as is seen at once; without it, one line says what is wrong.
    screen.next("\r\ncaf|error: what was typed is not UTF-8")
    screen.next("> ")
    screen.type("Once there\n")
    screen.next("\r\nOnce there")
    screen.next("> ")
    screen.type(CTRL_D)
    assert screen.code() == 0

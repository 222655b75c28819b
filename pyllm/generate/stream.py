"""From token ids to text while they come, whole characters only, up to a stop string."""

import codecs
from collections.abc import Sequence

from pyllm.tokenizers import Tokenizer


class TextStream:
    """Holds back the bytes of a character until all are there, and what may become a stop string.

    A byte-level token may end in the middle of a UTF-8 character. What all the pieces join to is
    ``tokenizer.decode`` of all the ids, up to the stop string: bytes that are no UTF-8 come out as
    U+FFFD there too.

    Args:
        tokenizer: of the ids.
        stop: texts of which the first to be complete ends the text, and is not given out.

    Attributes:
        stopped: a stop string was met; nothing more is given out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        # It keeps the bytes of an incomplete character, three at most.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        return self._before_stop(self._decoder.decode(self._tokenizer.decode_bytes([token_id])))

    def end(self) -> str:
        """What is still held back; an incomplete character comes out as U+FFFD."""
        piece = self._before_stop(self._decoder.decode(b"", final=True))
        piece, self._held = piece + self._held, ""
        return piece

    def _before_stop(self, piece: str) -> str:
        """The characters of ``piece``, and of those held back, that no stop string can take."""
        if self.stopped:
            return ""
        text = self._held + piece
        # The first to be complete counts, and of two that end together the longer one: so the text
        # does not depend on the pieces it comes in.
        found = [(text.index(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if found:
            end, minus_length = min(found)
            self.stopped, self._held = True, ""
            return text[: end + minus_length]
        kept = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, stop: str) -> int:
    """How many of the first characters of ``stop``, not all, ``text`` ends with."""
    return next(size for size in range(len(stop) - 1, -1, -1) if text.endswith(stop[:size]))

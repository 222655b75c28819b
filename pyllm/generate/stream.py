"""From token ids to text while they come, without ever breaking a character."""

from pyllm.tokenizers import Tokenizer


class TextStream:
    """Holds back the bytes of a character until all of them are there.

    A byte-level token may end in the middle of a UTF-8 character. What all the pieces join to is
    ``tokenizer.decode`` of all the ids: bytes that are no UTF-8 come out as U+FFFD there too.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._given = 0  # characters of the pending ids that are out already

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._pending)
        # Decoding goes from left to right, so only a U+FFFD at the very end can still change: an
        # incomplete character gives exactly one.
        if text.endswith("\ufffd"):
            piece = text[self._given : -1]
            self._given = len(text) - 1
        else:
            piece = text[self._given :]
            self._pending, self._given = [], 0
        return piece

    def end(self) -> str:
        """What is still held back; an incomplete character comes out as U+FFFD."""
        piece = self._tokenizer.decode(self._pending)[self._given :]
        self._pending, self._given = [], 0
        return piece

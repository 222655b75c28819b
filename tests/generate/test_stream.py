"""Text as it comes: whole characters, and nothing of a stop string."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyllm.generate import TextStream
from pyllm.tokenizers import Tokenizer, train_bpe

LETTERS = train_bpe(["x"], 260)  # a token for each byte


@pytest.mark.parametrize("seed", range(20))
def test_streamed_random_bytes_join_to_what_decoding_at_once_gives(tokenizer, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(tokenizer.vocab_size, (300,), generator=generator).tolist()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.end()]) == tokenizer.decode(ids)
    assert stream.end() == ""


@pytest.mark.parametrize(
    "stray", [b"\x80" * 500, b"\xf0\x9f" * 250, b"\xe2\x82\xf0\x9f\xa6" * 100, b"\xff\xc2" * 250]
)
def test_bytes_that_are_no_utf8_are_given_out_as_they_come(
    monkeypatch: pytest.MonkeyPatch, stray: bytes
) -> None:
    """Were all kept until a character is whole, every token would take longer than the last."""
    token_of = {LETTERS.decode_bytes([token]): token for token in range(LETTERS.vocab_size)}
    ids = [token_of[bytes([byte])] for byte in stray]
    assert LETTERS.decode_bytes(ids) == stray
    looked_at = []
    for name in ("decode", "decode_bytes"):
        inner = getattr(LETTERS, name)

        def counted(ids, skip_special=True, inner=inner):
            looked_at.append(len(ids))
            return inner(ids, skip_special)

        monkeypatch.setattr(LETTERS, name, counted)
    stream, told = TextStream(LETTERS), ""
    for number, token in enumerate(ids, start=1):
        told += stream.push(token)
        known = stray[:number].decode("utf-8", errors="replace")
        assert 0 <= len(known) - len(told) <= 1 and known.startswith(told)
    assert sum(looked_at) <= 4 * len(ids)
    assert told + stream.end() == stray.decode("utf-8", errors="replace")


def test_streaming_valid_text_never_gives_a_replacement_character(tokenizer):
    text = "naïve 你好 🦊👩‍👩‍👧 \U0010ffff \u0800 end \ufffd!"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text and stream.end() == ""
    assert "".join(pieces).count("\ufffd") == 1  # the one that is in the text


def told(text: str, stop: tuple[str, ...], stream: TextStream | None = None) -> list[str]:
    """The pieces that come out, a token for each byte of the text, until a stop string ends it."""
    stream = stream or TextStream(LETTERS, stop)
    pieces = []
    for token in LETTERS.encode(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.end()]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two", (".",), "one"),
        ("one two", (".",), "one two"),
        (".one", (".",), ""),
        ("one two", ("one two",), ""),
        ("aab", ("ab",), "a"),
        ("aaab aab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("The end.", ("The end!", "end"), "The "),
        ("abcd", ("abcd", "bc"), "a"),  # bc is complete first
        ("abcd", ("bcd", "abcd"), ""),  # both at once: the longer one
        ("abcx", ("abcd",), "abcx"),
        ("a fox\U0001f98a!", ("\U0001f98a",), "a fox"),
        ("a\u00e9b", ("\u00e9",), "a"),
    ],
)
def test_a_text_ends_before_its_stop_string(
    text: str, stop: tuple[str, ...], expected: str
) -> None:
    assert "".join(told(text, stop)) == expected


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    assert told("x\nUsual", ("\nUser:",)) == ["x", "", "", "", "\nUsu", "a", "l", ""]
    assert told("x\nUser: y", ("\nUser:",)) == ["x", "", "", "", "", "", ""]
    assert told("x\nUs", ("\nUser:",)) == ["x", "", "", "", "\nUs"]


def test_after_a_stop_string_nothing_comes() -> None:
    stream = TextStream(LETTERS, ("b",))
    assert told("ab", ("b",), stream) == ["a", ""]
    assert stream.stopped
    assert [stream.push(token) for token in LETTERS.encode("cab")] == ["", "", ""]
    assert stream.end() == ""


def first_to_be_complete(text: str, stop: tuple[str, ...]) -> str:
    """From the definition: cut at the first end of a stop string, the longest one there."""
    for end in range(len(text) + 1):
        sizes = [len(one) for one in stop if text[:end].endswith(one)]
        if sizes:
            return text[: end - max(sizes)]
    return text


@pytest.mark.fuzz
@given(
    text=st.text("ab\u00e9\U0001f98a", max_size=12),
    stop=st.lists(st.text("ab\u00e9\U0001f98a", min_size=1, max_size=4), max_size=3),
)
def test_any_text_and_stop_strings(text: str, stop: list[str]) -> None:
    pieces = told(text, tuple(stop))
    expected = first_to_be_complete(text, tuple(stop))
    assert "".join(pieces) == expected
    # Nothing is held back longer than it must be: what is out is all but the longest possible
    # beginning of a stop string, and an unfinished character.
    out = ""
    seen = b""
    for piece, byte in zip(pieces, text.encode(), strict=False):
        out, seen = out + piece, seen + bytes([byte])
        whole = seen.decode("utf-8", errors="ignore")
        if first_to_be_complete(whole, tuple(stop)) != whole:
            break
        begun = max(
            (size for one in stop for size in range(len(one)) if whole.endswith(one[:size])),
            default=0,
        )
        assert out == whole[: len(whole) - begun]


def test_the_text_does_not_depend_on_how_it_is_cut_into_tokens(tokenizer: Tokenizer) -> None:
    """One merges letters to words, the other does not."""
    text = "Once there was a fox, and the fox was red. Once there"
    for stop in itertools.combinations(["ox", "fox,", "s r", "x was", "there was a fox"], 2):
        stream = TextStream(tokenizer, stop)
        pieces = [stream.push(token) for token in tokenizer.encode(text)]
        assert len(pieces) < len(text)
        assert "".join(pieces) + stream.end() == "".join(told(text, stop))

"""Bytes and characters: which ids there are, and what becomes of characters nobody has seen."""

import json

import pytest

from pyllm.tokenizers import SPECIAL_TOKENS, byte_tokenizer, train_bpe, train_characters


def test_the_id_of_a_byte_is_its_value():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode_bytes(bytes(range(256))) == list(range(256))
    assert tokenizer.encode("é 1") == [0xC3, 0xA9, 0x20, 0x31]
    assert tokenizer.special_tokens == {token: 256 + n for n, token in enumerate(SPECIAL_TOKENS)}
    assert (tokenizer.end_of_text_id, tokenizer.pad_id) == (256, 257)
    assert json.loads(tokenizer._backend.to_str())["model"]["merges"] == []


def test_a_known_character_is_one_token():
    text = "naïve – “Straße” … 你好 🦊\n"
    tokenizer = train_characters([text], 400)
    ids = tokenizer.encode(text)
    assert [tokenizer.decode([id_]) for id_ in ids] == list(text)
    assert [id_ for id_ in ids if id_ < 256] == [ord(c) for c in text if c.isascii()]
    assert tokenizer.special_tokens == byte_tokenizer().special_tokens
    # Whatever is between them: no word, no neighbour changes a character.
    assert tokenizer.encode("ï你ï") == [tokenizer.encode(c)[0] for c in "ï你ï"]


def test_an_unknown_character_is_bytes():
    tokenizer = train_characters(["… is known"], 400)
    assert len(tokenizer.encode("…")) == 1
    assert tokenizer.encode("ß🦊") == list("ß🦊".encode())  # nothing is known that begins so
    beginning, last = tokenizer.encode("—")  # E2 80 94; … is E2 80 A6
    assert (tokenizer.decode_bytes([beginning]), last) == (b"\xe2\x80", 0x94)
    assert tokenizer.decode(tokenizer.encode("…—ß🦊")) == "…—ß🦊"


def test_frequent_characters_come_first_and_rare_ones_may_find_no_room():
    texts = ["ööäääßß"]  # two bytes each, so one merge each
    assert train_characters(texts, 1000).vocab_size == 263
    tokenizer = train_characters(texts, 262)
    assert tokenizer.vocab_size == 262
    assert tokenizer.encode("äß") == [260, 261]
    assert tokenizer.encode("ö") == list("ö".encode())
    assert train_characters(["äöß"], 261).encode("ß") == [260]  # U+00DF, before ä and ö
    # Three merges, or none of them: a beginning alone would be of no use.
    assert train_characters(["🦊"], 262).vocab_size == 260
    assert train_characters(["🦊"], 263).encode("🦊") == [262]
    # What does not fit ends it: a rarer character does not take the place of a frequent one.
    assert train_characters(["🦊🦊ä"], 262).vocab_size == 260
    # Two characters that begin alike share what is in front of their last byte.
    tokenizer = train_characters(["……—"], 263)
    assert (tokenizer.encode("…"), tokenizer.encode("—")) == ([261], [262])
    assert train_characters(["only ASCII"], 260).hash == byte_tokenizer().hash


@pytest.mark.parametrize(
    "make", [byte_tokenizer, lambda **more: train_characters(["a"], 300, **more)]
)
def test_special_tokens_that_cannot_be(make):
    assert make(special_tokens=["<|endoftext|>"]).vocab_size == 257
    for tokens, message in (
        (["<|pad|>"], r"expected different tokens, none empty, <\|endoftext\|> first"),
        (["<|endoftext|>", ""], "expected different tokens, none empty"),
        (["<|endoftext|>", 5], "a special token must be a str, not int"),
        (["<|endoftext|>", "a"], "special token 'a' is also what ordinary text"),
    ):
        with pytest.raises(ValueError, match=message):
            make(special_tokens=tokens)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["a"], 259, "vocab_size is 259; expected at least 260, 256 bytes and 4 special tokens"),
        (["a"], 300.0, "vocab_size must be .*, got 300.0"),
        (["a"], 2**21, "vocab_size must be a whole number from 1 to 1,048,576, got 2097152"),
        (["", ""], 300, "every document is empty"),
        (["a", 5], 300, "text 1 must be a str, not int"),
        (["a\ud800"], 300, "text 0 has no UTF-8 form"),
        ("a text", 300, "must be a list or stream of str, got 'a text'; put one text in a list"),
    ],
)
def test_characters_of_nonsense(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_characters(texts, vocab_size)


def test_bytes_and_characters_are_cut_as_the_others_are():
    """So that a file for llama.cpp has one pre-tokenizer to name."""
    cuts = [
        json.loads(tokenizer._backend.to_str())["pre_tokenizer"]
        for tokenizer in (byte_tokenizer(), train_characters(["a"], 300), train_bpe(["a"], 300))
    ]
    assert cuts[0] == cuts[1] == cuts[2]
    assert [part["type"] for part in cuts[0]["pretokenizers"]] == ["Digits", "ByteLevel"]

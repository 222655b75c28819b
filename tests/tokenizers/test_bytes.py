"""Every kind of tokenizer gives every byte string back, and keeps special tokens out of texts."""

from itertools import product

import pytest

from pyllm.tokenizers import SPECIAL_TOKENS, Tokenizer

EVERY_PAIR_OF_BYTES = bytes(byte for pair in product(range(256), repeat=2) for byte in pair)


@pytest.mark.parametrize("name", ["UTF-8-test.txt", "blns.txt", "tinyshakespeare.txt"])
def test_torture_files(any_tokenizer: Tokenizer, shared_data, name):
    data = (shared_data / "tokenizer" / name).read_bytes()[:100_000]
    assert any_tokenizer.decode_bytes(any_tokenizer.encode_bytes(data)) == data
    for line in data.splitlines(keepends=True)[:500]:
        assert any_tokenizer.decode_bytes(any_tokenizer.encode_bytes(line)) == line
    text = data.decode("utf-8", errors="replace")
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text
    lines = text.split("\n")
    assert [any_tokenizer.decode(ids) for ids in any_tokenizer.encode_batch(lines)] == lines


def test_every_byte_next_to_every_other(any_tokenizer: Tokenizer):
    ids = any_tokenizer.encode_bytes(EVERY_PAIR_OF_BYTES)
    assert any_tokenizer.decode_bytes(ids) == EVERY_PAIR_OF_BYTES
    assert any_tokenizer.decode(ids) == EVERY_PAIR_OF_BYTES.decode("utf-8", errors="replace")
    for byte in range(256):
        [id_] = any_tokenizer.encode_bytes(bytes([byte]))
        assert any_tokenizer.decode_bytes([id_]) == bytes([byte])


def test_what_is_utf8_is_encoded_as_the_text_it_is(any_tokenizer: Tokenizer):
    text = "Once “upon” a 12 …\n\n  你好 🦊 é ﷽ <|endoftext|>"
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.encode_bytes(text.encode()) == ids
    assert any_tokenizer.encode_bytes(b"") == []
    [stray] = any_tokenizer.encode_bytes(b"\xff")
    assert any_tokenizer.encode_bytes(text.encode() + b"\xff\xff" + text.encode()) == [
        *ids,
        *(stray, stray),
        *ids,
    ]
    cut = "🦊".encode()[:3]  # the beginning of a character, but no character
    assert any_tokenizer.encode_bytes(cut) == [
        id_ for byte in cut for id_ in any_tokenizer.encode_bytes(bytes([byte]))
    ]


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_special_tokens_in_text_are_text_unless_allowed(any_tokenizer: Tokenizer, special):
    text = f"a{special} b"
    id_ = any_tokenizer.special_tokens.get(special)
    for ids in (
        any_tokenizer.encode(text),
        any_tokenizer.encode_batch([text])[0],
        any_tokenizer.encode_bytes(text.encode()),
    ):
        assert not {id_} & set(ids)
        assert any_tokenizer.decode(ids) == text
        assert any_tokenizer.decode_bytes(ids) == text.encode()
    if id_ is None:
        assert any_tokenizer.vocab_size == 50257 and special != "<|endoftext|>"
        return
    allowed = any_tokenizer.encode(text, allow_special=True)
    assert allowed == [*any_tokenizer.encode("a"), id_, *any_tokenizer.encode(" b")]
    assert any_tokenizer.encode_bytes(text.encode(), allow_special=True) == allowed
    assert any_tokenizer.decode(allowed) == "a b"
    assert any_tokenizer.decode_bytes(allowed) == b"a b"
    assert any_tokenizer.decode(allowed, skip_special=False) == text
    assert any_tokenizer.decode_bytes(allowed, skip_special=False) == text.encode()
    assert id_ not in any_tokenizer.encode(text)  # allowing it once changes nothing


def test_saved_and_loaded_it_is_the_same(any_tokenizer: Tokenizer, tmp_path):
    loaded = Tokenizer.load(any_tokenizer.save(tmp_path))
    assert loaded.hash == any_tokenizer.hash
    assert loaded.special_tokens == any_tokenizer.special_tokens
    assert loaded.encode_bytes(EVERY_PAIR_OF_BYTES) == any_tokenizer.encode_bytes(
        EVERY_PAIR_OF_BYTES
    )


def test_what_cannot_be_encoded_or_decoded(any_tokenizer: Tokenizer):
    for data in ("text", bytearray(b"text"), None, 5, [1]):
        with pytest.raises(ValueError, match="the data must be bytes, not"):
            any_tokenizer.encode_bytes(data)
    with pytest.raises(ValueError, match="character 1 .* a lone surrogate"):
        any_tokenizer.encode("a\udcff")
    size = any_tokenizer.vocab_size
    with pytest.raises(ValueError, match=f"token id {size} is outside the vocabulary: expected 0"):
        any_tokenizer.decode_bytes([0, size])
    with pytest.raises(ValueError, match="token ids must be a list of whole numbers, got 'a'"):
        any_tokenizer.decode_bytes("a")

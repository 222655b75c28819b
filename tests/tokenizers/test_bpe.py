"""Byte-level BPE: exact round trips, specials only when allowed, errors with a remedy."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.data import write_stories
from pyllm.tokenizers import SPECIAL_TOKENS, Tokenizer, train_bpe

TOKENIZER = train_bpe(write_stories(300, 0), 600)


def test_special_ids_and_size():
    assert TOKENIZER.vocab_size == 600
    assert TOKENIZER.special_tokens == {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    assert (TOKENIZER.end_of_text_id, TOKENIZER.pad_id) == (0, 1)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("name", ["UTF-8-test.txt", "blns.txt"])
def test_round_trip_of_torture_text(shared_data, name):
    text = (shared_data / "tokenizer" / name).read_bytes().decode("utf-8", errors="replace")
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    lines = text.split("\n")
    assert [TOKENIZER.decode(ids) for ids in TOKENIZER.encode_batch(lines)] == lines


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_special_tokens_in_text_are_text_unless_allowed(special):
    text = f"a{special} b"
    id_ = TOKENIZER.special_tokens[special]
    for ids in (TOKENIZER.encode(text), TOKENIZER.encode_batch([text])[0]):
        assert id_ not in ids
        assert TOKENIZER.decode(ids) == text
    allowed = TOKENIZER.encode(text, allow_special=True)
    assert allowed == [*TOKENIZER.encode("a"), id_, *TOKENIZER.encode(" b")]
    assert TOKENIZER.decode(allowed) == "a b"
    assert TOKENIZER.decode(allowed, skip_special=False) == text
    assert id_ not in TOKENIZER.encode(text)  # allowing it once changes nothing


def test_digits_stand_alone():
    assert len(train_bpe(["2024 " * 500], 300).encode("2024")) == 4


def test_training_is_deterministic_in_another_process():
    code = (
        "from pyllm.data import write_stories; from pyllm.tokenizers import train_bpe;"
        "print(train_bpe(write_stories(300, 0), 600).hash)"
    )
    for threads in ("1", "4"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == TOKENIZER.hash


def test_save_and_load(tmp_path):
    file = TOKENIZER.save(tmp_path / "folder")
    assert file == tmp_path / "folder" / "tokenizer.json"
    text = "Lily<|endoftext|> smiled."
    for path in (file, file.parent):
        loaded = Tokenizer.load(path)
        assert loaded.hash == TOKENIZER.hash
        assert loaded.encode(text) == TOKENIZER.encode(text)
    assert TOKENIZER.save(tmp_path / "other.json").name == "other.json"
    assert train_bpe(["other words other words"], 300).hash != TOKENIZER.hash


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"{", "not a tokenizer.json"),
        (b'{"model": 1}', "not a tokenizer.json"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
    ],
)
def test_load_damaged(tmp_path, data, message):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {message}.*train_tokenizer\.py"):
        Tokenizer.load(tmp_path)


def test_load_missing_or_without_end_of_text(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer there; train one"):
        Tokenizer.load(tmp_path)
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizer has no <\|endoftext\|>"):
        Tokenizer.load(tmp_path)


def test_gpt2(shared_data):
    folder = shared_data / "tokenizer"
    gpt2 = Tokenizer.from_gpt2(folder / "gpt2_vocab.bpe", folder / "gpt2_encoder.json")
    assert (gpt2.vocab_size, gpt2.end_of_text_id, gpt2.pad_id) == (50257, 50256, None)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("<|endoftext|>", allow_special=True) == [50256]
    assert 50256 not in gpt2.encode("<|endoftext|>")
    with pytest.raises(ValueError, match=r"GPT-2's vocab\.bpe and encoder\.json are needed"):
        Tokenizer.from_gpt2(folder / "gpt2_encoder.json", folder / "gpt2_vocab.bpe")


def test_bad_arguments():
    with pytest.raises(ValueError, match="vocab_size is 259; expected at least 260"):
        train_bpe(["a"], 259)
    with pytest.raises(ValueError, match=r"expected different tokens, <\|endoftext\|> first"):
        train_bpe(["a"], 300, special_tokens=("<|pad|>",))
    with pytest.raises(ValueError, match="every document is empty"):
        train_bpe(["", ""], 300)
    with pytest.raises(ValueError, match="character 1 .* a lone surrogate"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(ValueError, match="must be a str, not bytes"):
        TOKENIZER.encode_batch([b"a"])
    with pytest.raises(
        ValueError, match="token id 600 is outside the vocabulary: expected 0 to 599"
    ):
        TOKENIZER.decode([1, 600])

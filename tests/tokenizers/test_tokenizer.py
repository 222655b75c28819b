"""Byte-level BPE: exact round trips, specials only when allowed, errors with a remedy."""

import os
import subprocess
import sys

import pytest

from pyllm.data import write_stories
from pyllm.tokenizers import SPECIAL_TOKENS, Tokenizer, train_bpe

TOKENIZER = train_bpe(write_stories(300, 0), 600)


def test_special_ids_and_size():
    assert TOKENIZER.vocab_size == 600
    assert TOKENIZER.special_tokens == {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    assert (TOKENIZER.end_of_text_id, TOKENIZER.pad_id) == (0, 1)


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


def test_gpt2(shared_data):
    folder = shared_data / "tokenizer"
    gpt2 = Tokenizer.from_gpt2(folder / "gpt2_vocab.bpe", folder / "gpt2_encoder.json")
    assert (gpt2.vocab_size, gpt2.end_of_text_id, gpt2.pad_id) == (50257, 50256, None)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("<|endoftext|>", allow_special=True) == [50256]
    assert 50256 not in gpt2.encode("<|endoftext|>")

"""A trained tokenizer: its ids, its digits, its file; the same wherever it is trained."""

import json
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


def test_digits_stand_alone_and_nothing_else_is_cut_otherwise_than_by_gpt2():
    tokenizer = train_bpe(["in 2024, and 2024 " * 500], 300)
    digits = [tokenizer.encode(digit)[0] for digit in " 2024"]
    assert tokenizer.encode("2024") == digits[1:]
    assert tokenizer.encode(" 2024") == digits  # the space is no part of the digit
    words = [word for word, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str("it's  a-1½²x")]
    assert words == ["it", "'s", "Ġ", "Ġa", "-", "1", "Â½", "Â²", "x"]


@pytest.mark.parametrize("trainer", ["pyllm", "tokenizers"])
def test_training_is_deterministic_in_another_process(trainer):
    code = (
        "from pyllm.data import write_stories; from pyllm.tokenizers import train_bpe;"
        f"print(train_bpe(write_stories(300, 0), 600, trainer={trainer!r}).hash)"
    )
    for seed, threads in (("0", "1"), ("7", "4")):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed},
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


@pytest.mark.parametrize("before", [[], ["<|im_start|>"], ["<|endoftext|>", "<|pad|>"]])
def test_what_a_file_puts_before_a_text(tmp_path, before):
    """And not what it puts behind; `encode` leaves both out."""
    content = json.loads(TOKENIZER.save(tmp_path).read_text())
    marks = [{"SpecialToken": {"id": name, "type_id": 0}} for name in (*before, "<|im_end|>")]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*marks[:-1], text, marks[-1]],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            name: {"id": name, "ids": [id_], "tokens": [name]}
            for name, id_ in TOKENIZER.special_tokens.items()
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.prefix_ids == [TOKENIZER.token_to_id(name) for name in before]
    assert loaded.encode("Lily") == TOKENIZER.encode("Lily")
    assert TOKENIZER.prefix_ids == []

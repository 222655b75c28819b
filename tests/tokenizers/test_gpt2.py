"""GPT-2's tokenizer, from the real files: against the vocabulary, and against the library."""

import json

import pytest
from tokenizers import ByteLevelBPETokenizer

from pyllm.tokenizers import Tokenizer
from pyllm.tokenizers.byte_level import token_bytes

from .conftest import merge_by_hand


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "tokenizer"


@pytest.fixture(scope="module")
def gpt2(make_tokenizer) -> Tokenizer:
    return make_tokenizer("GPT-2")


@pytest.fixture(scope="module")
def vocab(folder) -> dict[str, int]:
    return json.loads((folder / "gpt2_encoder.json").read_text(encoding="utf-8"))


def test_sizes_and_known_ids(gpt2, vocab):
    assert (gpt2.vocab_size, gpt2.end_of_text_id, gpt2.pad_id) == (50257, 50256, None)
    assert gpt2.special_tokens == {"<|endoftext|>": 50256}
    assert gpt2.encode("Hello world") == [15496, 995] == [vocab["Hello"], vocab["Ġworld"]]
    assert gpt2.encode("It's 2024!\n\n  x") == [
        vocab[token] for token in ("It", "'s", "Ġ2024", "!", "ĊĊ", "Ġ", "Ġx")
    ]
    assert gpt2.encode("<|endoftext|>", allow_special=True) == [50256]


def test_a_word_of_the_vocabulary_is_one_token(gpt2, vocab):
    """All but those that its own expression cuts, or that are parts of characters."""
    split = gpt2._backend.pre_tokenizer
    tested = 0
    for token, id_ in vocab.items():
        try:
            text = token_bytes(token).decode("utf-8")
        except UnicodeDecodeError:
            continue
        if id_ != gpt2.end_of_text_id and len(split.pre_tokenize_str(text)) == 1:
            assert gpt2.encode(text) == [id_]
            tested += 1
    assert tested > 49_000


@pytest.mark.parametrize("name", ["UTF-8-test.txt", "blns.txt", "tinyshakespeare.txt"])
def test_the_library_gives_the_same_ids(gpt2, folder, name):
    library = ByteLevelBPETokenizer(
        str(folder / "gpt2_encoder.json"), str(folder / "gpt2_vocab.bpe")
    )
    text = (folder / name).read_bytes()[:100_000].decode("utf-8", errors="replace")
    assert gpt2.encode(text) == library.encode(text).ids
    assert gpt2.encode_batch(text.split("\n")) == [
        encoding.ids for encoding in library.encode_batch(text.split("\n"))
    ]


def test_merged_by_hand(gpt2, folder, vocab):
    lines = (folder / "gpt2_vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [line.split(" ") for line in lines]
    assert len(merges) == 50_000
    text = (folder / "blns.txt").read_text(encoding="utf-8")
    words = [word for word, _ in gpt2._backend.pre_tokenizer.pre_tokenize_str(text)]
    assert gpt2.encode(text) == [vocab[token] for token in merge_by_hand(merges, words)]

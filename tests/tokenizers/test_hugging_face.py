"""A tokenizer.json of each kind in the hands of transformers."""

import pytest

from pyllm.tokenizers import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXTS = (
    "Once upon a time, in 2024, there's “a” fox …\n\n   with 你好 🦊 é ﷽\t.",
    "a<|endoftext|> b<|im_start|>",
    " ",
    "",
)


def test_transformers_gives_the_same_ids(any_tokenizer: Tokenizer, tmp_path):
    file = any_tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token="<|endoftext|>"
    )
    assert len(theirs) == any_tokenizer.vocab_size
    assert theirs.eos_token_id == any_tokenizer.end_of_text_id
    assert theirs.convert_tokens_to_ids(list(any_tokenizer.special_tokens)) == list(
        any_tokenizer.special_tokens.values()
    )
    for text in TEXTS:
        ids = any_tokenizer.encode(text)
        assert theirs(text, split_special_tokens=True).input_ids == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        # By itself it reads special tokens in any text.
        assert theirs(text).input_ids == any_tokenizer.encode(text, allow_special=True)

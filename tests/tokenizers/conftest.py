"""A tokenizer of each kind, and byte pair encoding done slowly by hand."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from pyllm.data import write_stories
from pyllm.tokenizers import Tokenizer, byte_tokenizer, train_bpe, train_characters

MANY_CHARACTERS = "naïve – “Straße” … 你好 🦊🦉 <|endoftext|> "
KINDS = ("bytes", "characters", "bpe", "GPT-2")


@pytest.fixture(scope="session")
def make_tokenizer(request: pytest.FixtureRequest) -> Callable[[str], Tokenizer]:
    """A tokenizer of that kind; GPT-2's from the real files, where they are."""

    def make(kind: str) -> Tokenizer:
        texts = [*write_stories(100, 0), MANY_CHARACTERS * 20]
        if kind == "bytes":
            return byte_tokenizer()
        if kind == "characters":
            return train_characters(texts, 400)
        if kind == "bpe":
            return train_bpe(texts, 600)
        folder = request.getfixturevalue("shared_data") / "tokenizer"
        return Tokenizer.from_gpt2(folder / "gpt2_vocab.bpe", folder / "gpt2_encoder.json")

    return make


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(
    request: pytest.FixtureRequest, make_tokenizer: Callable[[str], Tokenizer]
) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    return make_tokenizer(request.param)


def merge_by_hand(merges: Sequence[Sequence[str]], words: Sequence[str]) -> list[str]:
    """The tokens that words become: always the first pair of the list is merged."""
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    tokens: list[str] = []
    for word in words:
        pieces = list(word)
        while True:
            pairs = enumerate(pairwise(pieces))
            found = [(ranks[pair], at) for at, pair in pairs if pair in ranks]
            if not found:
                break
            at = min(found)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        tokens += pieces
    return tokens

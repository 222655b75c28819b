"""What the tests of generation share."""

from collections.abc import Callable

import pytest

from pyllm.tokenizers import Tokenizer, train_bpe


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """These models are so small that a second thread costs more than it brings: on a busy machine,
    waiting for each other made these tests ten times slower."""
    set_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(["Once there was a fox, and the fox was red. "] * 20, 280)

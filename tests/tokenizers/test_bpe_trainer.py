"""Our own BPE trainer: the definition, the example of its page, and the library's merges."""

import doctest
import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllm.data import read_texts
from pyllm.tokenizers import bpe_trainer, train_bpe
from pyllm.tokenizers.bpe_trainer import count_words, learn_merges
from pyllm.tokenizers.byte_level import ALPHABET, words_split

SPLIT = words_split()


def cut(text):
    return [word for word, _ in SPLIT.pre_tokenize_str(text)]


def merges_by_definition(words, alphabet, n_merges):
    """Count every pair anew for each merge."""
    ages = {token: age for age, token in enumerate(alphabet)}
    spelled = [(list(word), times) for word, times in words.items()]
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for word, times in spelled:
            for pair in pairwise(word):
                if len("".join(pair)) <= 31:
                    counts[pair] += times
        if max(counts.values(), default=0) < 2:
            break
        left, right = min(counts, key=lambda pair: (-counts[pair], ages[pair[0]], ages[pair[1]]))
        merges.append((left, right))
        ages[left + right] = len(ages)
        for word, _ in spelled:
            at = 0
            while at < len(word) - 1:
                if word[at : at + 2] == [left, right]:
                    word[at : at + 2] = [left + right]
                at += 1
    return merges


def merges_of(tokenizer):
    content = json.loads(tokenizer._backend.to_str())
    return [tuple(pair) for pair in content["model"]["merges"]]


def test_the_example_of_the_page():
    assert doctest.testmod(bpe_trainer).failed == 0
    assert doctest.testmod(bpe_trainer).attempted == 2


def test_ties_go_to_older_tokens():
    # All four pairs occur twice; "cd" would go first by where it stands, "da" by its right side.
    assert learn_merges({"cd": 2, "da": 2, "ab": 2, "ac": 2}, "abcd", 4) == [
        ("a", "b"),
        ("a", "c"),
        ("c", "d"),
        ("d", "a"),
    ]
    # The order is the alphabet's, not that of the letters; a merge is younger than any letter.
    assert learn_merges({"ab": 2, "ba": 2}, "ba", 1) == [("b", "a")]
    assert learn_merges({"xyz": 3, "ab": 3}, "xyabz", 3) == [("x", "y"), ("a", "b"), ("xy", "z")]


def test_the_left_one_of_overlapping_pairs_is_merged():
    assert learn_merges({"aaaaa": 2}, "a", 9) == [("a", "a"), ("aa", "a"), ("aa", "aaa")]


def test_a_pair_that_occurs_once_is_not_merged():
    assert learn_merges({"ab": 1, "cd": 2}, "abcd", 9) == [("c", "d")]
    assert learn_merges({"ab": 1}, "ab", 9) == learn_merges({}, "ab", 9) == []
    assert learn_merges({"ab": 5}, "ab", 0) == []


@pytest.mark.parametrize("trainer", ["pyllm", "tokenizers"])
def test_no_token_is_longer_than_31_bytes(trainer):
    letters = "abcdefghijklmnopqrstuvwxyzABCDEF"
    for length, tokens in ((31, 1), (32, 2)):
        tokenizer = train_bpe([letters[:length]] * 2, 400, trainer=trainer)
        assert len(tokenizer.encode(letters[:length])) == tokens


def test_more_tokens_than_there_are_characters_before_the_surrogates():
    """Inside, a token is the character of that number; some of these numbers are no characters."""
    alphabet = [chr(code) for code in range(0x10000, 0x10000 + 0xE100)]
    last = "".join(alphabet[0xD7FE:0xD802] + alphabet[-2:])
    assert learn_merges({last: 2, last[:4]: 1}, alphabet, 5) == merges_by_definition(
        {last: 2, last[:4]: 1}, alphabet, 5
    )


WORDS = st.dictionaries(st.text("abc", min_size=1, max_size=12), st.integers(1, 4), max_size=12)


@pytest.mark.fuzz
@given(WORDS, st.permutations("abc"))
def test_the_merges_are_those_of_the_definition(watchdog, words, alphabet):
    watchdog()
    assert learn_merges(words, alphabet, 40) == merges_by_definition(words, alphabet, 40)


# Few letters and few words: nearly every choice is a tie.
TIES = st.sampled_from(["a", "b", "ab", "ba", "aab", "é", "…", " ", "  ", "\n", "1", "12", "'s"])
TEXTS = st.lists(st.lists(TIES, max_size=40).map("".join), min_size=1, max_size=4).filter(any)


@pytest.mark.fuzz
@given(TEXTS | st.lists(st.text(max_size=30), min_size=1).filter(any), st.integers(260, 330))
def test_the_library_learns_the_same_from_ties(watchdog, texts, vocab_size):
    watchdog()
    here, there = (train_bpe(texts, vocab_size, trainer=name) for name in ("pyllm", "tokenizers"))
    assert merges_of(here) == merges_of(there)
    assert here.hash == there.hash


def test_the_library_learns_the_same_from_tinystories(shared_data):
    texts = list(read_texts(str(shared_data / "tinystories" / "train.txt")))
    here, there = (train_bpe(texts, 4096 + 260, trainer=name) for name in ("pyllm", "tokenizers"))
    assert len(merges_of(here)) == 4096
    assert merges_of(here) == merges_of(there)
    assert here.hash == there.hash


# Around the cuts that are made first: spaces of all kinds, printable or not on either side.
NEAR_SPACES = st.text(
    st.sampled_from(" a'!~s\t\n\r\x0b\x1c\x1f\x85\xa0\u2003\u200b\u3000é½1\x7f\x00"), max_size=20
)


@pytest.mark.fuzz
@given(st.lists(NEAR_SPACES | st.text()))
def test_words_are_those_of_the_whole_texts(watchdog, texts):
    watchdog()
    assert count_words(texts, cut) == Counter(word for text in texts for word in cut(text))


def test_each_different_piece_is_cut_once():
    asked = []

    def cut(text):
        asked.append(text)
        return [text]

    words = count_words(["to be or not to be", "to be"], cut)
    assert words == {"to": 2, " be": 3, " or": 1, " not": 1, " to": 1}
    assert len(asked) == 5


def test_the_alphabet_is_the_librarys():
    from tokenizers import pre_tokenizers

    assert sorted(ALPHABET) == sorted(pre_tokenizers.ByteLevel.alphabet())

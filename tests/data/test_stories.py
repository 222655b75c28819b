"""The embedded stories: deterministic, held out as promised, and without ugly seams."""

import re
import time
from collections import Counter

import pytest

from pyllm.data.stories import ALL_PLOTS, split_of, tell_stories, write_stories
from pyllm.data.story_words import BOYS, GIRLS

N = 3000
TRAIN = list(tell_stories(N, seed=0, split="train"))
VALID = list(tell_stories(500, seed=0, split="valid"))
ALL = TRAIN + VALID


def triples(stories):
    return {(story.name, story.thing, story.plot) for story in stories}


def test_same_arguments_give_the_same_stories_and_other_seeds_others():
    first = list(write_stories(50, 7))
    assert first == list(write_stories(50, 7))
    assert first[:20] == list(write_stories(20, 7))
    assert not set(first) & set(write_stories(50, 8))


def test_valid_triples_are_never_seen_in_train():
    assert not triples(TRAIN) & triples(VALID)
    assert not {story.text for story in TRAIN} & {story.text for story in VALID}
    assert all(split_of(s.name, s.thing, s.plot) == "train" for s in TRAIN)
    assert all(split_of(s.name, s.thing, s.plot) == "valid" for s in VALID)


def test_valid_uses_only_names_things_and_plots_that_train_knows():
    for part in range(3):
        known = {triple[part] for triple in triples(TRAIN)}
        assert {triple[part] for triple in triples(VALID)} <= known


def test_stories_are_varied():
    words = Counter(word for s in TRAIN for word in re.findall(r"[a-z'-]+", s.text.lower()))
    assert len(words) >= 1200
    assert len({story.text for story in TRAIN}) == N
    counts = Counter(story.plot for story in TRAIN)
    assert set(counts) == {plot.name for plot in ALL_PLOTS}
    assert min(counts.values()) > N / len(ALL_PLOTS) / 2


def test_length():
    assert all(80 <= len(story.text.split()) <= 220 for story in ALL)


def test_no_unfilled_template_and_no_doubled_word_or_space():
    for story in ALL:
        assert not re.search(r"[{}|\[\]_~=]|  ", story.text), story.text
        doubled = re.search(r"\b(\w+) \1\b", story.text)
        assert doubled is None, (doubled, story.text)


def test_articles_agree():
    for story in ALL:
        wrong = re.search(r"\b[Aa] [aeio]|\b[Aa]n (?!hour)[^aeiouAEIOU]", story.text)
        assert wrong is None, (wrong, story.text)


def test_sentences_begin_with_a_capital_and_end_with_a_mark():
    for story in ALL:
        for paragraph in story.text.split("\n"):
            assert re.match(r'"?[A-Z]', paragraph), paragraph
            assert re.search(r'[.!?]"?$', paragraph), paragraph
        wrong = re.search(r'[^.]\. "?[a-z]', story.text)
        assert wrong is None, (wrong, story.text)


def test_quotes_are_closed_in_every_paragraph():
    for story in ALL:
        for paragraph in story.text.split("\n"):
            assert paragraph.count('"') % 2 == 0, paragraph


def test_pronouns_follow_the_hero():
    girls, boys = set(GIRLS.split()), set(BOYS.split())
    assert not girls & boys
    for story in ALL:
        people = set(re.findall(r"[A-Z][a-z]+", story.text)) & (girls | boys)
        assert story.name in people
        if people <= girls:
            assert not re.search(r"\b([Hh]e|[Hh]im|[Hh]is|himself)\b", story.text), story.text
        if people <= boys:
            assert not re.search(r"\b([Ss]he|[Hh]er|herself)\b", story.text), story.text
        # At most one girl and one boy, so that "he" and "she" are never in doubt.
        assert len(people & girls) <= 1 and len(people & boys) <= 1, story.text


def test_ten_thousand_stories_take_seconds():
    start = time.perf_counter()
    assert sum(1 for _ in write_stories(10_000, 1)) == 10_000
    assert time.perf_counter() - start < 10


def test_bad_arguments():
    with pytest.raises(ValueError, match="split is 'test'; expected one of train, valid"):
        write_stories(1, 0, "test")
    with pytest.raises(ValueError, match="n must be a whole number of at least 0, got -1"):
        write_stories(-1, 0)

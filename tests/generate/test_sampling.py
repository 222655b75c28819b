"""Drawing a token: order, ties, seeds, rows, the ends of the uniform number."""

import math
from collections import Counter

import pytest
import torch

from pyllm.generate import SamplingConfig, sample_token
from pyllm.generate.sampling import _largest

N_DRAWS = 40_000
N_WORDS = 12


def draw(logits: list[float], config: SamplingConfig, seed: int = 0) -> Counter[int]:
    rows = torch.tensor(logits).expand(N_DRAWS, -1)
    generator = torch.Generator().manual_seed(seed)
    return Counter(sample_token(rows, config, generator).tolist())


def random_logits(seed: int = 0) -> list[float]:
    return torch.randn(N_WORDS, generator=torch.Generator().manual_seed(seed)).tolist()


def test_top_p_counts_the_probabilities_that_top_k_left():
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # After top-k the first word has 4/7 and reaches 0.5 alone; before, it would have had 0.4.
    assert set(draw(logits, SamplingConfig(temperature=1.0, top_k=2, top_p=0.5))) == {0}


def test_top_p_counts_the_probabilities_after_the_temperature():
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(draw(logits, SamplingConfig(temperature=0.1, top_p=0.9))) == {0}
    assert set(draw(logits, SamplingConfig(temperature=1.0, top_p=0.9))) == {0, 1, 2}


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_ties_go_to_the_lower_id(top_k):
    logits = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    order = [1, 2, 4, 5, 0, 3, 6, 7]
    config = SamplingConfig(top_k=top_k, top_p=1.0)
    assert set(draw(logits, config)) == set(order[:top_k])


@pytest.mark.parametrize("count", [1, 2, 3, 40, 999, 5000])
def test_the_largest_of_many_are_found(count):
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(count))
    expected = logits.sort(dim=-1, descending=True).values[:, :count]
    assert torch.equal(_largest(logits, count), expected)


def test_of_many_equals_each_is_drawn_as_often():
    """Among 5,000 logits of 7 values, where the id is found by its place among equals."""
    logits = torch.arange(5000).remainder(7).float().tolist()
    drawn = draw(logits, SamplingConfig(temperature=1.0, top_k=700, top_p=1))
    assert set(drawn) == set(range(6, 4900, 7))
    assert max(drawn.values()) < 2.2 * N_DRAWS / 700


def test_a_nucleus_wider_than_the_first_guess_is_found_whole():
    rows = torch.zeros(30_000, 5000)
    config = SamplingConfig(temperature=1.0, top_p=0.5)
    drawn = sample_token(rows[:2000], config, torch.Generator().manual_seed(0))
    assert drawn.max() < 2501 and drawn.max() > 2400


def test_a_narrow_nucleus_in_a_large_vocabulary():
    logits = torch.zeros(1, 5000)
    logits[0, [4000, 10, 300]] = torch.tensor([14.0, 13.0, 12.0])
    config = SamplingConfig(temperature=1.0, top_p=0.9)
    drawn = sample_token(logits.expand(2000, -1), config, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {4000, 10}


def test_rows_are_drawn_each_from_its_own_logits():
    logits = torch.full((64, N_WORDS), -30.0)
    wanted = torch.arange(64) % N_WORDS
    logits[torch.arange(64), wanted] = 30.0
    for config in (SamplingConfig(), SamplingConfig(top_k=4), SamplingConfig(greedy=True)):
        assert torch.equal(sample_token(logits, config), wanted)


def test_a_word_masked_by_minus_infinity_is_never_drawn():
    logits = random_logits()
    logits[3] = -math.inf
    for config in (
        SamplingConfig(temperature=5.0, top_p=1.0),
        SamplingConfig(temperature=5.0, top_k=N_WORDS, top_p=1.0),
        SamplingConfig(temperature=5.0, top_k=N_WORDS - 1, top_p=0.999),
    ):
        assert draw(logits, config)[3] == 0


@pytest.mark.parametrize("config", [SamplingConfig(top_p=1.0), SamplingConfig(top_k=4)])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
def test_the_ends_of_the_uniform_number_draw_possible_words(config, uniform, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, uniform))
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    expected = 2 if uniform > 0.5 else 1
    if config.top_k:  # the most likely first
        expected = 3 - expected
    assert sample_token(logits, config).tolist() == [expected]


def test_greedy_is_argmax_and_its_ties_go_to_the_lower_id():
    logits = torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
    logits[0, [7, 30]] = 100.0
    drawn = sample_token(logits, SamplingConfig(greedy=True))
    assert torch.equal(drawn, logits.argmax(-1)) and drawn[0] == 7


def test_a_tiny_temperature_does_not_overflow():
    logits = torch.tensor([[300.0, 1.0, 280.0]], dtype=torch.bfloat16)
    assert sample_token(logits, SamplingConfig(temperature=1e-30)).tolist() == [0]


def test_the_same_seed_draws_the_same_and_another_one_does_not():
    rows = torch.zeros(32, 1000)
    first, again, other = (
        sample_token(rows, SamplingConfig(), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_generator_for_each_row_draws_what_the_row_alone_would():
    rows = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(min_p=0.02)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    together = [sample_token(rows, config, generators) for _ in range(5)]
    for row in range(8):
        generator = torch.Generator().manual_seed(row)
        alone = [sample_token(rows[row : row + 1], config, generator) for _ in range(5)]
        assert [step[row] for step in together] == [step[0] for step in alone]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        sample_token(logits, SamplingConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0; .* use greedy"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"temperature": math.inf}, "temperature must be above 0"),
        ({"top_k": -1}, r"top_k \(0 for all\) must be a whole number of at least 0, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"min_p": -0.1}, "min_p must be a number from 0 to 1, got -0.1"),
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1, got 1.5"),
        (
            {"repetition_penalty": 0.0},
            "repetition_penalty must be a number from 0.01 to 100, got 0",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number from 0 to 9,223,372,036,854,775,807"),
    ],
)
def test_impossible_settings_are_value_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)

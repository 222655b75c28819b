"""Whatever generation is given: the right tokens, or a ValueError of one line."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyllm.generate import (
    SamplingConfig,
    expert_trace,
    generate_ids,
    generate_text,
    sample_token,
    time_decode,
)
from pyllm.models import ModelConfig, Transformer
from pyllm.tokenizers import train_bpe

SMALL = ModelConfig(vocab_size=67, max_seq_len=8, n_layers=1, d_model=16, n_heads=2, d_ff=8)
ANYTHING = st.one_of(
    st.integers(-2, 70),
    st.floats(),
    st.booleans(),
    st.sampled_from([None, "", "1", [], 2**63 - 1, 2**63, 10**400, -(10**5000), 1 + 0j]),
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SMALL).eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "1"}, "temperature must be above 0 and finite, got '1'"),
        ({"temperature": True}, "temperature must be above 0 and finite, got True"),
        ({"temperature": 10**400}, "temperature must be above 0 and finite, got 1000"),
        ({"top_p": None}, "top_p must be above 0 and at most 1, got None"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, got nan"),
        ({"top_k": 1.5}, r"top_k \(0 for all\) must be a whole number of at least 0, got 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number of at least 1, got True"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to 9,223,372,036,854,775,807, got"),
        ({"seed": "7"}, "seed must be a whole number from 0 to .*, got '7'"),
        ({"greedy": 1}, "greedy must be true or false, got 1"),
        ({"min_p": None}, "min_p must be a number from 0 to 1, got None"),
        ({"min_p": True}, "min_p must be a number from 0 to 1, got True"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must be .* from 0.01 to 100, got n"),
        ({"repetition_penalty": "1"}, "repetition_penalty must be .* from 0.01 to 100, got '1'"),
        ({"stop": 3}, "stop must be texts that are not empty, got 3"),
        ({"stop": ""}, "stop must be texts that are not empty, got ''"),
        ({"stop": ("a", "")}, r"stop must be texts that are not empty, got \('a', ''\)"),
        ({"stop": {"a"}}, "stop must be texts that are not empty, got {'a'}"),
        ({"stop": (b"a",)}, "a text in stop must be a str, not bytes"),
        ({"stop": ["caf\udce9"]}, "a text in stop has no UTF-8 form"),
    ],
)
def test_settings_of_another_kind(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


def test_one_stop_string_is_not_a_string_of_letters() -> None:
    assert SamplingConfig(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingConfig(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore:the prompt has .* tokens")
@given(
    settings=st.dictionaries(
        st.sampled_from([field.name for field in fields(SamplingConfig)]),
        ANYTHING,
        max_size=3,
    ),
    ids=st.one_of(
        st.lists(st.integers(0, 66), max_size=12),
        st.lists(st.one_of(st.integers(-1, 67), ANYTHING), max_size=4),
        st.just(torch.tensor([1, 2])),
        st.just(np.array([3, 66])),
    ),
)
def test_any_settings_and_prompt(
    watchdog: Callable[[], None], model: Transformer, settings: dict[str, Any], ids: Any
) -> None:
    watchdog()
    try:
        config = SamplingConfig(**{"max_new_tokens": 2} | settings)
        drawn = generate_ids(model, ids, config)
        first = next(drawn)
    except ValueError as error:
        assert "\n" not in str(error) and 20 < len(str(error)) < 300
        return
    assert all(type(one) is not bool and 0 <= int(one) < 67 for one in ids)
    assert 0 <= first < 67
    if config.greedy or config.top_k == 1:
        seen = [int(one) for one in ids]
        told = sorted(set(seen))
        if len(ids) > 8:  # cut to what leaves room for an answer
            seen = seen[-(8 - min(config.max_new_tokens, 4)) :]
        logits_V = model(torch.tensor([seen])).logits[0, -1].detach()
        penalty, logit = config.repetition_penalty, logits_V[told]
        logits_V[told] = torch.where(logit < 0, logit * penalty, logit / penalty)
        assert first == int(logits_V.argmax())


FLOAT_MAX = torch.finfo(torch.float32).max
EDGES = [0.0, -0.0, 1e-45, 1e-38, -1e38, 3e38, 1e39, 1e300, math.inf, -math.inf, math.nan, 80.0]


@pytest.mark.fuzz
@given(
    logits=hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
        elements=st.one_of(st.sampled_from(EDGES), st.integers(-3, 3).map(float)),
    ),
    temperature=st.one_of(st.floats(0, exclude_min=True, allow_infinity=False), st.just(1.0)),
    top_k=st.integers(0, 7),
    top_p=st.one_of(st.floats(0, 1, exclude_min=True), st.just(1.0)),
    min_p=st.one_of(st.floats(0, 1), st.just(0.0)),
    penalty=st.one_of(st.floats(0.01, 100), st.just(1.0)),
    greedy=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_any_logits(
    watchdog: Callable[[], None],
    logits: Any,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    greedy: bool,
) -> None:
    """A drawn word is one that the definition allows: kept by top-k, top-p and min-p."""
    watchdog()
    config = SamplingConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        greedy=greedy,
    )
    rows = torch.from_numpy(logits).float()
    possible = logits.ndim == 2 and logits.shape[1] > 0
    possible = possible and bool((rows.amax(-1).isfinite()).all()) and not bool(rows.isnan().any())
    try:
        every_second = torch.zeros(logits.shape, dtype=torch.bool)
        every_second[..., ::2] = True
        drawn = sample_token(torch.from_numpy(logits), config, seen_BV=every_second)
    except ValueError as error:
        assert not possible
        assert "\n" not in str(error) and str(error).startswith("sample_token: the logits")
        return
    assert possible
    assert drawn.shape == logits.shape[:1] and drawn.dtype == torch.int64
    moved = torch.where(rows < 0, rows * penalty, rows / penalty).clamp(-FLOAT_MAX, FLOAT_MAX)
    rows[:, ::2] = moved.where(rows > -math.inf, rows)[:, ::2]
    for row, word in zip(rows.tolist(), drawn.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda one: (-row[one], one))
        place = order.index(word)
        assert row[word] > -math.inf
        if greedy:
            assert place == 0
            continue
        assert place < (top_k or len(row))
        kept = order[: top_k or len(row)]
        weights = [math.exp(max((row[one] - row[kept[0]]) / temperature, -800.0)) for one in kept]
        assert sum(weights[:place]) / sum(weights) < top_p + 1e-5
        assert weights[place] > 0 or place == 0
        assert weights[place] > min_p - 1e-5


@pytest.mark.parametrize("settings", [{"temperature": 1e-320}, {"top_p": 1e-320}])
@pytest.mark.parametrize("top_k", [0, 3])
def test_what_is_zero_as_a_float32_takes_the_likeliest(
    settings: dict[str, float], top_k: int
) -> None:
    logits = torch.tensor([[0.5, 2.0, 1.0, -3.0]])
    assert sample_token(logits, SamplingConfig(**settings, top_k=top_k)).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e38, 1e300])
def test_a_huge_temperature_does_not_mix_up_the_order(temperature: float) -> None:
    logits = torch.tensor([0.0, 1e-8, 3e-8, 2e-8, -math.inf]).expand(200, -1)
    drawn = sample_token(logits, SamplingConfig(temperature=temperature, top_k=2, top_p=1.0))
    assert set(drawn.tolist()) == {2, 3}
    drawn = sample_token(logits, SamplingConfig(temperature=temperature, top_p=0.7))
    assert set(drawn.tolist()) == {1, 2, 3}


def test_logits_beyond_float32_are_refused() -> None:
    logits = torch.tensor([[1e300, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="the logits hold NaN or infinity"):
        sample_token(logits, SamplingConfig())


def test_a_penalty_at_the_end_of_float32_keeps_a_word_possible() -> None:
    logits, seen = torch.tensor([[0.0, -3e38]]), torch.tensor([[False, True]])
    config = SamplingConfig(temperature=1e38, top_p=1.0, repetition_penalty=100.0)
    drawn = sample_token(logits.expand(2000, -1), config, None, seen.expand(2000, -1))
    assert set(drawn.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="the logits hold NaN or infinity"):
        sample_token(torch.full((1, 2), -math.inf), config, None, seen)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (None, "a repetition penalty needs seen_BV, the tokens so far"),
        (torch.zeros(2, 3), r"seen_BV must be bool of shape \(2, 3\), got torch.float32 \(2, 3\)"),
        (torch.zeros(1, 3).bool(), r"seen_BV must be bool of shape \(2, 3\), got .* \(1, 3\)"),
    ],
)
def test_seen_words_of_another_shape_or_kind(seen: Any, message: str) -> None:
    config = SamplingConfig(repetition_penalty=1.1)
    with pytest.raises(ValueError, match=f"sample_token: {message}"):
        sample_token(torch.zeros(2, 3), config, seen_BV=seen)


def test_generators_that_are_not_one_for_each_row() -> None:
    with pytest.raises(ValueError, match="expected one generator for each of 2 rows, got 1"):
        sample_token(torch.zeros(2, 3), SamplingConfig(), [torch.Generator()])


@pytest.mark.parametrize(
    "logits", [torch.zeros(3), torch.zeros(1, 1, 3), torch.zeros(2, 0), torch.zeros(1, 3).int()]
)
def test_logits_of_another_shape_or_kind(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be floating point of shape \(rows, words\), got"):
        sample_token(logits, SamplingConfig())


def test_more_words_than_the_vocabulary_has_are_all_of_them() -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    draws = [
        sample_token(logits, SamplingConfig(top_k=k), torch.Generator().manual_seed(1))
        for k in (5, 6, 10**30)
    ]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([67], "token 67 is not in the model's vocabulary of 67"),
        ([-1], "token -1 is not in the model's vocabulary of 67"),
        ([10**400], "is not in the model's vocabulary of 67"),
        ([1.5], r"the ids must be whole numbers, got \[1.5\]"),
        ([True], r"the ids must be whole numbers, got \[True\]"),
        ("fox", "the ids must be whole numbers, got 'fox'"),
        (None, "the ids must be whole numbers, got None"),
        (torch.zeros(1, 2).long(), "the ids must be whole numbers, got tensor"),
        ([], "expected at least one token"),
    ],
)
def test_ids_that_are_none(model: Transformer, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"generate_ids: .*{message}"):
        next(generate_ids(model, ids, SamplingConfig()))
    with pytest.raises(ValueError, match=f"expert_trace: .*{message}"):
        expert_trace(model, ids)


def test_a_text_that_is_none_and_one_longer_than_the_context() -> None:
    tokenizer = train_bpe(["Once there was a fox. "] * 20, 280)
    small = ModelConfig(tokenizer.vocab_size, 8, 1, 16, 2, d_ff=8)
    model = Transformer(small).eval()
    config = SamplingConfig(max_new_tokens=3, seed=0)
    with pytest.raises(ValueError, match="must be a str, not NoneType"):
        generate_text(model, tokenizer, None, config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a lone surrogate"):
        generate_text(model, tokenizer, "caf\udce9", config)
    with pytest.warns(UserWarning, match="the prompt has 351 tokens"):
        text = generate_text(model, tokenizer, "Once there was a fox. " * 50, config)
    assert isinstance(text, str)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (1, 0, 4), (1, 4, 1), (1.5, 4, 4), (1, "4", 4)])
def test_timings_of_no_size(model: Transformer, sizes: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least"):
        time_decode(model, *sizes)

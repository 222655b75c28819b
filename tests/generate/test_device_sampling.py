"""Drawing on the device: the claimed distribution, and the tokens of the sampler on the host."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyllm.generate import SamplingConfig, device_sampling, sample_token
from pyllm.generate.device_sampling import DeviceSettings, draw_tokens, way_of
from pyllm.testing.source_mutants import source_mutants

from .claimed import FALSE_ALARM, claimed, p_value
from .test_distribution import CASES, Case


def draw(
    logits_BV: Tensor, config: SamplingConfig, u_B: Tensor, seen_BV: Tensor | None, module=None
) -> Tensor:
    module = device_sampling if module is None else module
    settings = module.DeviceSettings.on(logits_BV.device)
    settings.set(config, logits_BV.shape[1])
    tokens_B, sound_B = module.draw_tokens(logits_BV, module.way_of(config), settings, u_B, seen_BV)
    assert bool(sound_B.all())
    return tokens_B


def p_of(case: Case, module, n_draws: int, seed: int = 0) -> float:
    """Of what is drawn, in rows with rows of other logits between them."""
    rows = torch.tensor(case.logits).repeat(2 * n_draws, 1)
    rows[::2] = rows[::2].flip(1)
    seen = torch.zeros_like(rows, dtype=torch.bool)
    seen[1::2, list(case.seen)] = True
    u_B = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed))
    drawn_B = draw(rows, case.config, u_B, seen if case.seen else None, module)
    claim = claimed(case.logits, case.config, case.seen)
    return p_value(Counter(drawn_B[1::2].tolist()), claim)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_draws_from_the_claimed_distribution(case: Case) -> None:
    assert p_of(case, device_sampling, 40_000) > FALSE_ALARM


_NAME = "only a name"
_ROUNDING = "whether a sum that should meet the threshold exactly does is a matter of rounding"
_UNSOUND = "only for logits that are not finite: the tests below"
_CARD = "on the CPU a short sort is always stable, and sums are always added in one order"
INVISIBLE = {
    "Way: ('greedy', 'whole', 'sorted') -> ('whole', 'greedy', 'sorted')": _NAME,
    "Way: 'greedy' -> 'greedy?'": _NAME,
    "Way: 'whole' -> 'whole?'": _NAME,
    "Way: 'sorted' -> 'sorted?'": _NAME,
    "way_of: 1 -> 2": "only slower: all words are put in order",
    "way_of: 'whole' -> 'whole?'": "only slower: all words are put in order",
    "way_of: 'sorted' -> 'sorted?'": _NAME,
    "draw_tokens: 'whole' -> 'whole?'": "only slower: all words are put in order",
    "draw_tokens: logits_BV.float() -> logits_BV": "only in half precision: the last test",
    "draw_tokens: logits_BV.amax(-1).isfinite() -> logits_BV.amax(-1)": _UNSOUND,
    "draw_tokens: -1 -> -2": _UNSOUND,
    "draw_tokens: True -> False (2)": _CARD,
    "draw_tokens: p_BV.double() -> p_BV": _CARD,
    "draw_tokens: (before_BV.float() < settings.top_p) | (settings.top_p >= 1) -> "
    "before_BV.float() < settings.top_p": "only the last words of a long tail",
    "draw_tokens: settings.top_p >= 1 -> settings.top_p > 1": "only the last words of a long tail",
    "draw_tokens: 1 -> 2 (2)": "only the last words of a long tail",
    "draw_tokens: before_BV.float() < settings.top_p -> before_BV.float() <= settings.top_p": (
        _ROUNDING
    ),
    "draw_tokens: before_BV.float() -> before_BV": _ROUNDING,
    "_draw: weights_BV.double() -> weights_BV": _CARD,
    "_draw: True -> False": "seen only where the uniform number is 0: the tests below",
    "_draw: place_B1.squeeze(1).clamp(max=weights_BV.shape[1] - 1) -> place_B1.squeeze(1)": (
        _UNSOUND
    ),
    "_draw: weights_BV.shape[1] - 1 -> weights_BV.shape[1] + 1": _UNSOUND,
    "_draw: weights_BV.shape[1] - 1 -> weights_BV.shape[1]": _UNSOUND,
}


@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")  # of a spoilt one
def test_every_spoilt_place_is_found_out() -> None:
    """Every operator, constant, index and call, one at a time."""

    def survives(mutant) -> bool:
        try:
            module = mutant.module(device_sampling)
            return all(p_of(case, module, 4_000) > FALSE_ALARM for case in CASES.values())
        except Exception:
            return False

    alive = {mutant.name for mutant in source_mutants(device_sampling) if survives(mutant)}
    assert sorted(alive - INVISIBLE.keys()) == []
    assert sorted(INVISIBLE.keys() - alive) == [], "these are seen: take them off the list"


@pytest.mark.parametrize("n_words", [3, 67, 12_000])
def test_the_tokens_are_those_of_the_host(n_words: int) -> None:
    """For the same uniform numbers, over settings of all kinds."""
    generator = torch.Generator().manual_seed(n_words)
    config = SamplingConfig(repetition_penalty=1.3, temperature=0.7)
    for number in range(30):
        logits_BV = 3 * torch.randn(4, n_words, generator=generator)
        logits_BV[:, ::3] = logits_BV[:, ::3].round()  # equals
        seen_BV = torch.rand(4, n_words, generator=generator) < 0.2
        top_k = (0, 1, 50, 0)[number % 4]
        top_p = (1.0, 0.9, 0.3)[number % 3]
        min_p = (0.0, 0.05)[number % 2]
        chosen = replace(
            config, top_k=top_k, top_p=top_p, min_p=min_p, temperature=0.4 + number / 10
        )
        generators = [torch.Generator().manual_seed(row) for row in range(4)]
        u_B = torch.stack(
            [torch.rand((), generator=torch.Generator().manual_seed(row)) for row in range(4)]
        )
        host = sample_token(logits_BV, chosen, generators, seen_BV)
        assert draw(logits_BV, chosen, u_B, seen_BV).tolist() == host.tolist()


@pytest.mark.parametrize("way", ["greedy", "whole", "sorted"])
def test_rows_that_are_not_finite_are_told_and_draw_a_word(way: str) -> None:
    config = {
        "greedy": SamplingConfig(greedy=True),
        "whole": SamplingConfig(top_p=1.0),
        "sorted": SamplingConfig(top_k=2),
    }[way]
    assert way_of(config) == way
    logits_BV = torch.tensor([[0.0, 1.0, 2.0], [0.0, math.nan, 1.0], [math.inf, 0.0, 0.0]])
    logits_BV = torch.cat([logits_BV, torch.full((1, 3), -math.inf), torch.full((1, 3), math.nan)])
    settings = DeviceSettings.on(logits_BV.device)
    settings.set(config, 3)
    tokens_B, sound_B = draw_tokens(logits_BV, way_of(config), settings, torch.full((5,), 0.999))
    assert sound_B.tolist() == [True, False, False, False, False]
    assert all(0 <= token < 3 for token in tokens_B.tolist())
    assert tokens_B[0] == (1 if way == "sorted" else 2)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_numbers_draw_words_that_have_a_weight(u: float) -> None:
    logits_BV = torch.full((1, 3000), -math.inf)
    logits_BV[0, 5:2995] = 0.0
    drawn = draw(logits_BV, SamplingConfig(top_p=1.0), torch.tensor([u]), None)
    assert drawn.tolist() == [5 if u == 0 else 2994]
    drawn = draw(logits_BV, SamplingConfig(top_k=7, top_p=1.0), torch.tensor([u]), None)
    assert drawn.tolist() == [5 if u == 0 else 11]


def test_half_precision_is_drawn_from_in_float32() -> None:
    logits_BV = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)).half()
    u_B = torch.rand(8, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(top_p=0.9)
    assert torch.equal(
        draw(logits_BV, config, u_B, None), draw(logits_BV.float(), config, u_B, None)
    )

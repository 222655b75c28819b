"""Sampling draws from the distribution it claims, and a sampler that does not is found out."""

import inspect
import math
from collections import Counter
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch

from pyllm.generate import SamplingConfig, sampling
from pyllm.testing.source_mutants import source_mutants

from .claimed import FALSE_ALARM, chi_square_tail, claimed, p_value

PLAIN = SamplingConfig(temperature=1.0, top_p=1.0)
# Twelve words of probabilities from 0.002 to 0.3, in no order, of either sign.
LOGITS = (0.3, -1.9, 1.7, -0.4, 0.9, -3.1, 1.2, 0.1, -0.8, 2.1, -1.3, 0.6)
MASKED = (*LOGITS[:8], -math.inf)
TIES = (0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
FOUR = tuple(math.log(p) for p in (0.1, 0.4, 0.2, 0.3))


@dataclass(frozen=True)
class Case:
    """Settings, logits, and what else a sampler is given."""

    config: SamplingConfig
    logits: tuple[float, ...] = LOGITS
    seen: tuple[int, ...] = ()
    """Words that the text already holds."""
    guess: int = 1024
    """How many words top-p looks at first."""
    each: bool = False
    """A generator for each row."""

    def counts(self, module: ModuleType, n_draws: int, seed: int) -> Counter[int]:
        """What this sampler draws, in rows with rows of other logits between them."""
        rows = torch.tensor(self.logits).repeat(2 * n_draws, 1)
        rows[::2] = rows[::2].flip(1)
        seen = torch.zeros_like(rows, dtype=torch.bool)
        seen[1::2, list(self.seen)] = True
        generator = torch.Generator().manual_seed(seed)
        given = [generator] * len(rows) if self.each else generator
        usual = module.NUCLEUS_GUESS, module.SMALL_VOCABULARY
        module.NUCLEUS_GUESS = module.SMALL_VOCABULARY = self.guess
        try:
            drawn = module.sample_token(rows, self.config, given, seen if self.seen else None)
        finally:
            module.NUCLEUS_GUESS, module.SMALL_VOCABULARY = usual
        return Counter(drawn[1::2].tolist())

    def p_value(self, module: ModuleType, n_draws: int, seed: int = 0) -> float:
        """Of what the sampler draws; see :func:`claimed.p_value`."""
        claim = claimed(self.logits, self.config, self.seen)
        return p_value(self.counts(module, n_draws, seed), claim)


CASES = {
    "as it is": Case(PLAIN),
    "top-k 1": Case(replace(PLAIN, top_k=1)),
    "top-p 0.6": Case(replace(PLAIN, top_p=0.6)),
    "a penalty": Case(replace(PLAIN, repetition_penalty=1.5), seen=(0, 2, 3, 5, 9)),
    "cold": Case(replace(PLAIN, temperature=0.6)),
    "hot": Case(replace(PLAIN, temperature=2.5)),
    "a masked word": Case(replace(PLAIN, temperature=3.0), MASKED),
    "a generator for each row": Case(PLAIN, each=True),
    "top-k 5": Case(replace(PLAIN, top_k=5)),
    "top-k of more words than there are": Case(replace(PLAIN, top_k=100)),
    "top-k 3 among equals": Case(replace(PLAIN, top_k=3), TIES),
    "top-k 6 among equals": Case(replace(PLAIN, top_k=6), TIES),
    "top-p of next to nothing": Case(replace(PLAIN, top_p=1e-320)),
    "top-p 0.95": Case(replace(PLAIN, top_p=0.95)),
    "top-p within the words looked at first": Case(replace(PLAIN, top_p=0.5), guess=4),
    "top-p beyond the words looked at first": Case(replace(PLAIN, top_p=0.9), guess=4),
    "top-p beyond them, hot": Case(replace(PLAIN, temperature=2.5, top_p=0.85), guess=7),
    "top-p among equals": Case(replace(PLAIN, top_p=0.4), TIES, guess=2),
    "min-p 0.3": Case(replace(PLAIN, min_p=0.3)),
    "min-p 1": Case(replace(PLAIN, min_p=1.0), TIES),
    "a penalty for what is unlikely": Case(
        replace(PLAIN, repetition_penalty=3.0), seen=(1, 3, 8, 10)
    ),
    "a reward": Case(replace(PLAIN, repetition_penalty=0.4), seen=(1, 4, 8, 11)),
    "a penalty for a masked word": Case(
        replace(PLAIN, repetition_penalty=1.5, temperature=1e38), MASKED, seen=(2, 8)
    ),
    # Each counts what the ones before it left.
    "all of them": Case(
        SamplingConfig(temperature=1.6, top_k=7, top_p=0.93, min_p=0.35, repetition_penalty=1.4),
        seen=(2, 4, 8, 9),
    ),
    "top-k before top-p": Case(replace(PLAIN, top_k=2, top_p=0.5), FOUR),
    "temperature before top-p": Case(replace(PLAIN, temperature=0.4, top_p=0.9)),
    "temperature before min-p": Case(replace(PLAIN, temperature=0.4, min_p=0.2)),
    "greedy": Case(replace(PLAIN, greedy=True)),
    "greedy after a penalty": Case(
        replace(PLAIN, greedy=True, repetition_penalty=3.0), seen=(2, 9)
    ),
}

_SAME = "the same by definition"
_SLOWER = "only slower: more words are put in order than need be"
_ROUNDING = "whether a sum that should meet the threshold exactly does is a matter of rounding"
_EITHER = "both ways sort alike"
_FEW = "so few numbers are put in order whatever the partition is: test_sampling.py"
_NO_GRADIENT = "the same for logits that need no gradient"
_GUESS = (
    "if n_words > max(SMALL_VOCABULARY, NUCLEUS_GUESS): assert total_B1 is not None "
    "values_BC = _largest(logits_BV, NUCLEUS_GUESS) covered_B1 = "
    "(_log_sum(scaled(values_BC)) - total_B1).exp() if bool((covered_B1 >= "
    "config.top_p).all()): return values_BC"
)
_ENDS = "seen only where the uniform number is 0 or rounds to 1: test_sampling.py"
INVISIBLE = {
    "NUCLEUS_GUESS: 1024 -> 1025": _SLOWER,
    "NUCLEUS_GUESS: 1024 -> 1023": _SLOWER,
    "SMALL_VOCABULARY: 8192 -> 8191": _SLOWER,
    "SMALL_VOCABULARY: 8192 -> 8193": _SLOWER,
    "sample_token: min(max(config.temperature, LIMITS.tiny), LIMITS.max) -> "
    "min(LIMITS.max, max(config.temperature, LIMITS.tiny))": _SAME,
    "sample_token: 1 -> 2": _SLOWER,
    "sample_token: config.top_p < 1 -> config.top_p <= 1": _SAME,
    "sample_token: 1 -> 2 (2)": _SAME,
    "sample_token: before_BC < config.top_p -> before_BC <= config.top_p": _ROUNDING,
    "penalised: logits_BV < 0 -> logits_BV <= 0": "nothing, multiplied or divided",
    "penalised: moved_BV.clamp(LIMITS.min, LIMITS.max) -> moved_BV": (
        "only of logits near the end of float32: test_bad_input.py"
    ),
    "_candidates: min(config.top_k, n_words) -> min(n_words, config.top_k)": _SAME,
    "_candidates: (_log_sum(scaled(values_BC)) - total_B1).exp() -> "
    "_log_sum(scaled(values_BC)) - total_B1": _SLOWER,
    "_candidates: _log_sum(scaled(values_BC)) -> scaled(values_BC)": _SLOWER,
    "_candidates: bool((covered_B1 >= config.top_p).all()) -> (covered_B1 >= config.top_p).all()": (
        _SAME
    ),
    "_candidates: covered_B1 >= config.top_p -> covered_B1 > config.top_p": _SLOWER,
    f"_candidates: {_GUESS} -> {_GUESS.replace('if n_words', 'if not n_words')}": _SLOWER,
    "_candidates: n_words > max(SMALL_VOCABULARY, NUCLEUS_GUESS) -> "
    "n_words >= max(SMALL_VOCABULARY, NUCLEUS_GUESS)": _SLOWER,
    "_ids_at: (:, 1) -> (1, :)": "only slower: the longer way is gone for all",
    "_largest: 'cpu' -> 'cpu?'": _EITHER,
    "_largest: if logits_BV.device.type != 'cpu': return logits_BV.topk(count, dim=-1).values -> "
    "if not logits_BV.device.type != 'cpu': return logits_BV.topk(count, dim=-1).values": _EITHER,
    "_largest: logits_BV.device.type != 'cpu' -> logits_BV.device.type == 'cpu'": _EITHER,
    "_largest: logits_BV.topk(count, dim=-1) -> logits_BV": "only elsewhere than on the CPU",
    "_largest: logits_BV.detach() -> logits_BV": _NO_GRADIENT,
    "_largest: logits_BV.detach().numpy() -> logits_BV.detach()": _NO_GRADIENT,
    "_largest: count < negative_BC.shape[1] -> count <= negative_BC.shape[1]": _SLOWER,
    "_largest: -1 -> -2": "only elsewhere than on the CPU",
    "_largest: 1 -> 2 (2)": _FEW,
    "_largest: count - 1 -> 1": _FEW,
    "_largest: count - 1 -> count": _FEW,
    "_largest: count - 1 -> count + 1": _FEW,
    "_draw: u_B1.to(weights_BC.device) -> u_B1": "the same on the CPU",
    "_draw: torch.minimum(u_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))"
    " -> torch.minimum(torch.nextafter(total_B1, torch.zeros_like(total_B1)), u_B1 * total_B1)": (
        _SAME
    ),
    "_draw: torch.zeros_like(total_B1) -> total_B1": _ENDS,
    "_draw: True -> False": _ENDS,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_draws_from_the_claimed_distribution(case: Case) -> None:
    assert case.p_value(sampling, n_draws=40_000) > FALSE_ALARM


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name)
        for name, case in CASES.items()
        if case.logits != TIES and not case.config.greedy and case.config.temperature < 1e9
    ],
)
def test_the_claim_is_that_of_transformers(case: Case) -> None:
    """Same filters, same order as in its ``generate``; of equals it keeps all, so none here."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.generation import logits_process as theirs

    config = case.config
    seen = torch.tensor([case.seen], dtype=torch.int64)
    filters = [
        theirs.RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)),
        theirs.TemperatureLogitsWarper(config.temperature),
        theirs.TopKLogitsWarper(config.top_k or len(case.logits)),
        theirs.TopPLogitsWarper(config.top_p),
        theirs.MinPLogitsWarper(config.min_p),
    ]
    scores = torch.tensor([case.logits], dtype=torch.float64)
    for one in filters:
        scores = one(seen, scores)
    expected = scores.softmax(-1)[0].tolist()
    assert claimed(case.logits, config, case.seen) == pytest.approx(expected, abs=1e-12)


def survives(module: ModuleType) -> bool:
    try:
        return all(case.p_value(module, n_draws=1500) > FALSE_ALARM for case in CASES.values())
    except Exception:  # it does not even run
        return False


FAULTS = {
    "temperature squared": ("div_(temperature)", "div_(temperature**2)"),
    "temperature left out": ("div_(temperature)", "div_(1.0)"),
    "no renormalisation": ("torch.minimum(u_B1 * total_B1, ", "torch.minimum(u_B1, "),
    "the nucleus a word too small": ("before_BC < config", "before_BC + p_BC < config"),
    "the nucleus a word too large": ("before_BC < config", "before_BC - p_BC < config"),
    "top-p before top-k": ("_log_sum(scaled_BC)", "_log_sum(scaled(logits_BV))"),
    "top-p before the temperature": (
        "p_BC = (scaled_BC - total_B1).exp()",
        "p_BC = (values_BC - logits_BV.logsumexp(-1, keepdim=True)).exp()",
    ),
    "top-k a word too large": ("min(config.top_k, n_words)", "min(config.top_k + 1, n_words)"),
    "min-p of the whole": ("weights_BC >= min_p", "weights_BC >= min_p * weights_BC.sum()"),
    "min-p before the temperature": (
        "_weights(scaled_BC, config.min_p)",
        "_weights(scaled_BC, config.min_p ** (1 / config.temperature))",
    ),
    "CTRL's own penalty": ("logits_BV * penalty", "logits_BV / penalty"),
    "a penalty for words that are new": ("where(seen_BV, logits_BV)", "where(~seen_BV, logits_BV)"),
    "one uniform number for all rows": (
        "torch.rand(weights_BC.shape[0], 1, generator=generator)",
        "torch.rand(1, 1, generator=generator).expand(len(weights_BC), 1)",
    ),
    "always the most likely word": ("    if config.greedy:", "    if True:"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_sampler_with_a_fault_is_found_out(fault: tuple[str, str]) -> None:
    before, after = fault
    source = inspect.getsource(sampling)
    assert before in source
    module = ModuleType("spoilt")
    exec(compile(source.replace(before, after), "<spoilt>", "exec"), vars(module))
    assert not survives(module)


def test_every_spoilt_place_is_found_out() -> None:
    """Every operator, constant, index and call, one at a time; ``_checked`` only refuses."""
    refusals = ("_checked", "NOT_FINITE")
    mutants = [one for one in source_mutants(sampling) if not one.name.startswith(refusals)]
    assert len(mutants) > 100
    alive = {mutant.name for mutant in mutants if survives(mutant.module(sampling))}
    assert sorted(alive - INVISIBLE.keys()) == []
    assert sorted(INVISIBLE.keys() - alive) == [], "these are seen: take them off the list"


def test_the_tail_of_chi_square() -> None:
    """Critical values of Abramowitz & Stegun 1964, table 26.8."""
    for statistic, freedom, tail in (
        (3.84146, 1, 0.05),
        (9.21034, 2, 0.01),
        (16.2662, 3, 0.001),
        (18.3070, 10, 0.05),
        (24.9958, 15, 0.05),
    ):
        assert chi_square_tail(statistic, freedom) == pytest.approx(tail, rel=1e-4)
        assert chi_square_tail(0.0, freedom) == 1.0


def test_the_claim_is_the_definition() -> None:
    """Worked by hand: each filter alone."""
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert claimed(logits, PLAIN) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert claimed(logits, replace(PLAIN, top_k=2)) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert claimed(logits, replace(PLAIN, top_p=0.75)) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9])
    assert claimed(logits, replace(PLAIN, min_p=0.6)) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    squared = [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]
    assert claimed(logits, replace(PLAIN, temperature=0.5)) == pytest.approx(squared)
    # log 0.1 is negative: twice it is log 0.01.
    config = replace(PLAIN, repetition_penalty=2.0)
    one = 0.01 + 0.4 + 0.2 + 0.3
    assert claimed(logits, config, [0]) == pytest.approx(
        [0.01 / one, 0.4 / one, 0.2 / one, 0.3 / one]
    )
    assert claimed([4.0, 2.0], config, [0]) == pytest.approx([0.5, 0.5])


def test_draws_that_are_too_even_are_none() -> None:
    assert p_value(Counter({0: 5000, 1: 5000, 2: 5000, 3: 5000}), [0.25] * 4) < FALSE_ALARM
    assert p_value(Counter({0: 5000, 1: 5100, 2: 4950, 3: 4950}), [0.25] * 4) > 0.01

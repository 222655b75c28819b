"""The distribution a sampler claims, from its definition in plain Python, and the chi-square."""

import math
from collections import Counter
from collections.abc import Collection, Sequence

from pyllm.generate import SamplingConfig

FALSE_ALARM = 1e-9
"""A sound sampler fails a test with this probability, were the seed drawn anew."""


def claimed(
    logits: Sequence[float], config: SamplingConfig, seen: Collection[int] = ()
) -> list[float]:
    """Probabilities in float64: penalty, temperature, top-k, top-p, min-p, one after the other."""
    scores = list(logits)
    for word in seen:
        by = config.repetition_penalty
        scores[word] = scores[word] * by if scores[word] < 0 else scores[word] / by
    best = max(scores)
    if config.greedy:
        return [float(word == scores.index(best)) for word in range(len(scores))]
    odds = {
        word: math.exp((score - best) / config.temperature)
        for word, score in enumerate(scores)
        if score > -math.inf
    }
    order = sorted(odds, key=lambda word: (-scores[word], word))
    kept = order[: config.top_k or len(order)]
    total = math.fsum(odds[word] for word in kept)
    for place in range(len(kept)):
        if math.fsum(odds[word] for word in kept[: place + 1]) / total >= config.top_p:
            kept = kept[: place + 1]
            break
    kept = [word for word in kept if odds[word] >= config.min_p * odds[kept[0]]]
    total = math.fsum(odds[word] for word in kept)
    return [odds[word] / total if word in kept else 0.0 for word in range(len(logits))]


def p_value(counts: Counter[int], probabilities: Sequence[float]) -> float:
    """How often draws from these probabilities would be as far from them, or as near, by chance.

    Pearson's statistic, two-sided: counts that fit too well are not drawn independently either.
    Words of fewer than five expected draws are taken together. 0 for an impossible word.
    """
    n_draws = sum(counts.values())
    expected = {word: n_draws * p for word, p in enumerate(probabilities) if p > 0}
    if not set(counts) <= set(expected):
        return 0.0
    cells = [(counts[word], number) for word, number in expected.items() if number >= 5]
    rare = [(counts[word], number) for word, number in expected.items() if number < 5]
    if rare:
        cells.append((sum(found for found, _ in rare), math.fsum(number for _, number in rare)))
    if len(cells) == 1:
        return 1.0
    statistic = math.fsum((found - number) ** 2 / number for found, number in cells)
    tail = chi_square_tail(statistic, len(cells) - 1)
    return 2 * min(tail, 1 - tail)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """P(X >= statistic) of chi-square: a finite sum for whole freedoms from 1.

    Abramowitz & Stegun 1964, 26.4.4 and 26.4.5.
    """
    half, first = statistic / 2, freedom % 2 / 2
    powers = [first + number for number in range(freedom // 2)]
    tail = math.fsum(half**power / math.gamma(power + 1) for power in powers) * math.exp(-half)
    return tail + (math.erfc(math.sqrt(half)) if first else 0.0)

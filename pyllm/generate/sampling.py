"""Drawing the next token from its logits."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pyllm.generate.config import SamplingConfig

NUCLEUS_GUESS = 1024
"""Top-p looks at this many tokens of a large vocabulary first. They almost always hold the nucleus;
if not, all are sorted, which takes four times as long."""
SMALL_VOCABULARY = 8192
"""Up to here, all are sorted at once: 40 microseconds for 4,096."""

LIMITS = torch.finfo(torch.float32)
NOT_FINITE = (
    "sample_token: the logits hold NaN or infinity; the model's weights are damaged or too large "
    "for its dtype"
)


def sample_token(
    logits_BV: Tensor,
    config: SamplingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    seen_BV: Tensor | None = None,
) -> Tensor:
    """Draw one token for each row: repetition penalty, temperature, top-k, top-p, min-p.

    That is the order of Hugging Face's ``generate``. Exactly ``top_k`` tokens are kept, and the
    nucleus is the shortest prefix of the tokens, the most likely first, whose probability (among
    those that top-k kept) reaches ``top_p``. Ties go to the lower id. Of these, the tokens stay
    whose probability is at least ``min_p`` times the largest. A row takes one uniform number, so
    the same generator gives the same tokens on every device.

    Args:
        logits_BV: (B, V) floating point; computed in float32.
        config: the settings; ``seed``, ``stop`` and ``max_new_tokens`` are not used here.
        generator: of the CPU, one for all rows or one for each; by default PyTorch's global one.
            Not used when greedy.
        seen_BV: (B, V) bool, the tokens that the penalty is for; needed when there is one.

    Returns:
        (B,) int64.

    Raises:
        ValueError: not (B, V) floating point with a word in it; a row holds NaN or +inf (also as
            float32), or nothing but -inf; a penalty without ``seen_BV``, or one of another shape;
            not one generator for each row.
    """
    logits_BV = _checked(logits_BV, config, generator, seen_BV)
    if seen_BV is not None:
        logits_BV = penalised(logits_BV, config.repetition_penalty, seen_BV)
    if config.greedy:
        return logits_BV.argmax(-1)
    # One that is 0 or infinite as a float32 would give 0 / 0.
    temperature = min(max(config.temperature, LIMITS.tiny), LIMITS.max)
    largest_B1 = logits_BV.amax(-1, keepdim=True)

    def scaled(logits: Tensor) -> Tensor:
        # After the maximum is subtracted: a tiny temperature cannot overflow then.
        return (logits - largest_B1).div_(temperature)

    if config.top_k == 0 and config.top_p == 1:
        return _draw(_weights(scaled(logits_BV), config.min_p), generator)
    # The numbers alone are put in order, which takes a fraction of what it takes with their ids,
    # and before they are scaled, which may round two of them to one.
    total_B1 = None if config.top_k else _log_sum(scaled(logits_BV))
    values_BC = _candidates(logits_BV, scaled, total_B1, config)
    scaled_BC = scaled(values_BC)
    weights_BC = _weights(scaled_BC, config.min_p)
    if config.top_p < 1:
        if total_B1 is None:
            total_B1 = _log_sum(scaled_BC)
        p_BC = (scaled_BC - total_B1).exp()
        before_BC = p_BC.cumsum(-1) - p_BC
        kept_BC = before_BC < config.top_p
        kept_BC[:, 0] = True  # the most likely token stays, whatever is lost in rounding
        weights_BC = weights_BC * kept_BC
    return _ids_at(_draw(weights_BC, generator), values_BC, logits_BV)


def _checked(
    logits_BV: Tensor,
    config: SamplingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seen_BV: Tensor | None,
) -> Tensor:
    """The logits in float32; see :func:`sample_token` for what is refused."""
    if logits_BV.dim() != 2 or not logits_BV.shape[1] or not logits_BV.is_floating_point():
        raise ValueError(
            "sample_token: the logits must be floating point of shape (rows, words), got "
            f"{logits_BV.dtype} {tuple(logits_BV.shape)}"
        )
    if isinstance(generator, Sequence) and len(generator) != len(logits_BV):
        raise ValueError(
            f"sample_token: expected one generator for each of {len(logits_BV)} rows, got "
            f"{len(generator)}"
        )
    if config.repetition_penalty != 1 and seen_BV is None:
        raise ValueError("sample_token: a repetition penalty needs seen_BV, the tokens so far")
    if seen_BV is not None and (seen_BV.shape != logits_BV.shape or seen_BV.dtype != torch.bool):
        raise ValueError(
            f"sample_token: seen_BV must be bool of shape {tuple(logits_BV.shape)}, got "
            f"{seen_BV.dtype} {tuple(seen_BV.shape)}"
        )
    logits_BV = logits_BV.float()
    if not all(map(math.isfinite, logits_BV.amax(-1).tolist())):
        raise ValueError(NOT_FINITE)
    return logits_BV


def penalised(logits_BV: Tensor, penalty: float | Tensor, seen_BV: Tensor) -> Tensor:
    """Seen tokens made less likely by a penalty above 1, more likely by one below.

    CTRL (arXiv:1909.05858, sec. 4.1) divides every logit; a negative one would grow by that, so
    it is multiplied, as Hugging Face does.
    """
    moved_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    # A masked word stays masked, and no other becomes so.
    moved_BV = moved_BV.clamp(LIMITS.min, LIMITS.max).where(logits_BV.isfinite(), logits_BV)
    return moved_BV.where(seen_BV, logits_BV)


def _weights(scaled_BC: Tensor, min_p: float) -> Tensor:
    """The odds of words whose scaled logits are given, 1 for the likeliest (it has 0)."""
    weights_BC = scaled_BC.exp()
    return weights_BC.where(weights_BC >= min_p, 0.0) if min_p else weights_BC


def _log_sum(scaled_BC: Tensor) -> Tensor:
    """``logsumexp`` (B, 1) of words of which the likeliest has 0, which that would look for."""
    return scaled_BC.exp().sum(-1, keepdim=True).log()


def _candidates(
    logits_BV: Tensor,
    scaled: Callable[[Tensor], Tensor],
    total_B1: Tensor | None,
    config: SamplingConfig,
) -> Tensor:
    """The logits (B, C) of the tokens to draw from and maybe more, the largest first."""
    n_words = logits_BV.shape[1]
    if config.top_k:
        return _largest(logits_BV, min(config.top_k, n_words))
    if n_words > max(SMALL_VOCABULARY, NUCLEUS_GUESS):
        assert total_B1 is not None
        values_BC = _largest(logits_BV, NUCLEUS_GUESS)
        covered_B1 = (_log_sum(scaled(values_BC)) - total_B1).exp()
        if bool((covered_B1 >= config.top_p).all()):
            return values_BC
    return _largest(logits_BV, n_words)


def _largest(logits_BV: Tensor, count: int) -> Tensor:
    """The ``count`` largest (B, C), descending."""
    if logits_BV.device.type != "cpu":
        return logits_BV.topk(count, dim=-1).values
    # NumPy sorts plain numbers with vector instructions, six times as fast as PyTorch.
    negative_BC = -logits_BV.detach().numpy()
    if count < negative_BC.shape[1]:
        negative_BC = np.partition(negative_BC, count - 1, axis=-1)[:, :count]
    return torch.from_numpy(-np.sort(negative_BC, axis=-1))


def _ids_at(place_B: Tensor, values_BC: Tensor, logits_BV: Tensor) -> Tensor:
    """The ids (B,) of the tokens at these places of the largest logits. Of equals, the lower ids
    come first."""
    place_B1 = place_B.unsqueeze(1)
    value_B1 = values_BC.gather(1, place_B1)
    equal_BV = logits_BV == value_B1
    ids = equal_BV.nonzero()[:, 1]
    if len(ids) == len(logits_BV):  # each is the only one
        return ids
    n_above_B1 = (values_BC > value_B1).sum(-1, keepdim=True)
    return torch.searchsorted(equal_BV.cumsum(-1), place_B1 - n_above_B1 + 1).squeeze(1)


def _draw(
    weights_BC: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """Invert the cumulative distribution of each row at one uniform number: indices (B,)."""
    cumulative_BC = weights_BC.cumsum(-1)
    total_B1 = cumulative_BC[:, -1:]
    if isinstance(generator, Sequence):
        u_B1 = torch.stack([torch.rand(1, generator=own) for own in generator])
    else:
        u_B1 = torch.rand(weights_BC.shape[0], 1, generator=generator)
    u_B1 = u_B1.to(weights_BC.device)
    # Strictly below the total, which rounding may reach: so the entry found has a weight.
    u_B1 = torch.minimum(u_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BC, u_B1, right=True).squeeze(1)
